"""The session protocol: streams that outlive the lanes which carry them (pure, no I/O)."""
