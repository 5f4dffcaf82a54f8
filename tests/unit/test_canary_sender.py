"""The canary's script is ended with all that it has started, whatever that holds."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from rayfwd.ray.canary import sender
from rayfwd.ray.install import RayInstall, Versions
from tests.unit.loops import run, until
from tests.unit.test_children import left_by, there

SCRIPT = """#!/bin/sh
echo $$ >{note}.own
setsid {python} -S -c 'if True:
    import os, time
    print(os.getpid(), file=open("{note}", "w"), flush=True)
    time.sleep(600)' &
wait
"""
"""A driver whose child has a session of its own, and the driver's pipes."""


def fake(folder: Path) -> RayInstall:
    """A Ray whose Python is that script."""
    python = folder / "python"
    python.write_text(SCRIPT.format(note=folder / "left", python=sys.executable))
    python.chmod(0o700)
    return RayInstall("ray", str(python), Versions("2.60.0", "3.11.2"))


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_has_its_pipes_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    monkeypatch.setattr(sender, "START_TIMEOUT", 60.0 if cancelled else 1.0)

    async def main() -> None:
        sent = asyncio.create_task(
            sender.run(fake(tmp_path), dict(os.environ), "127.0.0.1:1", "127.0.0.1", [], 0.0)
        )
        left = await left_by(tmp_path / "left")
        own = int((tmp_path / "left.own").read_text())
        began = time.monotonic()
        if cancelled:
            sent.cancel()
        await asyncio.wait({sent})
        assert time.monotonic() < began + 20
        assert sent.cancelled() is cancelled
        await until(lambda: not there(left) and not there(own))

    run(main)
