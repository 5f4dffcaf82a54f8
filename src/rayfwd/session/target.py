"""Where a stream goes, and whose it is: the payload of an OPEN (pure)."""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

_TARGET = struct.Struct(">4sH")
_SOURCE = struct.Struct(">4s")
_LANE, _ASKS = b"\1", b"\2"


class Target(NamedTuple):
    """An IPv4 address and a port: what a stream is opened to."""

    address: str
    port: int

    def encode(self) -> bytes:
        return _TARGET.pack(_packed(self.address), self.port)

    @classmethod
    def decode(cls, data: bytes) -> Target:
        """Raises ValueError."""
        if len(data) != _TARGET.size:
            raise ValueError(f"a target of {len(data)} bytes")
        address, port = _TARGET.unpack(data)
        return cls(str(ipaddress.IPv4Address(address)), port)

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


class Opening(NamedTuple):
    """A target, and the address of the node that dials it."""

    target: Target
    source: str | None = None
    """Said by the hub, which knows by whose session a stream came, and by nobody else. None: not
    known."""
    lane: bool = False
    """The stream is to be a lane of the session that two workers have between them; its port says
    nothing."""
    asks: bool = False
    """Nothing is to be dialled: the question is whether the target listens. The stream is reset
    with the answer."""

    def encode(self) -> bytes:
        source = b"" if self.source is None else _SOURCE.pack(_packed(self.source))
        return self.target.encode() + source + _LANE * self.lane + _ASKS * self.asks

    @classmethod
    def decode(cls, data: bytes) -> Opening:
        """Raises ValueError."""
        target, rest = data[: _TARGET.size], data[_TARGET.size :]
        marked = len(rest) in {1, 1 + _SOURCE.size}
        source, mark = rest[: len(rest) - marked], rest[len(rest) - marked :]
        if len(source) not in {0, _SOURCE.size} or mark not in {b"", _LANE, _ASKS}:
            raise ValueError(f"an OPEN of {len(data)} bytes")
        whose = str(ipaddress.IPv4Address(source)) if source else None
        return cls(Target.decode(target), whose, mark == _LANE, mark == _ASKS)


def _packed(address: str) -> bytes:
    return ipaddress.IPv4Address(address).packed
