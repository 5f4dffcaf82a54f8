"""Server and client of the stream tests: plain TCP programs that write down what they met.

    conversation.py serve PORT            listens on 127.0.0.1, PORT and up; see PARTS
    conversation.py call HOST PORT PART   plays that part's client; prints what it met as JSON

Run by any Python on a machine. A transcript is a list of [what, …]: bytes by number and digest, and
how each direction ended. Server transcripts are one JSON line a connection on standard output.
"""

from __future__ import annotations

import hashlib
import json
import resource
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

PARTS = (
    "server_first",
    "client_half_closes",
    "server_half_closes",
    "reset_by_server",
    "reset_by_client",
    "source",
    "echo",
    "refused",
)
PATIENCE = 60.0
SLOW, FAST = 24_000_000, 60_000_000
Transcript = list[list[Any]]


def content(label: str, size: int) -> bytes:
    return hashlib.shake_256(label.encode()).digest(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read(sock: socket.socket, size: int | None = None) -> tuple[bytes, str]:
    """So many bytes, or all; and how it ended."""
    data = bytearray()
    while size is None or len(data) < size:
        try:
            chunk = sock.recv(65536 if size is None else min(65536, size - len(data)))
        except ConnectionResetError:
            return bytes(data), "reset"
        except TimeoutError:
            return bytes(data), "silence"
        if not chunk:
            return bytes(data), "end"
        data += chunk
    return bytes(data), "goes on"


def met(sock: socket.socket, size: int | None = None) -> list[Any]:
    data, end = read(sock, size)
    return ["received", len(data), digest(data), end]


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# The server's parts


def serve_server_first(sock: socket.socket) -> Transcript:
    sock.sendall(content("banner", 100_000))
    return [met(sock)]


def serve_client_half_closes(sock: socket.socket) -> Transcript:
    script = [met(sock)]
    sock.sendall(content("answer", 300_000))
    return script


def serve_server_half_closes(sock: socket.socket) -> Transcript:
    sock.sendall(content("word", 50_000))
    sock.shutdown(socket.SHUT_WR)
    return [met(sock)]


def serve_reset_by_server(sock: socket.socket) -> Transcript:
    sock.sendall(b"hello")
    script = [met(sock, 3)]
    reset(sock)
    return script


def serve_reset_by_client(sock: socket.socket) -> Transcript:
    sock.sendall(b"hello")
    return [met(sock, 3), met(sock)]


def serve_source(sock: socket.socket) -> Transcript:
    size = int(read(sock, 10)[0])
    sock.sendall(content("source", size))
    return [["sent", size]]


def serve_echo(sock: socket.socket) -> Transcript:
    while data := sock.recv(65536):
        sock.sendall(data)
    return [["echoed"]]


# The client's parts


def call_server_first(address: tuple[str, int]) -> Transcript:
    with dial(address) as sock:
        script = [met(sock, 100_000)]
        sock.sendall(content("question", 1000))
        sock.shutdown(socket.SHUT_WR)
        return [*script, met(sock)]


def call_client_half_closes(address: tuple[str, int]) -> Transcript:
    with dial(address) as sock:
        sock.sendall(content("question", 1_000_000))
        sock.shutdown(socket.SHUT_WR)
        return [met(sock)]


def call_server_half_closes(address: tuple[str, int]) -> Transcript:
    with dial(address) as sock:
        script = [met(sock)]
        sock.sendall(content("late", 500_000))
        return script


def call_reset_by_server(address: tuple[str, int]) -> Transcript:
    with dial(address) as sock:
        script = [met(sock, 5)]
        sock.sendall(b"now")
        return [*script, met(sock)]


def call_reset_by_client(address: tuple[str, int]) -> Transcript:
    sock = dial(address)
    script = [met(sock, 5)]
    sock.sendall(b"now")
    script.append(met_quiet(sock))
    reset(sock)
    return script


def met_quiet(sock: socket.socket) -> list[Any]:
    """Nothing comes while the server reads: what it was sent has time to arrive before a reset."""
    sock.settimeout(1.0)
    return met(sock, 1)


def call_source(address: tuple[str, int]) -> Transcript:
    """Two readers: the second must get all of its bytes while the first reads nothing."""
    with dial(address) as slow, dial(address) as fast:
        slow.sendall(b"%010d" % SLOW)
        script = [["slow", *met(slow, 10)]]
        fast.sendall(b"%010d" % FAST)
        script.append(["fast", *met(fast)])
        script.append(["slow", *met(slow)])
        return script


def call_short(address: tuple[str, int]) -> Transcript:
    """1,000 connections in a row; the endings are counted."""
    counts: dict[str, int] = {}
    for number in range(1000):
        with dial(address) as sock:
            data = content(str(number), 100)
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            found, end = read(sock)
            key = f"{end}, {'same' if found == data else 'other'} bytes"
            counts[key] = counts.get(key, 0) + 1
    return [[key, counts[key]] for key in sorted(counts)]


def call_many(address: tuple[str, int]) -> Transcript:
    """500 open at once: all are dialled, then all are spoken to, then all are ended."""
    socks = [dial(address) for _ in range(500)]
    counts: dict[str, int] = {}
    for number, sock in enumerate(socks):
        sock.sendall(content(str(number), 5000))
    for number, sock in enumerate(socks):
        found, end = read(sock, 5000)
        key = f"{end}, {'same' if found == content(str(number), 5000) else 'other'} bytes"
        counts[key] = counts.get(key, 0) + 1
    for sock in socks:
        sock.shutdown(socket.SHUT_WR)
    for sock in socks:
        rest, end = read(sock)
        key = f"{end} after {len(rest)} more bytes"
        counts[key] = counts.get(key, 0) + 1
        sock.close()
    return [[key, counts[key]] for key in sorted(counts)]


def call_refused(address: tuple[str, int]) -> Transcript:
    try:
        sock = dial(address)
    except ConnectionRefusedError:
        return [["refused"]]
    except ConnectionResetError:  # so soon that connecting itself notices
        return [["received", 0, digest(b""), "reset"]]
    with sock:
        return [met(sock)]


def dial(address: tuple[str, int]) -> socket.socket:
    sock = socket.create_connection(address, timeout=PATIENCE)
    sock.settimeout(PATIENCE)
    return sock


# Both


def part_of(prefix: str, name: str) -> Callable[[Any], Transcript]:
    part: Callable[[Any], Transcript] = globals()[f"{prefix}_{name}"]
    return part


def serve(base: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    lock = threading.Lock()

    def connection(name: str, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        try:
            script = part_of("serve", name)(sock)
        except OSError as exc:
            script = [["failed", type(exc).__name__]]
        sock.close()
        with lock:
            print(json.dumps({"part": name, "server": script}), flush=True)

    def listen(name: str, server: socket.socket) -> None:
        while True:
            sock, _ = server.accept()
            threading.Thread(target=connection, args=(name, sock), daemon=True).start()

    threads = []
    for index, name in enumerate(PARTS):
        if name == "refused":
            continue
        server = socket.create_server(("127.0.0.1", base + index), backlog=1024)
        threads.append(threading.Thread(target=listen, args=(name, server)))
    for thread in threads:
        thread.start()
    print(json.dumps({"listening": len(threads)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        _, _, host, port, name = sys.argv
        print(json.dumps(part_of("call", name)((host, int(port)))))
