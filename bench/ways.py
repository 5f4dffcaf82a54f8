"""What a way costs: a small message to a socket at the head and back, by each way, with real sshd.

All on loopback: what is measured is what the machines in between and their programs add. As root or
not: `python -m bench.ways`.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rayfwd.config import HeadConfig, MeetConfig
from rayfwd.transport.carriers import carrier_for
from rayfwd.transport.meeting import Meeting
from tests.unit.real_sshd import RealSshd

ROUNDS, WARM = 600, 100
MESSAGE = b"x" * 64


class Echoed:
    """Owns a pipe, and awaits what comes back."""

    def __init__(self) -> None:
        self.came = asyncio.Event()

    def pipe_data(self, data: bytes | memoryview) -> None:
        del data
        self.came.set()

    def pipe_said(self, data: bytes) -> None:
        del data

    def pipe_writable(self) -> None: ...

    def pipe_lost(self, why: str) -> None:
        del why


async def round_trip(head: HeadConfig) -> tuple[float, float]:
    """Milliseconds from dialling until the first answer, and of a round trip then (median)."""
    carrier, owner = carrier_for(head), Echoed()
    began = time.perf_counter()
    connection = await carrier.dial(asyncio.Event())
    try:
        pipe = await connection.open(owner)
        took: list[float] = []
        first = 0.0
        for number in range(WARM + ROUNDS):
            owner.came.clear()
            sent = time.perf_counter()
            pipe.write([MESSAGE])
            await owner.came.wait()
            if number == 0:
                first = time.perf_counter() - began
                await connection.tune()
            if number >= WARM:
                took.append(time.perf_counter() - sent)
        return 1000 * first, 1000 * statistics.median(took)
    finally:
        connection.abort()
        carrier.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.close()


@asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[dict[str, HeadConfig]]:
    """A head, and a host between; each way's configuration."""
    head, between = RealSshd(directory / "head"), RealSshd(directory / "between", "127.0.0.2")
    between.authorize(head.public_key)
    server = await asyncio.start_unix_server(echo, directory / "hub.sock")
    for sshd in (head, between):
        await sshd.start()
    known = directory / "known_hosts"
    known.write_text(
        head.known_hosts_line() + between.known_hosts_line() + head.known_hosts_line("the-head")
    )
    (directory / "ssh_config").write_text("")
    (directory / "by_jump").write_text(f"Host {head.address}\n  ProxyJump {between.target}\n")
    common: dict[str, Any] = {"identity": head.identity, "known_hosts": known}
    common["ssh_config"] = directory / "ssh_config"
    meet = MeetConfig(ssh=between.target, sshd=f"{head.address}:{head.port}", **common)
    changed = asyncio.Event()
    meeting = Meeting(meet, 60.0, changed.set)
    task = asyncio.create_task(meeting.run())
    direct = {**common, "ssh": head.target, "socket": directory / "hub.sock"}
    met = {**direct, "ssh": f"{head.user}@the-head", "meet": between.target}
    by_jump = {**direct, "ssh_config": directory / "by_jump"}
    try:
        await changed.wait()
        yield {
            "the worker dials, AsyncSSH": HeadConfig(**direct),
            "the worker dials, the system's ssh": HeadConfig(**direct, transport="openssh"),
            "through a jump host": HeadConfig(**by_jump),
            "through a jump host, the system's ssh": HeadConfig(**by_jump, transport="openssh"),
            "a meeting place": HeadConfig(**met),
            "a meeting place, the system's ssh": HeadConfig(**met, transport="openssh"),
        }
    finally:
        meeting.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for sshd in (between, head):
            await sshd.stop()
        server.close()


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with scene(Path(directory)) as ways:
            for name, head in ways.items():
                first, each = await round_trip(head)
                print(f"| {name} | {first:.0f} ms | {each:.2f} ms |")


if __name__ == "__main__":
    asyncio.run(main())
