"""HELLO, WELCOME and REFUSE: what is said comes back, and nothing that comes in can hurt."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfwd import codes
from rayfwd.session.frames import Frame, Kind, ProtocolError, encode
from rayfwd.session.handshake import PROTOCOL_VERSION, Hello, Refusal, Welcome
from rayfwd.session.lane import LaneClass

HELLO = Hello(
    node="gpu-1",
    key="k" * 32,
    session="0f",
    resumes=True,
    lane=LaneClass.BULK,
    version="0.1.0",
    worker_ports=76,
    advertise="203.0.113.7",
    ride_through=90.0,
    ray="2.60.0",
    python="3.11.7",
    resources={"CPU": 4.0, "GPU": 0.5},
)
WELCOME = Welcome(
    version="0.1.0",
    node={"name": "gpu-1"},
    nodes=({"name": "head"}, {"name": "gpu-1"}),
    network="127.77.0.0/16",
    ride_through=90.0,
    ray=None,
    python="3.11.7",
    features=frozenset({"dial_back"}),
    ray_auth={"mode": "token", "token": "sesame"},
)
REFUSAL = Refusal(codes.NAME_TAKEN.problem("the name is taken", "choose another"))


def frame_of(data: bytes) -> Frame:
    return Frame(Kind(data[0]), 0, int.from_bytes(data[12:20], "big"), data[20:])


def hello_with(**fields: Any) -> Frame:
    body = json.loads(HELLO.encode()[20:])
    body.update(fields)
    return Frame(Kind.HELLO, 0, PROTOCOL_VERSION, json.dumps(body).encode())


def code(frame: Frame, kind: type[Hello | Welcome | Refusal] = Hello) -> str:
    with pytest.raises(ProtocolError) as caught:
        kind.decode(frame)
    return caught.value.code.name


@pytest.mark.parametrize("said", [HELLO, WELCOME, REFUSAL])
def test_what_is_said_comes_back(said: Hello | Welcome | Refusal) -> None:
    assert type(said).decode(frame_of(said.encode())) == said


def test_a_later_version_may_add_keys() -> None:
    assert Hello.decode(hello_with(colour="blue")) == HELLO


def test_an_older_hub_has_no_features_and_says_nothing_of_rays_token() -> None:
    body = json.loads(WELCOME.encode()[20:])
    del body["features"], body["ray_auth"]
    older = Welcome.decode(Frame(Kind.WELCOME, 0, PROTOCOL_VERSION, json.dumps(body).encode()))
    assert older == replace(WELCOME, features=frozenset(), ray_auth=None)


BAD_FEATURES: list[Any] = [None, "dial_back", {}, [5], [""], ["x" * 65], ["x"] * 65]
BAD_AUTH: list[Any] = [5, "token", [], [{"mode": "off"}]]


@pytest.mark.parametrize(
    "fields", [*({"features": f} for f in BAD_FEATURES), *({"ray_auth": a} for a in BAD_AUTH)]
)
def test_a_welcome_whose_further_keys_are_malformed(fields: dict[str, Any]) -> None:
    body = json.loads(WELCOME.encode()[20:]) | fields
    frame = Frame(Kind.WELCOME, 0, PROTOCOL_VERSION, json.dumps(body).encode())
    assert code(frame, Welcome) == "welcome_malformed"


def test_rays_token_is_not_shown() -> None:
    assert "sesame" not in repr(WELCOME)


def test_another_protocol_version_is_told_apart_and_its_refusal_is_understood() -> None:
    assert code(Frame(Kind.HELLO, 0, 2, b"{}")) == "protocol_version"
    assert code(Frame(Kind.WELCOME, 0, 2, b"{}"), Welcome) == "protocol_version"
    payload = REFUSAL.encode()[20:]
    assert Refusal.decode(Frame(Kind.REFUSE, 0, 99, payload)) == REFUSAL


@pytest.mark.parametrize("kind", [Kind.WELCOME, Kind.PING, Kind.DATA, Kind.REFUSE])
def test_another_frame_than_hello_is_refused(kind: Kind) -> None:
    assert code(Frame(kind, 0, PROTOCOL_VERSION, b"{}")) == "handshake_expected"


BAD = "\ud800"
"""JSON may hold half of a pair of surrogates; no byte string can."""


TEXTS: list[object] = ["", 5, None, [], "x" * 200]
BAD_FIELDS: dict[str, list[object]] = {
    "node": [*TEXTS, BAD],
    "key": [*TEXTS, BAD * 20],
    "version": [*TEXTS, BAD],
    "session": ["", "xyz", "f" * 65, 5, None],
    "lane": ["fast", "", None, 5, []],
    "worker_ports": [0, -1, 1e9, "40", None, True, float("nan"), []],
    "ride_through": [0, float("inf"), float("nan"), "60", None, 10**400],
    "resources": [
        [], "CPU", None, {"CPU": "many"}, {"CPU": None}, {"CPU": 10**400}, {"CPU": float("nan")},
        {"CPU": float("inf")}, {BAD: 1}, {str(i): 1 for i in range(300)},
    ],
    "advertise": [5, BAD],
    "ray": [["2.60"], BAD],
    "python": [BAD],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, some in BAD_FIELDS.items() for value in some]
)
def test_a_bad_field_is_a_malformed_hello(key: str, value: object) -> None:
    assert code(hello_with(**{key: value})) == "hello_malformed"


@pytest.mark.parametrize("key", ["node", "key", "session", "resumes", "lane", "worker_ports"])
def test_a_missing_field_is_a_malformed_hello(key: str) -> None:
    body = json.loads(HELLO.encode()[20:])
    del body[key]
    assert code(frame_of(encode(Kind.HELLO, 0, 1, json.dumps(body).encode()))) == "hello_malformed"


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[]", b"null", b"5", b"\xff", b"[" * 60000, b"1" * 5000, b'{"node":']
)
def test_bytes_that_are_no_object_are_malformed(payload: bytes) -> None:
    assert code(Frame(Kind.HELLO, 0, 1, payload)) == "hello_malformed"
    assert code(Frame(Kind.WELCOME, 0, 1, payload), Welcome) == "welcome_malformed"
    assert code(Frame(Kind.REFUSE, 0, 1, payload), Refusal) == "refusal_malformed"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*json.loads(HELLO.encode()[20:]), "nodes"]), values))
def test_any_values_decode_or_are_malformed(fields: dict[str, Any]) -> None:
    broken = set()
    for kind, base in ((Hello, HELLO), (Welcome, WELCOME), (Refusal, REFUSAL)):
        data = base.encode()
        body = json.dumps({**json.loads(data[20:]), **fields}).encode()
        try:
            kind.decode(Frame(Kind(data[0]), 0, 1, body))
        except ProtocolError as exc:
            broken.add(exc.code.name)
    assert broken <= {"hello_malformed", "welcome_malformed", "refusal_malformed"}


@given(st.sampled_from(Kind), st.integers(0, 2), st.binary(max_size=60))
def test_any_payload_decodes_or_is_refused(kind: Kind, offset: int, payload: bytes) -> None:
    known = {"handshake_expected", "protocol_version", f"{kind.name.lower()}_malformed"}
    for what in (Hello, Welcome):
        assert code(Frame(kind, 0, offset, payload), what) in known
