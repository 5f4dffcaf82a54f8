"""Connections whose port is not known to be open, from their first packet until it is.

The rules drop that packet, and the kernel gives a copy of it (nfnetlink_log). When the node that is
dialled has said whether the port is open, the copy is sent in its place, with a mark by which the
rules know the answer: the connection is redirected, or refused. So `connect` takes as long as the
question. Where no answer comes nothing is lost: the kernel sends the packet again by itself, a
second after the first.

Needs CAP_NET_ADMIN for the one and CAP_NET_RAW for the other.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from rayfwd.network.ruleset import MARK_CLOSED, MARK_OPEN

Place = tuple[str, int]
"""An address and a port."""

ANSWER_SECONDS = 2.0
"""Seconds in which an answer is of use: by then the kernel has sent the packet again."""
MOST_PLACES, MOST_AT_A_PLACE = 256, 64
"""Ports that are asked about at once, and connections to one of them; the kernel's own second
packet is there for the rest."""
COPIED = 256
"""Bytes of a packet that are copied: its headers are shorter."""

# linux/netfilter/nfnetlink.h, linux/netfilter/nfnetlink_log.h
_NETLINK_NETFILTER = 12
_NLM_F_REQUEST, _NLM_F_ACK, _NLMSG_ERROR = 1, 4, 2
_PACKET, _CONFIG = 4 << 8 | 0, 4 << 8 | 1
_CFG_CMD, _CFG_MODE, _CMD_BIND, _COPY_PACKET = 1, 2, 1, 2
_PAYLOAD = 9
_NLMSGHDR = struct.Struct("=IHHII")
"""length, type, flags, sequence number, port id"""
_NFGENMSG = struct.Struct("!BBH")
"""family, version, group"""
_ATTRIBUTE = struct.Struct("=HH")
"""length with this header, type"""
_MODE = struct.Struct("!IBx")

_IPV4 = struct.Struct("!BxH4xBBH4s4s")
"""version and length, total length, ttl, protocol, checksum, source, destination"""
_PORTS = struct.Struct("!HH")
_FIN, _SYN, _RST, _ACK = 0x01, 0x02, 0x04, 0x10
_SO_MARK = 36


class Syn(NamedTuple):
    """The first packet of a connection."""

    source: Place
    target: Place
    packet: bytes
    """Its headers of IP and TCP, to be sent as they are."""


class HeldDials:
    """Owns two sockets; its owner reads when there is something to read."""

    def __init__(self, group: int, clock: Callable[[], float]) -> None:
        """Raises OSError where the kernel does not give copies, or lets nobody send them."""
        self._clock = clock
        self._places: dict[Place, _Held] = {}
        self._untold: list[Place] = []
        self._sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        try:
            self._copies = _log(group)
        except OSError:
            self._sender.close()
            raise

    def fileno(self) -> int:
        return self._copies.fileno()

    def close(self) -> None:
        self._copies.close()
        self._sender.close()

    def read(self) -> None:
        """Take the copies that have come."""
        while True:
            try:
                data = self._copies.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno == errno.ENOBUFS:  # some were lost
                    continue
                raise
            for syn in syns(data):
                self._hold(syn)

    def _hold(self, syn: Syn) -> None:
        now = self._clock()
        held = self._places.get(syn.target)
        if held is None or now - held.since > ANSWER_SECONDS:
            self._forget_old(now)
            if len(self._places) >= MOST_PLACES:
                return
            held = self._places[syn.target] = _Held(now, {})
            self._untold.append(syn.target)
        if len(held.packets) < MOST_AT_A_PLACE or syn.source in held.packets:
            held.packets[syn.source] = syn.packet

    def _forget_old(self, now: float) -> None:
        self._places = {p: h for p, h in self._places.items() if now - h.since <= ANSWER_SECONDS}
        self._untold = [place for place in self._untold if place in self._places]

    def untold(self) -> list[Place]:
        """Places that were dialled since this was asked last."""
        self._forget_old(self._clock())
        untold, self._untold = self._untold, []
        return untold

    def decide(self, answers: Iterable[tuple[Place, bool]]) -> None:
        """Whether these ports are open."""
        self._forget_old(self._clock())
        for place, is_open in answers:
            held = self._places.pop(place, None)
            mark = MARK_OPEN if is_open else MARK_CLOSED
            for packet in () if held is None else held.packets.values():
                with suppress(OSError):  # EPERM too, as it is refused
                    self._sender.setsockopt(socket.SOL_SOCKET, _SO_MARK, mark)
                    self._sender.sendto(packet, (place[0], 0))


class _Held(NamedTuple):
    """What was dialled at a place, and since when."""

    since: float
    packets: dict[Place, bytes]
    """By where the connection comes from."""


def syns(data: bytes) -> Iterator[Syn]:
    """Those in what the kernel has written; everything else is left out."""
    at = 0
    while at + _NLMSGHDR.size <= len(data):
        length, kind, *_ = _NLMSGHDR.unpack_from(data, at)
        if length < _NLMSGHDR.size:
            return
        if kind == _PACKET:
            inside = data[at + _NLMSGHDR.size + _NFGENMSG.size : at + length]
            for name, value in _attributes(inside):
                if name == _PAYLOAD and (found := syn_of(value)) is not None:
                    yield found
        at += max((length + 3) & ~3, _NLMSGHDR.size)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, name = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield name, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def syn_of(packet: bytes) -> Syn | None:
    """Without the bytes that may come with it (TCP Fast Open), which are sent again as they are not
    acknowledged. None: it is none, or its headers are not whole."""
    if len(packet) < _IPV4.size:
        return None
    first, _, _, protocol, _, source, target = _IPV4.unpack_from(packet)
    begin = (first & 15) * 4
    tcp = bytearray(packet[begin:])
    if first >> 4 != 4 or begin < _IPV4.size or protocol != socket.IPPROTO_TCP or len(tcp) < 20:
        return None
    size = (tcp[12] >> 4) * 4
    if not 20 <= size <= len(tcp) or tcp[13] & (_FIN | _SYN | _RST | _ACK) != _SYN:
        return None
    del tcp[size:]
    tcp[16:18] = bytes(2)
    pseudo = source + target + struct.pack("!BBH", 0, protocol, size)
    tcp[16:18] = struct.pack("!H", checksum(pseudo + tcp))  # what loops back has none yet
    near, far = _PORTS.unpack_from(tcp)
    header = packet[:2] + struct.pack("!H", begin + size) + packet[4:begin]
    return Syn((socket.inet_ntoa(source), near), (socket.inet_ntoa(target), far), header + tcp)


def checksum(data: bytes) -> int:
    """As TCP has it (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _log(group: int) -> socket.socket:
    """Gets the copies of that group. Raises OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    sock = socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER)
    try:
        bind = struct.pack("=HHBxxx", 5, _CFG_CMD, _CMD_BIND)
        mode = _MODE.pack(COPIED, _COPY_PACKET)
        for attribute in (bind, struct.pack("=HH", 4 + len(mode), _CFG_MODE) + mode + bytes(2)):
            _configure(sock, group, attribute)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _configure(sock: socket.socket, group: int, attribute: bytes) -> None:
    """Raises OSError."""
    body = _NFGENMSG.pack(0, 0, group) + attribute
    flags = _NLM_F_REQUEST | _NLM_F_ACK
    sock.send(_NLMSGHDR.pack(_NLMSGHDR.size + len(body), _CONFIG, flags, 1, 0) + body)
    while True:
        answer = sock.recv(1 << 16)
        if _NLMSGHDR.unpack_from(answer)[1] == _NLMSG_ERROR:
            break  # and no copy that came meanwhile
    (error,) = struct.unpack_from("=i", answer, _NLMSGHDR.size)
    if error:
        raise OSError(-error, os.strerror(-error))
