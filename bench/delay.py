"""A relay that delays: what goes through it arrives later by half a round trip, each way.

`python -m bench.delay LISTEN TARGET MILLISECONDS`. The kernel may have no netem; a relay needs none
and works for any contestant, since each has one TCP connection or more to the SSH server.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections import deque

READ = 1 << 18
MOST = 1 << 28
"""Bytes under way in one direction: far more than any contestant's window."""


def one_way(source: socket.socket, sink: socket.socket, delay: float) -> None:
    """Pass bytes on, each `delay` seconds after it came, until the source ends."""
    came: deque[tuple[float, bytes]] = deque()
    changed = threading.Condition()
    held = 0

    def write() -> None:
        nonlocal held
        while True:
            with changed:
                changed.wait_for(lambda: came)
                due, data = came.popleft()
            if not data:
                break
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                sink.sendall(data)
            except OSError:
                break
            with changed:
                held -= len(data)
                changed.notify_all()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)  # the other direction lives on

    threading.Thread(target=write, daemon=True).start()
    data = b"more"
    while data:
        try:
            data = source.recv(READ)
        except OSError:
            data = b""
        with changed:
            while held >= MOST:
                changed.wait()
            held += len(data)
            came.append((time.monotonic() + delay, data))
            changed.notify_all()


def main() -> None:
    listen, target, milliseconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    with socket.create_server(("127.0.0.1", listen)) as listener:
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", target))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((near, far), (far, near)):
                half = milliseconds / 2000
                threading.Thread(target=one_way, args=(source, sink, half), daemon=True).start()


if __name__ == "__main__":
    main()
