"""Which carrier a configuration asks for."""

from __future__ import annotations

from rayfwd.config import HeadConfig
from rayfwd.transport.openssh_carrier import OpensshCarrier
from rayfwd.transport.ssh_carrier import SshCarrier


def carrier_for(head: HeadConfig) -> SshCarrier | OpensshCarrier:
    """One that dials that head."""
    return OpensshCarrier(head) if head.transport == "openssh" else SshCarrier(head)
