"""Many machines in one command: what `rayfwd add` and `rayfwd remove` share.

So many at a time, each with its steps and its end, and one line for all.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rayfwd.cli import FAULT, OK
from rayfwd.setup.remote.adding import Outcome
from rayfwd.setup.remote.slots import Slot
from rayfwd.system.logs import escaped

JOBS = 8
"""Machines that are worked on at once, unless told otherwise."""

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser, of_file: str) -> None:
    """`of_file`: what the file of `-f` has."""
    parser.add_argument("-f", "--file", metavar="FILE", type=Path, help=of_file)
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=JOBS,
        help=f"how many machines at once (default: {JOBS})",
    )


def wrong_jobs(jobs: int) -> list[str]:
    return [] if jobs >= 1 else [f"--jobs {jobs}: must be at least 1"]


async def at_once(
    machines: Sequence[T],
    called: Callable[[T], str],
    work: Callable[[T, Outcome], Awaitable[None]],
    jobs: int,
    well: str,
) -> int:
    """The exit code of all. `work` writes into its machine's outcome; `well` is said of those that
    came out well.

    Interrupted, it says of each how far it came.
    """
    slots = asyncio.Semaphore(jobs)
    outcomes = [Outcome(called(machine), slot=Slot(slots)) for machine in machines]

    async def one(machine: T, outcome: Outcome) -> None:
        await outcome.slot.take()
        try:
            await work(machine, outcome)
        finally:
            outcome.slot.leave()
        outcome.ended = True
        tell_end(outcome, well)

    try:
        await asyncio.gather(*map(one, machines, outcomes))
    except asyncio.CancelledError:
        for outcome in outcomes:
            if not outcome.ended:
                how_far = f"at `{outcome.at}`" if outcome.at else "before its first step"
                report(outcome.called, "STOPPED", f"{how_far}; run the same command again")
        summary(outcomes, well)
        raise
    return summary(outcomes, well)


def report(called: str, step: str, came: str) -> None:
    """A step that is done."""
    print(f"{escaped(called)}  {step:<9} {escaped(came)}", flush=True)


def tell_end(outcome: Outcome, well: str) -> None:
    """Of one machine."""
    if outcome.problem is None:
        report(outcome.called, "done", f"{well}, {outcome.seconds:.1f} s")
        return
    problem = outcome.problem.problem
    report(outcome.called, "FAILED", f"at `{outcome.at}`: {problem.code}: {problem.cause}")
    report(outcome.called, "", f"to do: {problem.remedy}")


def summary(outcomes: Sequence[Outcome], well: str) -> int:
    """One line for all, and the exit code."""
    ended = [outcome for outcome in outcomes if outcome.ended]
    failed = [outcome.called for outcome in ended if outcome.problem is not None]
    same = [o for o in ended if o.problem is None and not o.changed]
    stopped = len(outcomes) - len(ended)
    words = [f"{len(ended) - len(failed)} of {len(outcomes)} {well}"]
    if same:
        words.append(f"{len(same)} unchanged")
    if failed:
        words.append(f"{len(failed)} failed: {', '.join(failed)}")
    if stopped:
        words.append(f"{stopped} interrupted")
    print(escaped("; ".join(words)), flush=True)
    return FAULT if failed else OK
