"""Every decoder, given what is nearly right: it takes it, or says what is wrong as it promises.

`tests/fixtures/corpus/` has a directory for each, with what is right, and with every input by which
a fault was found: a file that is put there is tried as it is, and damaged. What is damaged how
follows from a seed. RAYFWD_DAMAGE is how often for each decoder; a deep run has a million.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from rayfwd.cluster.plan import NodePlan, head_plan
from rayfwd.daemon.worker_plan import plans_of
from rayfwd.hub import roster
from rayfwd.problems import ProblemError
from rayfwd.ray import nodes
from rayfwd.ray.cluster_report import ClusterReport
from rayfwd.ray.token import RayAuth
from rayfwd.session import checks, messages, snapshot
from rayfwd.session.frames import (
    HEADER_SIZE,
    MAX_PAYLOAD,
    Frame,
    FrameDecoder,
    ProtocolError,
    first_frame,
)
from rayfwd.session.handshake import Challenge, Hello, Proof, Refusal, Welcome
from rayfwd.session.lane import LaneClass
from rayfwd.session.preamble import Preamble
from rayfwd.session.proof import NodeKey
from rayfwd.session.session import Limits, Session
from rayfwd.session.snapshot import SnapshotError
from rayfwd.session.target import Opening
from rayfwd.status import Status

CORPUS = Path(__file__).parents[1] / "fixtures" / "corpus"
TURNS = int(os.environ.get("RAYFWD_DAMAGE", "400"))
"""How often each decoder is given something."""
SEED = int(os.environ.get("RAYFWD_DAMAGE_SEED", "1"))

NETWORK = "127.77.0.0/16"
HEAD = head_plan("h", NETWORK, 20000, 8, {"gcs": 6379, "dashboard": 8265, "client": 10001})

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1 << 31, 1 << 64, 10**400, 0.5, 1e308, float("inf"), float("nan")),
    *("", "x" * 70_000, "\ud800", "\x00", "\x1b[2J", "127.0.0.1", "999.1.1.1", "1" * 5000),
    *([], {}, [[]], {"": {}}, [None] * 3),
]
"""What may stand in the place of any value."""


def frames(data: bytes) -> None:
    """As they come over a lane, in pieces; and what a session makes of them."""
    decoder, rest = FrameDecoder(), data
    session = Session("hub", 60.0, Limits(), 0.0)
    lane, _ = session.lane_up(LaneClass.INTERACTIVE, 0.0)
    with suppress(ProtocolError):
        while rest:
            piece, rest = rest[:97], rest[97:]
            decoder.feed(piece)
            assert decoder.held <= HEADER_SIZE + MAX_PAYLOAD
    with suppress(ProtocolError):
        session.receive(lane, data, 1.0)
        session.data_to_send(lane, 1 << 18, 1.0)
        session.tick(2.0)


def handshake(data: bytes) -> None:
    for of in (Hello, Challenge, Proof, Welcome, Refusal):
        with suppress(ProtocolError):
            frame = _first(data)
            if frame is not None:
                of.decode(frame)


def check(data: bytes) -> None:
    """A doctor's questions, and what it is answered."""
    read: tuple[Callable[[Frame], Any], ...] = (
        checks.read_hello,
        checks.CheckReply.decode,
        lambda frame: checks.read_size(checks.read(frame)),
        lambda frame: checks.read_time(checks.read(frame)),
    )
    for of in read:
        with suppress(ProtocolError):
            frame = _first(data)
            if frame is not None:
                of(frame)


def _first(data: bytes) -> Frame | None:
    return first_frame(bytearray(data), MAX_PAYLOAD)


def message(data: bytes) -> None:
    """A control message, and what those who hear it read of it."""
    with suppress(ValueError):
        told = messages.decode(data)
        if told is not None:
            messages.encode(told)
        match told:
            case messages.Nodes():
                plans_of(told.nodes)
            case messages.Cluster():
                ClusterReport.from_wire(told.report)
            case messages.Auth():
                RayAuth.from_wire(told.to_wire())


def handover(data: bytes) -> None:
    """A process's legacy: the tree, and the sessions in it."""
    with suppress(SnapshotError):
        Session.from_snapshot(snapshot.load(data), 9.0)


def kept(data: bytes) -> None:
    """The roster on the head's disk."""
    path = Path(os.environ["RAYFWD_DAMAGE_FILE"])
    path.write_bytes(data)
    with suppress(ProblemError):
        records, _ = roster.read(path)
        settled = roster.settle(records, HEAD, NETWORK, 20000)
        assert len({record.plan.address for record in settled.records}) == len(settled.records)


def _as_json(of: Callable[[Any], Any]) -> Callable[[bytes], None]:
    def decode(data: bytes) -> None:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return
        with suppress(ValueError):
            of(value)

    return decode


def opening(data: bytes) -> None:
    with suppress(ValueError):
        Opening.decode(data)


def preamble(data: bytes) -> None:
    """What a login shell prints, before `rayfwd attach` begins."""
    with suppress(ValueError):
        skip = Preamble()
        for begin in range(0, len(data), 31):
            skip.feed(data[begin : begin + 31])


def secret(data: bytes) -> None:
    """A node's key on its disk."""
    with suppress(ValueError):
        NodeKey.from_text(data.decode("latin-1"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "handshake": handshake,
    "check": check,
    "message": message,
    "handover": handover,
    "roster": kept,
    "status": _as_json(Status.from_wire),
    "plan": _as_json(NodePlan.from_wire),
    "report": _as_json(ClusterReport.from_wire),
    "token": _as_json(RayAuth.from_wire),
    "nodes": _as_json(nodes.parse),
    "opening": opening,
    "preamble": preamble,
    "key": secret,
}
"""By the name of its corpus."""


def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


@pytest.fixture(autouse=True)
def _a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFWD_DAMAGE_FILE", str(tmp_path / "roster.json"))


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_kept(name: str) -> None:
    """Nothing but what a decoder says that it raises, which it is tried here without harm."""
    for data in corpus(name):
        TARGETS[name](data)


@pytest.mark.timeout(max(60, TURNS // 50))
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_damaged(name: str) -> None:
    right = corpus(name)
    for turn in range(TURNS):
        data = damaged(random.Random(f"{SEED} {name} {turn}"), right)
        try:
            TARGETS[name](data)
        except BaseException as exc:
            exc.add_note(f"{name}, turn {turn} of seed {SEED}: {data[:2000]!r}")
            raise


def test_there_is_a_corpus_for_each() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


def damaged(rng: random.Random, right: list[bytes]) -> bytes:
    """One of those that are right, with some things wrong."""
    data = rng.choice(right)
    if rng.random() < 0.5 and (changed := _inside(rng, data)) is not None:
        return changed
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        data = rng.choice(_WAYS)(rng, data)
        if rng.random() < 0.1:
            data += rng.choice(right)
    return data[: 1 << 20]


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    return (
        data[:at] + bytes([rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])]) + data[at + 1 :]
    )


def _leave_out(rng: random.Random, data: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:begin] + data[end:]


def _put_in(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 8, 300])) + data[at:]


def _twice(rng: random.Random, data: bytes) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[begin:end] + data[end:]


_WAYS: list[Callable[[random.Random, bytes], bytes]] = [_flip, _flip, _leave_out, _put_in, _twice]


def _inside(rng: random.Random, data: bytes) -> bytes | None:
    """With another value somewhere in its JSON, and the frame or snapshot around it as long as it
    says. None: there is none in it."""
    begin, end = data.find(b"{"), data.rfind(b"}") + 1
    try:
        value = json.loads(data[begin:end])
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice([1, 1, 3])):
        value = _changed(rng, value)
    text = json.dumps(value).encode()
    return _with_length(data[:begin], len(text)) + text + data[end:]


def _with_length(before: bytes, length: int) -> bytes:
    if len(before) == HEADER_SIZE:
        return before[:1] + struct.pack(">I", length)[1:] + before[4:]
    if before.startswith(snapshot.MAGIC):
        return before[:-8] + struct.pack(">Q", length)
    return before


def _changed(rng: random.Random, value: Any) -> Any:
    places = list(_places(value))
    if not places:
        return _odd(rng)
    holder, key = rng.choice(places)
    if rng.random() < 0.2:
        del holder[key]
    elif rng.random() < 0.2 and isinstance(holder, dict):
        holder[rng.choice(["", "x" * 200, "\x1b"])] = _odd(rng)
    else:
        holder[key] = _odd(rng)
    return value


def _odd(rng: random.Random) -> Any:
    return deepcopy(rng.choice(ODD))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items):
            yield value, key
            yield from _places(inner)
