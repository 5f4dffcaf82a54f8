"""Streams that do as those of DDP do, each for itself: a bucket there and back, and again.

`python -m bench.crowd STREAMS SECONDS PORT…`: STREAMS connections, shared out among the ports, each
to an echo of bench/peers.py. Prints `ready` when all stand; then, after SECONDS, the bytes that
each has moved there.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

BUCKET = 1 << 17
"""Bytes that go there before the next ones do, which is when they are back: a ring's share of a
gradient bucket."""


class Stream(asyncio.Protocol):
    """One connection; whatever comes back counts."""

    until = float("inf")

    def __init__(self) -> None:
        self.moved = 0
        self._missing = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(b"e")

    def begin(self, block: bytes) -> None:
        """Send a bucket."""
        self._block, self._missing = block, len(block)
        self._transport.write(block)

    def data_received(self, data: bytes) -> None:
        self._missing -= len(data)
        self.moved += len(data)
        if not self._missing and time.monotonic() < self.until:
            self.begin(self._block)

    def connection_lost(self, exc: Exception | None) -> None:
        sys.exit(f"a stream was lost: {exc}")


async def main() -> None:
    count, seconds = int(sys.argv[1]), float(sys.argv[2])
    ports = [int(word) for word in sys.argv[3:]]
    loop = asyncio.get_running_loop()
    streams = [
        (await loop.create_connection(Stream, "127.0.0.1", ports[number % len(ports)]))[1]
        for number in range(count)
    ]
    Stream.until = time.monotonic() + seconds
    block = os.urandom(BUCKET)
    for stream in streams:
        stream.begin(block)
    print("ready", flush=True)
    await asyncio.sleep(seconds)
    print(*(stream.moved for stream in streams), flush=True)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
