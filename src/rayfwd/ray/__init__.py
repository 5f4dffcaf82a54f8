"""Ray on this machine: finding it, its command line by version, its processes, what it reports."""
