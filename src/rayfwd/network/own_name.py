"""The line of /etc/hosts by which the machine's own name leads to the node's address.

gloo, and so torch and JAX on CPUs, asks for the address of the machine's name where no interface
has the node's address, and tells it to the other ranks (`gloo/transport/tcp/device.cc`). They dial
it: 127.0.1.1, which Debian writes there, is their own machine, and an address of the machine's
network is behind its firewall.
"""

from __future__ import annotations

import socket
from pathlib import Path

HOSTS = Path("/etc/hosts")
GLOO_NEEDS = "torch and JAX by gloo need this line in /etc/hosts, and no other with that name"


def missing_line(address: str, hosts: Path = HOSTS, name: str | None = None) -> str | None:
    """The line that /etc/hosts lacks; None: the name leads to `address`, a node's, and to no other.

    Of several, which one is told first depends on their kinds (RFC 6724). A file that cannot be
    read has none.
    """
    name = name or socket.gethostname()
    try:
        text = hosts.read_text("utf-8", "replace")
    except OSError:
        text = ""
    found = set()
    for line in text.splitlines():
        of, *names = line.partition("#")[0].split() or [""]
        if name.lower() in map(str.lower, names):
            found.add(of)
    return None if found == {address} else f"{address} {name}"
