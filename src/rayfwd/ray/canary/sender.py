"""Runs the canary's script with the user's Ray: starts it, reads it, and ends all of it for sure.

What it costs, measured with Ray 2.60.0 on two shared cores, is in docs/canary.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
from asyncio.subprocess import Process, SubprocessStreamProtocol
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.ray import procfs
from rayfwd.ray.install import RayInstall
from rayfwd.system import setting

SCRIPT = Path(__file__).with_name("script") / "canary_task.py"

MARKER = "RAYFWD_CANARY"
"""Environment variable by which what the script started would be known."""

START_TIMEOUT = 60.0
"""What the script may take besides its time-out: to import Ray, to connect, to say goodbye."""

STAGES = ("task", "to", "from")
LINE_LIMIT = 1 << 20
"""Bytes of a line of the canary's."""


@dataclass(slots=True)
class Stage:
    """How one stage went on one node."""

    ok: bool
    seconds: float
    error: str | None


@dataclass(slots=True)
class CanaryRun:
    """What the script found."""

    connected: bool = False
    stages: dict[str, dict[str, Stage]] = field(default_factory=dict)
    """Node id to stage to how it went; a stage that was not reached is absent."""
    cost: dict[str, float] = field(default_factory=dict)
    """CPU seconds and bytes, of the driver and of the workers' processes."""
    said: str = ""
    """The end of what it wrote to standard error, where it did not get to its end."""
    complete: bool = False

    def read(self, line: bytes) -> None:
        """Take one line of the script's; anything else is left out."""
        if not line.startswith(b'{"canary": '):
            return
        try:
            said = json.loads(line)
            match said["canary"]:
                case "connected":
                    self.connected = True
                case "stage":
                    error = said["error"]
                    self.stages.setdefault(str(said["node"]), {})[str(said["stage"])] = Stage(
                        bool(said["ok"]),
                        float(said["seconds"]),
                        None if error is None else str(error)[:1000],
                    )
                case "cost":
                    self.cost = {k: float(v) for k, v in said.items() if k != "canary"}
                    self.complete = True
        except (ValueError, KeyError, TypeError):
            return


async def run(
    install: RayInstall,
    env: Mapping[str, str],
    gcs: str,
    own_address: str,
    nodes: Sequence[str],
    seconds: float,
) -> CanaryRun:
    """Send the canary to these node ids. Takes at most `seconds` + `START_TIMEOUT`.

    Raises ProblemError (canary_failed) where the script cannot be started. When this returns or is
    cancelled, nothing of the script's runs any more.
    """
    token = secrets.token_hex(12)
    loop = asyncio.get_running_loop()
    try:
        transport, streams = await loop.subprocess_exec(
            lambda: SubprocessStreamProtocol(LINE_LIMIT, loop),
            install.python,
            str(SCRIPT),
            env={**env, MARKER: token, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
            start_new_session=True,
        )
    except OSError as exc:
        raise codes.CANARY_FAILED.error(
            f"{install.python} cannot be started: {exc}",
            f"check that {setting.key('ray.command')} is a working Ray",
        ) from None
    process = Process(transport, streams, loop)
    leader = procfs.look_up(process.pid)
    found = CanaryRun()
    spec = {"gcs": gcs, "own": own_address, "timeout": seconds, "nodes": list(nodes)}
    tail = bytearray()
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds + START_TIMEOUT):
                await _talk(process, spec, found, tail)
    finally:
        await asyncio.shield(_end(process, transport, leader, f"{MARKER}={token}"))
    if not found.complete:
        lines = tail.decode(errors="replace").strip().splitlines()
        found.said = " | ".join(line.strip() for line in lines[-4:])[-800:]
    return found


async def _talk(process: Process, spec: dict[str, Any], found: CanaryRun, tail: bytearray) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    errors = process.stderr

    async def read_errors() -> None:
        while data := await errors.read(65536):
            tail.extend(data)
            del tail[:-8192]

    reading = asyncio.create_task(read_errors(), name="canary errors")
    try:
        with suppress(OSError):
            process.stdin.write(json.dumps(spec).encode() + b"\n")
            await process.stdin.drain()
        with suppress(ValueError):  # a line that is no line of ours
            while line := await process.stdout.readline():
                found.read(line)
        await process.wait()
        await reading
    finally:
        reading.cancel()
        await asyncio.wait({reading})


async def _end(
    process: Process,
    transport: asyncio.SubprocessTransport,
    leader: procfs.Process | None,
    marker: str,
) -> None:
    """SIGKILL to whatever is left of the script's session, and of what it has started."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for left in await asyncio.to_thread(procfs.offspring, leader, marker):
        procfs.send(left, signal.SIGKILL)
    transport.close()  # the wait is for its pipes as well, which whatever is left may have
    await process.wait()
