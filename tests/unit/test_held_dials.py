"""What the kernel gives a copy of, and is sent again: first packets of connections."""

from __future__ import annotations

import socket
import struct

import pytest

from rayfwd.network.held_dials import Syn, checksum, syn_of, syns

OPTIONS = bytes.fromhex("020405b40101080a0000000100000000")
"""Of TCP: a largest segment, a time stamp."""
SYN, ACK = 0x02, 0x10


def packet(flags: int = SYN, data: bytes = b"", options: bytes = OPTIONS) -> bytes:
    """From 127.77.0.1:45000 to 127.77.0.2:5000, without a checksum, as what loops back."""
    offset = (20 + len(options)) // 4 << 4
    tcp = struct.pack("!HHIIBBHHH", 45000, 5000, 7, 0, offset, flags, 65495, 0, 0) + options + data
    ends = (socket.inet_aton("127.77.0.1"), socket.inet_aton("127.77.0.2"))
    total = 20 + len(tcp)
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, total, 1, 0x4000, 64, 6, 0, *ends) + tcp


def copied(*packets: bytes) -> bytes:
    """As the kernel writes them (nfnetlink_log): behind a mark, and with a prefix behind them."""
    out = b""
    for each in packets:
        body = bytes(4)
        for kind, value in ((1, bytes(4)), (9, each), (10, b"\0")):
            body += struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
        out += struct.pack("=IHHII", 16 + len(body), 4 << 8, 0, 0, 0) + body
    return out


def test_a_first_packet_is_known_with_its_ends() -> None:
    found = syn_of(packet())
    assert found is not None
    assert found[:2] == (("127.77.0.1", 45000), ("127.77.0.2", 5000))
    tcp = found.packet[20:]
    assert tcp[20:] == OPTIONS, "which the connection is to have"
    pseudo = found.packet[12:20] + struct.pack("!BBH", 0, 6, len(tcp))
    assert checksum(pseudo + tcp) == 0, "it fits"


def test_bytes_that_come_with_it_are_left_out() -> None:
    assert syn_of(packet(data=b"early")) == syn_of(packet())


@pytest.mark.parametrize("flags", [0, ACK, SYN | ACK, SYN | 1, SYN | 4])
def test_no_other_packet_is_sent_again(flags: int) -> None:
    assert syn_of(packet(flags)) is None


@pytest.mark.parametrize("cut", [0, 19, 20, 39, 55])
def test_a_packet_without_its_whole_headers_is_none(cut: int) -> None:
    assert syn_of(packet()[:cut]) is None


def test_several_in_one_message_of_the_kernels() -> None:
    answer = struct.pack("=IHHIIi", 20, 2, 0, 1, 0, 0)
    data = answer + copied(packet(), packet(ACK), packet(options=b"")) + b"\0\0\0"
    found = list(syns(data))
    assert [each.target for each in found] == [("127.77.0.2", 5000)] * 2
    assert all(isinstance(each, Syn) for each in found)
