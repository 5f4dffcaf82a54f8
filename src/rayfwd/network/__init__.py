"""The overlay network: an interface and rules that bring every TCP connection to another node here.

`ruleset.py` has the rules as text (pure), `overlay.py` makes and removes them, by `tables.py` where
they can have an owner. `overlay_keeper.py` is the privileged process that does so for the daemon,
`overlay_client.py` asks it, `manager.py` is the daemon's half, and `open_ports.py` knows which
ports of this machine may be dialled.
"""
