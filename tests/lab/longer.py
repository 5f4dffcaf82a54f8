"""A relay between two interfaces: every packet arrives later (the kernel may have no netem).

Usage, in the network that both are in: python longer.py ONE OTHER SECONDS. Says "relaying" once it
does; ends with its parent.
"""

from __future__ import annotations

import ctypes
import select
import signal
import socket
import sys
import time
from collections import deque

ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
PR_SET_PDEATHSIG = 1
LONGEST = 1 << 17
"""Bytes of a packet that the kernel has not cut up yet, and more."""


def tap(interface: str) -> socket.socket:
    """Takes what comes in there, and sends out there."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    # With each packet what the kernel has yet to do to it: to cut it up, to make its checksum.
    sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    sock.bind((interface, ETH_P_ALL))
    sock.setblocking(False)
    return sock


def relay(one: socket.socket, other: socket.socket, seconds: float) -> None:
    """For ever."""
    beyond = {one: other, other: one}
    under_way: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        left = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for source in select.select([one, other], [], [], left)[0]:
            packet = source.recv(LONGEST)
            under_way.append((time.monotonic() + seconds, beyond[source], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, sink, packet = under_way.popleft()
            try:
                sink.send(packet)
            except OSError:  # the queue there is full: the packet is lost, as anywhere
                pass


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    one, other = tap(sys.argv[1]), tap(sys.argv[2])
    print("relaying", flush=True)
    relay(one, other, float(sys.argv[3]))


if __name__ == "__main__":
    main()
