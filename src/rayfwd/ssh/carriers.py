"""Which carrier a configuration asks for.

AsyncSSH is loaded by whoever first has use for it: to load it is a third of the start of a head,
which dials nobody unless it is told to.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

from typing import TYPE_CHECKING

from rayfwd.config import HeadConfig

if TYPE_CHECKING:
    from rayfwd.ssh.asyncssh_carrier import SshCarrier
    from rayfwd.ssh.openssh_carrier import OpensshCarrier


def carrier_for(head: HeadConfig) -> SshCarrier | OpensshCarrier:
    """One that dials that head."""
    if head.transport == "openssh":
        from rayfwd.ssh.openssh_carrier import OpensshCarrier

        return OpensshCarrier(head)
    from rayfwd.ssh.asyncssh_carrier import SshCarrier

    return SshCarrier(head)
