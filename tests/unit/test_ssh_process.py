"""An `ssh` and what it has started: its own end is the end, and nothing of it stays."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

from rayfwd.ssh.ssh_process import SshProcess
from tests.unit.loops import run, until


def exists(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_it_is_over_when_it_ends_whatever_it_has_started(tmp_path: Path) -> None:
    """The `ssh` of a ProxyJump may wait for two minutes, and has the same standard error."""
    child = tmp_path / "child"
    script = f"sleep 600 & echo $! >{child}; echo 'Connection timed out' >&2; exit 255"

    async def main() -> None:
        process = SshProcess(["sh", "-c", script], subprocess.DEVNULL, subprocess.DEVNULL)
        await process.listen()
        async with asyncio.timeout(10):
            await process.over
        assert "Connection timed out" in process.said
        pid = int(child.read_text())
        await until(lambda: not exists(pid))

    run(main)


def test_what_it_says_last_is_read() -> None:
    """Though a child keeps its standard error open."""
    script = "sleep 600 & i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i >&2; done; exit 1"

    async def main() -> None:
        for _ in range(5):
            process = SshProcess(["sh", "-c", script], subprocess.DEVNULL, subprocess.DEVNULL)
            await process.listen()
            async with asyncio.timeout(10):
                await process.over
            assert process.said.rstrip().endswith("line 300")

    run(main)
