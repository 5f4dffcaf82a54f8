"""Where a stream goes: the payload of an OPEN (pure)."""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

_TARGET = struct.Struct(">4sH")


class Target(NamedTuple):
    """An IPv4 address and a port: what a stream is opened to."""

    address: str
    port: int

    def encode(self) -> bytes:
        return _TARGET.pack(ipaddress.IPv4Address(self.address).packed, self.port)

    @classmethod
    def decode(cls, data: bytes) -> Target:
        """Raises ValueError."""
        if len(data) != _TARGET.size:
            raise ValueError(f"a target of {len(data)} bytes")
        address, port = _TARGET.unpack(data)
        return cls(str(ipaddress.IPv4Address(address)), port)

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"
