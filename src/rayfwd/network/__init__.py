"""The overlay network: an interface and rules that bring every TCP connection to another node here.

`rules.py` says what the rules are (pure), `overlay.py` makes and removes them, `keeper.py` is the
privileged process that does so for the daemon, `client.py` asks it, `ports.py` knows which ports
are open on this node.
"""
