"""Descriptors and disk that run out end nothing, and are there again when their taker has gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from rayfwd.problems import ProblemError
from rayfwd.system.control import ask
from tests.hostile.scene import ECHO, Scene
from tests.hostile.speaker import Kind, refusal, target
from tests.lab.cluster import RUNTIME_DIR, STATE_DIR
from tests.lab.machines import Lab

DESCRIPTORS = 1024
"""What a login has, where nobody has changed it."""


@pytest.fixture(scope="module")
def poor(module_lab: Lab) -> Iterator[Scene]:
    """A head with few descriptors and little disk."""
    made = Scene(module_lab, under=["prlimit", f"--nofile={DESCRIPTORS}"])
    made.head.run(["mkdir", "-m", "700", STATE_DIR])
    options = "size=1m,mode=700,uid=4242,gid=4242"
    made.head.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", STATE_DIR], user="root")
    made.start()
    yield made
    made.stop()


def works(scene: Scene) -> None:
    """It says how it is, and takes a worker in."""
    assert scene.daemon.status()["role"] == "head"
    with scene.speaker() as speaker:
        speaker.join("a-worker")


def is_ready(scene: Scene) -> None:
    """Soon after."""
    scene.daemon.wait_status(lambda status: status["state"] == "ready", 60)


def test_streams_that_want_more_than_there_are(poor: Scene) -> None:
    with poor.attack(descriptors=DESCRIPTORS), poor.speaker() as speaker:
        speaker.join("greedy")
        place = target(poor.address, ECHO)
        with suppress(ConnectionError):  # it does not read meanwhile, and may be cut for that
            for number in range(1, 4 * DESCRIPTORS, 2):
                speaker.send(Kind.OPEN, number, 0, place)
            for _ in speaker.frames(3):
                pass
        works(poor)
    is_ready(poor)


def test_connections_that_want_more_than_there_are(poor: Scene) -> None:
    with poor.attack(descriptors=DESCRIPTORS), ExitStack() as held:
        for _ in range(2 * DESCRIPTORS):
            with suppress(OSError):
                held.enter_context(poor.speaker())
        works(poor)
    is_ready(poor)


def test_nodes_that_want_more_listeners_than_there_are(poor: Scene) -> None:
    """One more is refused, as long as those stand that have come; new connections go on."""
    with poor.attack(descriptors=DESCRIPTORS), ExitStack() as held:
        for number in range(DESCRIPTORS // 12):
            speaker = held.enter_context(poor.speaker())
            if (answer := refusal(speaker.greet(f"many-{number}"))) != "WELCOME":
                break
        assert answer == "listeners_full"
        poor.daemon.wait_status(has_all_listeners, 60)
        assert not poor.honest.for_a_while().failed
        ledger = poor.daemon.status()["ledger"]
        taken = sum(user["listeners"] for user in ledger["users"])
        assert ledger["bounds"]["listeners"] == DESCRIPTORS * 3 // 4 >= taken > 500
    is_ready(poor)


def has_all_listeners(status: dict[str, Any]) -> bool:
    """Of every node of the plan."""
    rows = [row["listeners"] for row in status["roster"] if row["role"] == "worker"]
    return all(row["open"] and not row["blocked"] for row in rows)


def test_a_disk_that_is_full(poor: Scene) -> None:
    control = poor.head.host_path(f"{RUNTIME_DIR}/control.sock")
    with poor.speaker() as known:
        known.join("known")
    try:
        with poor.attack():
            fill = f"dd if=/dev/zero of={STATE_DIR}/filled bs=4k 2>/dev/null; true"
            poor.head.run(["sh", "-c", fill])
            with poor.speaker() as stranger:
                assert refusal(stranger.greet("stranger")) == "roster_unwritable"
            with poor.speaker() as known:
                known.join("known")
                known.tell({"type": "ray", "phase": "up", "version": None, "python": None})
            with pytest.raises(ProblemError) as caught:
                ask(control, "forget", {"name": "known"})
            assert caught.value.problem.code.name == "roster_unwritable"
            assert "known" in str(poor.daemon.status()["roster"])
            poor.head.run(["rm", f"{STATE_DIR}/filled"])
            works(poor)
        is_ready(poor)
    finally:
        poor.head.run(["rm", "-f", f"{STATE_DIR}/filled"])


def test_a_stream_of_ends(poor: Scene) -> None:
    """Streams that are opened and given up again leave nothing."""
    with poor.attack(descriptors=DESCRIPTORS), poor.speaker() as speaker:
        speaker.join("fickle")
        place = target(poor.address, ECHO)
        for number in range(1, 4001, 2):
            speaker.send(Kind.OPEN, number, 0, place)
            speaker.send(Kind.RESET, number, 1, b"changed my mind")
            if number % 200 == 1:
                for _ in speaker.frames(0.02):
                    pass
        works(poor)
    is_ready(poor)
