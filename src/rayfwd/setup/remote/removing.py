"""One machine is taken out: what `add` has done, undone, last first."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from pathlib import Path

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.setup.remote import install, there
from rayfwd.setup.remote.adding import (
    MAKES_NO_SENSE,
    Outcome,
    Report,
    look,
    makes_no_sense,
    no_answer_yet,
)
from rayfwd.setup.remote.calls import TakenAway
from rayfwd.setup.remote.here import Added, Head
from rayfwd.setup.remote.hosts import Host
from rayfwd.setup.remote.ssh import Failed, Machine
from rayfwd.wire import fields_from_wire

STOP_SECONDS = there.STOP_SECONDS + 60.0
"""For a daemon's stop on the machine, and what is undone after it."""


def known(head: Head, text: str) -> tuple[str, Added]:
    """The machine that is meant, by its node's name or by how it was reached.

    Raises ProblemError where none such was added.
    """
    added = head.added()
    for name, entry in added.items():
        if text in (name, entry.ssh):
            return name, entry
    names = ", ".join(added) or "none"
    raise codes.ADD_BLOCKED.error(
        f"{text} was not added from here; these were: {names}",
        "if the machine joined by itself, stop rayfwd there, then run `rayfwd forget --keep-token "
        "NAME` here",
    )


async def remove(head: Head, text: str, gone: bool, report: Report, outcome: Outcome) -> None:
    """`gone`: the machine is no more, and only what the head has of it is taken away.

    What went wrong is in the outcome.
    """
    began = time.monotonic()
    try:
        outcome.at = "find"
        name, entry = known(head, text)
        outcome.name = outcome.called = name
        if not gone:
            await _there(name, entry, outcome, report)
        await _here(head, name, outcome, report)
    except ProblemError as exc:
        outcome.problem = exc
    except Failed as exc:
        outcome.problem = codes.ADD_FAILED.error(f"{text}: {exc}", exc.remedy)
    except MAKES_NO_SENSE as exc:
        outcome.problem = makes_no_sense(text, exc)
    outcome.seconds = time.monotonic() - began


async def _there(name: str, entry: Added, outcome: Outcome, report: Report) -> None:
    """On the machine. Raises ProblemError, Failed."""
    outcome.at = "log in"
    files = (entry.identity, entry.known_hosts, entry.ssh_config)
    identity, known_hosts, config = (None if file is None else Path(file) for file in files)
    host = Host(ssh=entry.ssh, identity=identity, known_hosts=known_hosts, ssh_config=config)
    async with AsyncExitStack() as stack:
        async with outcome.slot.lent(lambda: report(name, outcome.at, no_answer_yet())):
            machine = await _connect(host, name)
            stack.callback(machine.close)
            outcome.at = "look"
            seen = await look(machine, entry.prefix, ())
        others = 0
        if seen.made is not None:
            outcome.at = "stop"
            asked = {"service": entry.service, "name": f"head-of-{name}"}
            python = f"{seen.prefix}/bin/python"
            told = await machine.call(python, there.take_away, asked, STOP_SECONDS)
            taken = fields_from_wire(TakenAway, told, "taken away")
            for line in taken.steps:
                report(name, "stop", line)
            others = 0 if entry.own_program else taken.others
        outcome.at = "uninstall"
        if others:
            report(name, "uninstall", f"{seen.prefix} stays: other machines have the same home")
            return
        for place in await install.remove(machine, seen):
            report(name, "uninstall", f"removed {place}")


async def _connect(host: Host, name: str) -> Machine:
    """Raises ProblemError."""
    try:
        return await Machine.connect(host)
    except ProblemError as exc:
        found = exc.problem
        raise found.code.error(
            found.cause,
            f"{found.remedy}; if the machine no longer exists, run `rayfwd remove --gone {name}`",
        ) from None


async def _here(head: Head, name: str, outcome: Outcome, report: Report) -> None:
    """On the head. Raises ProblemError."""
    outcome.at = "forget"
    undialled = await head.undial(name)
    keyless = head.shut_out(name)
    forgotten = await head.forget(name)
    head.remember(name, None)
    outcome.changed = True
    words = [
        "the head no longer dials it" if undialled else "",
        "its SSH key is no longer accepted" if keyless else "",
        "its name, address and ports are free" if forgotten else "",
    ]
    report(name, "forget", ", ".join(filter(None, words)) or "the head knew nothing of it")
