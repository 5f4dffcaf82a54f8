"""Watching the cluster: rules over what was observed, and the loop that observes."""
