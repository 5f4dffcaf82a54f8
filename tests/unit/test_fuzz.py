"""Every decoder of what comes from outside, fed with anything: it gives its value or its own error,
and nothing else, in memory and time that its input pays for.

What was found once is kept, in tests/fuzz/corpus/TARGET, and tried first; hypothesis makes more of
it by changing it. RAYFWD_FUZZ=deep, or a number, tries far more (docs/developing.md).
"""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayfwd.cluster.plan import NodePlan
from rayfwd.daemon import handover
from rayfwd.hub import roster
from rayfwd.hub.roster import Record
from rayfwd.network.held_dials import syns
from rayfwd.problems import ProblemError
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.ray.token import RayAuth
from rayfwd.session import checks, messages, snapshot
from rayfwd.session.checks import CheckReply
from rayfwd.session.frames import (
    MAX_PAYLOAD,
    Frame,
    FrameDecoder,
    Kind,
    MessageDecoder,
    ProtocolError,
    first_frame,
)
from rayfwd.session.handshake import (
    MAX_HANDSHAKE,
    PROTOCOL_VERSION,
    Challenge,
    Hello,
    Proof,
    Refusal,
    Vouch,
    Welcome,
)
from rayfwd.session.lane import LaneClass
from rayfwd.session.preamble import Preamble
from rayfwd.session.session import Limits, Session
from rayfwd.session.snapshot import SnapshotError
from rayfwd.session.target import Opening
from rayfwd.status import Status
from rayfwd.watch import conditions

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
PROFILE = os.environ.get("RAYFWD_FUZZ", "ci")
EXAMPLES = {"ci": 40, "deep": 3_000}.get(PROFILE) or int(PROFILE)
"""Inputs of each target."""
MEMORY_FACTOR, MEMORY_ROOM = 100, 8 << 20
"""Bytes of memory that an input may take: for each of its own, and besides. A number of JSON's that
has two bytes takes some thirty, an empty object sixty."""
SECONDS, SECONDS_A_BYTE = 2.0, 5e-5
"""Of processor time: a hundred times what it takes on a slow machine."""


@dataclass(frozen=True, slots=True)
class Fuzzed:
    """A decoder."""

    decode: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    """Its own."""


def _frames(data: bytes) -> None:
    """In pieces, as a lane brings them: the first byte says how long."""
    decoder, step = FrameDecoder(), 1 + (data[0] if data else 0)
    for at in range(0, len(data), step):
        for frame in decoder.feed(data[at : at + step]):
            assert frame.size <= MAX_PAYLOAD
    assert decoder.held <= len(data)


def _of(kind: Kind, decode: Callable[[Frame], object]) -> Callable[[bytes], object]:
    return lambda data: decode(Frame(kind, 0, PROTOCOL_VERSION, data))


def _session(data: bytes) -> None:
    """A whole one, of the hub's side, which is asked what it has to say besides."""
    session = Session("hub", 60.0, Limits(streams=64), 0.0)
    lane, _ = session.lane_up(LaneClass.INTERACTIVE, 0.0)
    for at in range(0, len(data), 500):
        session.receive(lane, data[at : at + 500], 1.0)
        session.data_to_send(lane, 1 << 16, 1.0)
    session.check_invariants()


def _preamble(data: bytes) -> None:
    preamble = Preamble()
    for at in range(0, len(data), 7):
        preamble.feed(data[at : at + 7])
    preamble.quoted()


def _message(data: bytes) -> None:
    message = messages.decode(data)
    if isinstance(message, messages.Conditions):
        conditions.from_message(message, "w1")
    if message is not None:
        messages.encode(message)


def _restored(data: bytes) -> None:
    """A session of a snapshot that is damaged may be odd, and harms nobody."""
    Session.from_snapshot(snapshot.load(data), 5.0)


def _json(decode: Callable[[Any], object]) -> Callable[[bytes], object]:
    def decode_text(data: bytes) -> object:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return decode(value)

    return decode_text


def _plan(value: Any) -> object:
    return NodePlan.from_wire(value) if isinstance(value, dict) else None


def _roster(data: bytes) -> object:
    path = Path(os.environ["RAYFWD_FUZZ_FILE"])
    path.write_bytes(data)
    return roster.read(path)


TARGETS = {
    "frames": Fuzzed(_frames, (ProtocolError,)),
    "first_frame": Fuzzed(
        lambda data: first_frame(bytearray(data), MAX_HANDSHAKE), (ProtocolError,)
    ),
    "session": Fuzzed(_session, (ProtocolError,)),
    "control": Fuzzed(lambda data: MessageDecoder().feed(data), (ProtocolError,)),
    "message": Fuzzed(_message, (ValueError,)),
    "hello": Fuzzed(_of(Kind.HELLO, Hello.decode), (ProtocolError,)),
    "vouch": Fuzzed(_of(Kind.VOUCH, Vouch.decode), (ProtocolError,)),
    "welcome": Fuzzed(_of(Kind.WELCOME, Welcome.decode), (ProtocolError,)),
    "refusal": Fuzzed(_of(Kind.REFUSE, Refusal.decode), (ProtocolError,)),
    "challenge": Fuzzed(_of(Kind.CHALLENGE, Challenge.decode), (ProtocolError,)),
    "proof": Fuzzed(_of(Kind.PROOF, Proof.decode), (ProtocolError,)),
    "opening": Fuzzed(Opening.decode, (ValueError,)),
    "copied_packets": Fuzzed(lambda data: list(syns(data)), ()),
    "preamble": Fuzzed(_preamble, (ValueError,)),
    "checkup": Fuzzed(_of(Kind.CHECK, checks.read_hello), (ProtocolError,)),
    "checkup_question": Fuzzed(
        _of(Kind.CHECK, lambda frame: checks.read_size(checks.read(frame))), (ProtocolError,)
    ),
    "checkup_answer": Fuzzed(_of(Kind.CHECK, CheckReply.decode), (ProtocolError,)),
    "snapshot": Fuzzed(snapshot.load, (SnapshotError,)),
    "handover": Fuzzed(lambda data: handover.opened(data, [], "head", "h"), (SnapshotError,)),
    "handover_session": Fuzzed(_restored, (SnapshotError,)),
    "roster": Fuzzed(_roster, (ProblemError,)),
    "roster_record": Fuzzed(_json(Record.from_wire), (ValueError,)),
    "plan": Fuzzed(_json(_plan), (ValueError,)),
    "status": Fuzzed(_json(Status.from_wire), (ValueError,)),
    "status_answer": Fuzzed(_json(Status.from_answer), (ProblemError,)),
    "cluster_report": Fuzzed(_json(ClusterReport.from_wire), (ValueError,)),
    "ray_auth": Fuzzed(_json(RayAuth.from_wire), (ValueError,)),
}


@pytest.fixture(autouse=True, scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """For the decoder that reads one."""
    os.environ["RAYFWD_FUZZ_FILE"] = str(tmp_path_factory.mktemp("fuzz") / "roster.json")
    yield
    del os.environ["RAYFWD_FUZZ_FILE"]


def kept(target: str) -> list[Path]:
    return sorted((CORPUS / target).glob("*"))


def try_one(target: str, data: bytes) -> None:
    """Its value or its own error, in bounds."""
    fuzzed = TARGETS[target]
    tracemalloc.start()
    began = time.process_time()
    try:
        fuzzed.decode(data)
    except fuzzed.errors as exc:
        str(exc)
    finally:
        took, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak <= MEMORY_FACTOR * len(data) + MEMORY_ROOM, f"{peak} bytes for {len(data)}"
    assert took <= SECONDS + SECONDS_A_BYTE * len(data)


# -- what is tried ---------------------------------------------------------------------------------


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**400, 1e308]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "\ud800", "\u2028", "\x00", "\x1b[2J", "é" * 300, "x" * 70_000, "bytes"]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """The same tree, but in one place, which may be deep in it."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 5)):
            return {k: v for k, v in value.items() if k != key}
        return value | {key: draw(changed_json(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(changed_json(value[index])), *value[index + 1 :]]
    return draw(VALUES)


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, spliced, repeated or overwritten somewhere."""
    for _ in range(draw(st.integers(1, 4))):
        begin, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        middle = draw(
            st.one_of(
                st.binary(max_size=24),
                st.sampled_from([b"", data[begin:end] * 2, b"\xff" * 8, b"\x00" * 20, b"[" * 9000]),
            )
        )
        data = (data[:begin] + middle + data[end:])[: 1 << 20]
    return data


@st.composite
def inputs(draw: st.DrawFn, target: str) -> bytes:
    """Something kept, changed; or anything."""
    seeds = [path.read_bytes() for path in kept(target)]
    if not seeds or not draw(st.integers(0, 7)):
        return draw(st.binary(max_size=2000))
    seed = draw(st.sampled_from(seeds))
    if draw(st.booleans()):
        try:
            return json.dumps(draw(changed_json(json.loads(seed)))).encode()
        except (ValueError, RecursionError):
            pass  # it is no JSON
    return draw(changed_bytes(seed))


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_kept(target: str) -> None:
    assert kept(target), f"tests/fuzz/corpus/{target} has nothing to begin with"
    for path in kept(target):
        try_one(target, path.read_bytes())


def test_nothing_is_kept_for_a_decoder_that_is_gone() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.timeout(60 if EXAMPLES < 1000 else 3600)
@pytest.mark.parametrize("target", TARGETS)
def test_anything(target: str) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(inputs(target))
    def fuzz(data: bytes) -> None:
        try_one(target, data)

    fuzz()
