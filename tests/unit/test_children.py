"""A command that is run for what it prints leaves nothing, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rayfwd.system import children
from tests.unit.loops import run, until

LEAVES_ONE = 'sleep 600 & echo $! >"$0"; {} wait'
"""A shell that has started a program with the pipes it has itself, as a wrapper of `ray` may be."""


def there(process: int) -> bool:
    """Whether it runs: one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second: while it is read
        return False


async def left_by(note: Path) -> int:
    """The process whose number the shell has written there."""
    await until(lambda: note.exists() and note.read_text().strip())
    return int(note.read_text())


def test_what_it_says_and_its_code() -> None:
    async def main() -> None:
        script = "import sys; print('out'); print('one\\ntwo', file=sys.stderr); sys.exit(3)"
        ran = await children.run(sys.executable, "-c", script, seconds=20)
        assert (ran.code, ran.out, ran.err) == (3, b"out\n", b"one\ntwo\n")
        assert ran.last_line == "two"
        assert (await children.run("echo", "alone", seconds=20)).last_line == "alone"
        assert (await children.run("true", seconds=20)).last_line == ""
        assert (await children.run("sh", "-c", "kill -9 $$", seconds=20)).code == -signal.SIGKILL
        ran = await children.run("/usr/bin/env", seconds=20, env={"A": "b"})
        assert ran.out == b"A=b\n"
        much = await children.run("head", "-c", "3000000", "/dev/zero", seconds=20)
        assert len(much.out) == 3_000_000

    run(main)


def test_what_cannot_be_started(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await children.run(str(tmp_path / "absent"), seconds=20)

    run(main)


def test_one_that_takes_too_long_is_killed_and_what_it_started_is_not_waited_for(
    tmp_path: Path,
) -> None:
    note = tmp_path / "left"
    script = LEAVES_ONE.format("echo $$ >>$0.own;")

    async def main() -> None:
        asked = asyncio.create_task(children.run("sh", "-c", script, str(note), seconds=1.0))
        left = await left_by(note)
        began = time.monotonic()
        try:
            with pytest.raises(TimeoutError):
                await asked
            assert time.monotonic() < began + 20, "it has waited for who has the pipes"
            own = int(Path(f"{note}.own").read_text())
            await until(lambda: not there(own))
            assert there(left), "it is not ours to end"
        finally:
            os.kill(left, signal.SIGKILL)

    run(main)


def test_one_whose_program_keeps_the_pipes_ends_when_its_time_is_up(tmp_path: Path) -> None:
    """What it has said by then is not its whole answer."""
    note = tmp_path / "left"
    script = LEAVES_ONE.replace(" {} wait", "")

    async def main() -> None:
        try:
            with pytest.raises(TimeoutError):
                await children.run("sh", "-c", script, str(note), seconds=1.0)
        finally:
            os.kill(await left_by(note), signal.SIGKILL)

    run(main)


def test_who_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    note = tmp_path / "left"

    async def main() -> None:
        asked = asyncio.create_task(
            children.run("sh", "-c", 'echo $$ >"$0"; exec sleep 600', str(note), seconds=60)
        )
        own = await left_by(note)
        asked.cancel()
        await asyncio.wait({asked})
        assert asked.cancelled()
        assert not there(own), "it is not only told to end"

    run(main)
