"""An honest program beside the hostile ones: how long its answers take.

    honest.py serve PORT        on 127.0.0.1: echoes, or sends without end to who begins with "!"
    honest.py call HOST PORT    until it is ended; prints a line of JSON for each answer

A line is `[when, what, seconds]`: when it was asked, on the monotonic clock, which all machines of
the lab share; "kept" over one connection, or "new" over one made for it; null: it failed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time

PATIENCE = 30.0
PAUSE = 0.03


def call(host: str, port: int) -> None:
    kept: socket.socket | None = None
    while True:
        for what in ("kept", "new"):
            asked = time.monotonic()
            try:
                if what == "new" or kept is None:
                    sock = socket.create_connection((host, port), timeout=PATIENCE)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if what == "new":
                    with sock:
                        echo(sock)
                else:
                    kept = kept or sock
                    echo(kept)
            except OSError:
                kept = None if what == "kept" else kept
                tell(asked, what, None)
            else:
                tell(asked, what, time.monotonic() - asked)
        time.sleep(PAUSE)


def tell(asked: float, what: str, seconds: float | None) -> None:
    print(json.dumps([asked, what, seconds]), flush=True)


def echo(sock: socket.socket) -> None:
    data = b"e" + os.urandom(100)
    sock.sendall(data)
    got = b""
    while len(got) < len(data):
        part = sock.recv(len(data))
        if not part:
            raise ConnectionError("ended early")
        got += part
    if got != data:
        raise ConnectionError("another's answer")


def serve(port: int) -> None:
    listener = socket.create_server(("127.0.0.1", port), backlog=1000)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=answer, args=(sock,), daemon=True).start()


def answer(sock: socket.socket) -> None:
    try:
        with sock:
            while data := sock.recv(65536):
                while data.startswith(b"!"):
                    sock.sendall(bytes(65536))
                sock.sendall(data)
    except OSError:
        pass


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    call(sys.argv[2], int(sys.argv[3]))
