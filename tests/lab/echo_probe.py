"""Small echoes over one connection, and new connections, timed: what a program feels of a fault.

    echo_probe.py serve PORT                 echoes on 127.0.0.1
    echo_probe.py call NAME=HOST:PORT …      until SIGTERM; prints JSON lines

Run by any Python on a machine. Per target one connection is kept, over which 200 bytes go there and
back some 20 times a second, and a new one is made every half second. A line for each echo that took
longer than `TOLD`, and for each that failed: `{"target": …, "what": "echo" or "new", "began": …,
"ended": …, "error": …}`, times on the monotonic clock, which all machines of the lab share. Every
second `{"counts": {"TARGET echo": …}, "now": …}`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time

SIZE = 200
TOLD = 0.1
PATIENCE = 300.0

stop = threading.Event()
said = threading.Lock()
counts: dict[str, int] = {}


def say(line: object) -> None:
    with said:
        print(json.dumps(line), flush=True)


def exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("ended early")
        data += part
    return data


def echo(sock: socket.socket) -> None:
    data = os.urandom(SIZE)
    sock.sendall(data)
    if exactly(sock, SIZE) != data:
        raise ValueError("corrupt")


def dial(address: tuple[str, int]) -> socket.socket:
    sock = socket.create_connection(address, timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def timed(target: str, what: str, began: float, error: str | None) -> None:
    ended = time.monotonic()
    with said:
        key = f"{target} {what}" if error is None else f"{target} {what} failed"
        counts[key] = counts.get(key, 0) + 1
    if error is not None or ended - began > TOLD:
        say({"target": target, "what": what, "began": began, "ended": ended, "error": error})


def keep(target: str, address: tuple[str, int]) -> None:
    sock = None
    while not stop.wait(0.04):
        began = time.monotonic()
        try:
            sock = sock or dial(address)
            echo(sock)
        except (OSError, ValueError) as exc:
            sock = None
            timed(target, "echo", began, f"{type(exc).__name__}: {exc}")
            stop.wait(0.5)
        else:
            timed(target, "echo", began, None)


def renew(target: str, address: tuple[str, int]) -> None:
    """Connections that are made at a bad moment wait, and others are made meanwhile."""

    def once() -> None:
        began = time.monotonic()
        try:
            with dial(address) as sock:
                echo(sock)
        except (OSError, ValueError) as exc:
            timed(target, "new", began, f"{type(exc).__name__}: {exc}")
        else:
            timed(target, "new", began, None)

    while not stop.wait(0.5):
        threading.Thread(target=once, daemon=True).start()


def call(targets: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    for given in targets:
        name, _, address = given.partition("=")
        host, _, port = address.partition(":")
        for loop in (keep, renew):
            threading.Thread(target=loop, args=(name, (host, int(port))), daemon=True).start()
    while not stop.is_set():
        say({"counts": dict(counts), "now": time.monotonic()})
        stop.wait(1.0)
    say({"counts": dict(counts), "now": time.monotonic(), "over": True})


def serve(port: int) -> None:
    def connection(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock:
            try:
                while data := sock.recv(65536):
                    sock.sendall(data)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", port), backlog=1024) as server:
        print("listening", flush=True)
        while True:
            sock, _ = server.accept()
            threading.Thread(target=connection, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        call(sys.argv[2:])
