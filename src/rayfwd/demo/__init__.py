"""`rayfwd demo`: a head and a worker on this machine alone, joined by nothing but SSH.

Both are Linux namespaces with real processes of rayfwd and Ray in them; the link is cut while a
job runs. `run` owns all of it: whatever happens, no process, mount or file is left.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.demo.story import Story
from rayfwd.demo.teller import Narrator, StepFailedError
from rayfwd.problems import ProblemError
from rayfwd.ray.install import RayInstall, find
from rayfwd.system import setting
from rayfwd.system.logs import escaped

TAIL = 15
"""Lines of each log that are shown after a failure."""
NEXT = (
    "\nNext, on your own machines: run `rayfwd head` on one that accepts SSH; it prints the "
    "command for the others.",
    "With root and systemd: `rayfwd init head`, then `rayfwd init worker`. README.md has both.",
)
"""How to go on from here."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(ray: str = "ray", keep: bool = False) -> int:
    """Run the demo with that `ray` command; the exit code.

    `keep` leaves its files in place and says where. 0: all went well; 1: a step failed, and the
    logs were shown; 128 and the signal's number: interrupted. Raises ProblemError: no usable Ray
    (`ray_not_found`, …), or no namespaces (`namespaces_forbidden`).
    """
    return asyncio.run(_run(ray, keep))


async def _run(ray: str, keep: bool) -> int:
    interrupted: list[int] = []
    story = asyncio.create_task(_in_a_folder(ray, keep), name="demo")

    def interrupt(number: int) -> None:
        if not interrupted:  # once: what is being cleaned up must not be interrupted
            interrupted.append(number)
            story.cancel()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, interrupt, number)
    try:
        return await story
    except asyncio.CancelledError:
        if not interrupted:
            raise
        return 128 + interrupted[0]


async def _in_a_folder(ray: str, keep: bool) -> int:
    teller = Narrator(sys.stdout)
    install = await _find_ray(ray)
    teller.plain(
        "rayfwd demo: a head and a worker without a network, both on this machine. Real Ray "
        f"{install.versions.ray} runs a job on them, and the link is cut in the middle. This takes "
        "about a minute."
    )
    # Unix sockets' paths are short (107 bytes), and a TMPDIR need not be.
    folder = Path(tempfile.mkdtemp(prefix="rayfwd-", dir="/tmp"))
    story = Story(folder, install, teller)
    try:
        went_well = await _tell(story, teller)
    finally:
        if keep:
            teller.plain(f"\nKept: {folder}")
        else:
            await _to_the_end(asyncio.to_thread(shutil.rmtree, folder))
    if not went_well:
        return 1
    teller.title(f"Removed both machines{'' if keep else ', with all their mounts and files'}")
    teller.plain("\nWhat happened:")
    for line in story.last_words():
        teller.plain(f"  - {line}")
    for line in NEXT:
        teller.plain(line)
    return 0


async def _tell(story: Story, teller: Narrator) -> bool:
    """False: a step failed, which was reported."""
    try:
        await story.tell()
    except (StepFailedError, ProblemError) as exc:
        if isinstance(exc, ProblemError) and exc.problem.code == codes.NAMESPACES_FORBIDDEN:
            raise
        _report(exc, teller, story.logs())
        return False
    finally:
        await _to_the_end(story.close())
    return True


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Do it, also when cancelled meanwhile; then the cancellation goes on."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _report(exc: Exception, teller: Narrator, logs: Iterable[tuple[str, Path]]) -> None:
    """Which step failed, and the ends of the logs."""
    teller.plain(f"\nThe demo failed after {teller.seconds:.0f} s. Step: {teller.step}")
    teller.plain(f"  {exc}")
    for who, path in logs:
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        teller.plain(f"\nThe last lines of {who}:")
        for line in lines[-TAIL:]:
            teller.plain(f"  {escaped(line)[:400]}")


async def _find_ray(ray: str) -> RayInstall:
    setting.use_options({"ray.command": "--ray"}, "demo", has_set=False)
    try:
        return await find(ray, os.environ)
    except ProblemError as exc:
        problem = exc.problem
        raise problem.code.error(
            f"the demo needs Ray: {problem.cause}",
            "install it (python3 -m venv ~/ray && ~/ray/bin/pip install 'ray[default]') and run "
            "`rayfwd demo --ray ~/ray/bin/ray`; in a checkout, `make demo` does both",
        ) from None
