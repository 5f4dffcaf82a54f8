"""Which carrier a configuration asks for.

AsyncSSH is loaded by whoever first has use for it: to load it is a third of the start of a head,
which dials nobody unless it is told to.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfwd.config import HeadConfig

if TYPE_CHECKING:
    from rayfwd.transport.openssh_carrier import OpensshCarrier
    from rayfwd.transport.ssh_carrier import SshCarrier


def carrier_for(head: HeadConfig) -> SshCarrier | OpensshCarrier:
    """One that dials that head."""
    if head.transport == "openssh":
        from rayfwd.transport.openssh_carrier import OpensshCarrier

        return OpensshCarrier(head)
    from rayfwd.transport.ssh_carrier import SshCarrier

    return SshCarrier(head)
