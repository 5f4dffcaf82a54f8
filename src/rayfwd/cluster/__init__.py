"""The plan of a cluster: which address and ports belong to which node; whether they answer."""
