"""What is an address, and what is a name."""

from __future__ import annotations

from ipaddress import ip_address


def is_address(host: str) -> bool:
    """Whether it is an IP address, and no name that has to be resolved."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
