"""The session under faults: seeded random schedules of everything that can go wrong on lanes."""

from __future__ import annotations

import os

import pytest

from rayfwd.session import frames
from rayfwd.session.events import Event
from rayfwd.session.frames import ProtocolError
from rayfwd.session.lane import LaneClass
from rayfwd.session.numbers import StreamNumbers
from rayfwd.session.scheduler import Scheduler
from rayfwd.session.session import Limits, Session
from rayfwd.session.snapshot import Tree
from rayfwd.session.states import StreamState
from rayfwd.session.stream import ReceiveSide, SendSide, Stream
from tests.unit.wire import Wire

SCHEDULES = int(os.environ.get("RAYFWD_SCHEDULES", "750"))
"""How many; a deep run sets 100,000 and more. `make test` does as many others with the compiled
code (package/test_compiled.py)."""
BATCHES = 20

TINY = Limits(
    window=2000,
    window_ceiling=16000,
    window_budget=30000,
    stream_buffer=3000,
    session_buffer=40000,
    streams=400,
)
ROOMY = Limits()


def run_schedule(seed: int) -> Wire:
    # In half of each kind short payloads come in chunks too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "LONG", 1 if seed // 6 % 2 else frames.LONG)
        return _run_schedule(seed)


def _run_schedule(seed: int) -> Wire:
    wire = Wire(seed, TINY if seed % 3 else ROOMY)
    for kind in (LaneClass.INTERACTIVE, LaneClass.BULK)[: 1 + seed % 2]:
        wire.add_lane(kind)
    for _ in range(wire.random.choice((20, 150, 600))):
        wire.step()
    wire.heal()
    wire.check()
    wire.finish()
    wire.heal()
    wire.check()
    return wire


@pytest.mark.timeout(60 + SCHEDULES // BATCHES)  # a schedule takes some 0.01 s
@pytest.mark.parametrize("batch", range(BATCHES))
def test_what_went_in_comes_out(batch: int) -> None:
    first = int(os.environ.get("RAYFWD_FIRST_SEED", "0"))
    for seed in range(first + batch, first + SCHEDULES, BATCHES):
        try:
            run_schedule(seed)
        except Exception as exc:
            raise AssertionError(f"schedule of seed {seed}: {exc!r}") from exc


def test_the_schedules_hand_sessions_over() -> None:
    assert sum(run_schedule(seed).handovers for seed in range(10)) > 10


def _nothing_lost(_self: SendSide, _lane: int) -> bool:
    return False


def _no_probe(_self: SendSide) -> bool:
    return False


def _drops_early(_self: ReceiveSide, _offset: int, _payload: bytes) -> None:
    return


def _forgets_gaps(self: StreamNumbers, number: int) -> None:
    self._highest = max(self._highest, number)


def _counts_nothing_freed(self: SendSide, offset: int, limit: int) -> int:
    SEND_ACKNOWLEDGE(self, offset, limit)
    return 0


def _stands_in_no_queue(self: Scheduler, stream: Stream) -> None:
    if stream.state is not StreamState.RESETTING:
        ENQUEUE(self, stream)


def _keeps_waiting(_self: Session) -> list[Event]:
    return []


def _forgets_what_was_read(self: ReceiveSide) -> Tree:
    return {**SNAPSHOT(self), "consumed": 0}


def _forgets_a_gap(self: Session) -> Tree:
    return {**SESSION_SNAPSHOT(self), "peer_gaps": []}


def _forgets_half_a_message(self: Session) -> Tree:
    return {**SESSION_SNAPSHOT(self), "message": b""}


def _joins_segments(self: SendSide) -> Tree:
    """What is sent again is cut otherwise than it was."""
    tree = SEND_SNAPSHOT(self)
    whole = [segment for segment in tree["unacked"] if not segment[2]]
    if len(whole) > 1:
        joined = b"".join(segment[1] for segment in whole)
        tree["unacked"] = [[whole[0][0], joined[:-1], False], *tree["unacked"][len(whole) :]]
    return tree


SNAPSHOT, SEND_SNAPSHOT = ReceiveSide.snapshot, SendSide.snapshot
SESSION_SNAPSHOT = Session.snapshot
SEND_ACKNOWLEDGE, ENQUEUE = SendSide.acknowledge, Scheduler.enqueue


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (ReceiveSide, "snapshot", _forgets_what_was_read),
        (Session, "snapshot", _forgets_a_gap),
        (Session, "snapshot", _forgets_half_a_message),
        (SendSide, "snapshot", _joins_segments),
        (SendSide, "acknowledge", _counts_nothing_freed),
        (Scheduler, "enqueue", _stands_in_no_queue),
        (SendSide, "lane_lost", _nothing_lost),
        (ReceiveSide, "_keep_early", _drops_early),
        (StreamNumbers, "note_peers", _forgets_gaps),
        (Session, "drained", _keeps_waiting),
    ],
)
def test_the_model_sees_a_fault_that_was_planted(
    where: type, name: str, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probes are off: they mend most of what else may be wrong, only late."""
    monkeypatch.setattr(SendSide, "probe", _no_probe)
    monkeypatch.setattr(where, name, fault)
    monkeypatch.setattr(Wire, "PATIENCE", 400)
    assert any(_fails(seed) for seed in range(100))


def _fails(seed: int) -> bool:
    try:
        run_schedule(seed)
    except (AssertionError, ProtocolError):
        return True
    return False
