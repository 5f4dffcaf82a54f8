"""The two ends of a measurement: a server with an echo, a sink and a source, and their clients.

The server runs in a process of its own (`python -m bench.peers serve ADDRESS PORT`), as a program
would; `measure ADDRESS PORT BYTES SECONDS` is a client on another machine that prints its figures.
A connection begins with one byte that says what it is: e(cho), s(ink) or g(ive).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import sys
import threading
import time

CHUNK = 1 << 20

address = "127.0.0.1"
"""Where the server is dialled: `measure` has another."""


def serve(address: str, port: int) -> None:
    """Serve for ever."""
    with socket.create_server((address, port), backlog=512) as listener:
        print("listening", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve_one, args=(connection,), daemon=True).start()


def _serve_one(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        try:
            what = connection.recv(1)
            if what == b"e":
                while data := connection.recv(65536):
                    connection.sendall(data)
            elif what == b"s":
                total = 0
                buffer = bytearray(CHUNK)
                while size := connection.recv_into(buffer):
                    total += size
                connection.sendall(struct.pack(">Q", total))
            elif what == b"g":
                (left,) = struct.unpack(">Q", _exactly(connection, 8))
                block = os.urandom(CHUNK)
                while left > 0:
                    connection.sendall(block[: min(left, CHUNK)])
                    left -= CHUNK
        except OSError:
            pass


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the connection ended early")
        data += part
    return data


def _connect(port: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=120)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def upload(port: int, size: int) -> float:
    """Seconds to send `size` bytes and hear that they came."""
    block = os.urandom(CHUNK)
    with _connect(port) as connection:
        connection.sendall(b"s")
        began = time.perf_counter()
        for _ in range(size // CHUNK):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        (came,) = struct.unpack(">Q", _exactly(connection, 8))
        assert came == size // CHUNK * CHUNK, f"{came} of {size} bytes came"
        return time.perf_counter() - began


def download(port: int, size: int) -> float:
    """Seconds to ask for `size` bytes and get them."""
    buffer = bytearray(CHUNK)
    with _connect(port) as connection:
        began = time.perf_counter()
        connection.sendall(b"g" + struct.pack(">Q", size))
        came = 0
        while came < size:
            part = connection.recv_into(buffer)
            if not part:
                raise ConnectionError(f"{came} of {size} bytes came")
            came += part
        return time.perf_counter() - began


def round_trips(port: int, seconds: float, most: int = 1 << 30) -> list[float]:
    """Seconds of each of a series of 200-byte round trips on one connection, one after another."""
    message = os.urandom(200)
    times: list[float] = []
    with _connect(port) as connection:
        connection.sendall(b"e")
        end = time.perf_counter() + seconds
        while len(times) < most and (began := time.perf_counter()) < end:
            connection.sendall(message)
            _exactly(connection, len(message))
            times.append(time.perf_counter() - began)
    return times


def round_trips_beside_bulk(port: int, seconds: float, upward: bool) -> list[float]:
    """The same while another connection moves bulk data, up or down, for all that time."""
    stop = threading.Event()

    def bulk() -> None:
        buffer = bytearray(CHUNK)
        with _connect(port) as connection:
            connection.sendall(b"s" if upward else b"g" + struct.pack(">Q", 1 << 42))
            while not stop.is_set():
                if upward:
                    connection.sendall(buffer)
                elif not connection.recv_into(buffer):
                    return

    thread = threading.Thread(target=bulk, daemon=True)
    thread.start()
    time.sleep(0.5)
    try:
        return round_trips(port, seconds)
    finally:
        stop.set()
        thread.join(10)


def percentile(values: list[float], part: float) -> float:
    """The value below which `part` (0 to 1) of the values lie."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


def median(values: list[float]) -> float:
    return statistics.median(values)


def measure(port: int, size: int, seconds: float) -> dict[str, float]:
    """Streams and round trips; MB/s and microseconds."""
    upload(port, 16 * CHUNK)  # windows open, caches warm
    up, down = upload(port, size), download(port, size)
    idle = round_trips(port, seconds)
    began = time.perf_counter()
    for _ in range(100):
        round_trips(port, seconds, most=1)
    return {
        "worker to head": size / 1e6 / up,
        "head to worker": size / 1e6 / down,
        "round trip, p50": median(idle) * 1e6,
        "round trip, p99": percentile(idle, 0.99) * 1e6,
        "a new connection and one round trip": (time.perf_counter() - began) * 1e4,
    }


def main() -> None:
    global address
    what, address, port, *rest = sys.argv[1:]
    if what == "serve":
        serve(address, int(port))
    else:
        print(json.dumps(measure(int(port), int(rest[0]), float(rest[1]))))


if __name__ == "__main__":
    main()
