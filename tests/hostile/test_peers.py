"""Whoever has got to the hub, and speaks the protocol as it likes: nobody else feels it.

Each attack is bounded in memory, descriptors, bytes of log, and in what an honest worker waits
(`scene.py`).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.hostile.scene import ECHO, MEGABYTE, MEMORY, Scene
from tests.hostile.speaker import PATIENCE, Kind, Speaker, new_session, refusal, target
from tests.lab.cluster import STATE_DIR

MOST_SILENT = 64
MOST_UNPROVED = 512
MOST_LANES = 34
ACCEPTED = 400
"""Connections that the loop may have accepted in one go, before it looks at any of them."""
MOST_KEPT = 256 * MEGABYTE
"""What the hub keeps for one peer, at most (security.md)."""
EMOJI = "\U0001f600"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\n\u202e"


def test_silence(scene: Scene) -> None:
    """Connections that say nothing keep nobody out."""
    with ExitStack() as held, scene.attack(descriptors=MOST_SILENT + ACCEPTED):
        for _ in range(5 * MOST_SILENT):
            held.enter_context(scene.speaker())
        with scene.speaker() as honest:
            honest.join("beside-silence")


def test_half_frames_and_huge_lengths(scene: Scene) -> None:
    header = struct.Struct(">IQQ")
    whole = struct.pack(">I", (Kind.HELLO << 24) | 65_000) + struct.pack(">QQ", 0, 1)
    beginnings = {
        "frame_too_long": [header.pack((Kind.HELLO << 24) | 0xFFFFFF, 0, 1)],
        "frame_unknown": [header.pack((99 << 24) | 10, 0, 1), bytes([255]) * 20],
        "handshake_expected": [header.pack(Kind.PING << 24, 0, 1)],
    }
    with ExitStack() as held, scene.attack(descriptors=MOST_SILENT + 20):
        for _ in range(MOST_SILENT - 4):
            half = held.enter_context(scene.speaker())
            for byte in whole:
                half.sock.sendall(bytes([byte]))
            half.sock.sendall(b"{" * 60_000)
        for code, firsts in beginnings.items():
            for first in firsts:
                with scene.speaker() as speaker:
                    speaker.sock.sendall(first)
                    assert refusal(speaker.frame()) == code
    with scene.attack(descriptors=MOST_SILENT + ACCEPTED):
        noise = random.Random(7)
        for _ in range(200):
            with scene.speaker() as speaker, suppress(ConnectionError):
                speaker.sock.sendall(noise.randbytes(noise.randrange(1, 3000)))


@pytest.mark.parametrize(
    "name",
    ["", "head", "a" * 64, "../roster", "w\n1", ESCAPES, "w\u0131", "w1 ", "\ud800", 5, None],
)
def test_names(scene: Scene, name: Any) -> None:
    with scene.attack(), scene.speaker() as speaker:
        body = {"node": name, "key": "k" * 32, "session": speaker.session, "resumes": False}
        body |= {"lane": "interactive", "version": "1", "worker_ports": 8, "ride_through": 60}
        raw = json.dumps(body).encode()
        speaker.send(Kind.HELLO, 0, 1, raw)
        assert refusal(speaker.frame()) in {"hello_malformed", "join_bad", "name_taken"}


def test_another_key_does_not_get_the_honest_nodes_name(scene: Scene) -> None:
    with scene.attack():
        for _ in range(200):
            with scene.speaker() as speaker:
                assert refusal(speaker.greet("w1", key="x" * 32)) == "name_taken"


def test_challenges_that_nobody_answers(scene: Scene) -> None:
    """Whoever has not proved its key keeps nobody out, nor is a proof of use twice."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    fields: dict[str, Any] = {"key": public, "features": frozenset({"proof"})}
    with ExitStack() as held, scene.attack(descriptors=MOST_UNPROVED + ACCEPTED):
        for number in range(MOST_UNPROVED + 100):
            speaker = held.enter_context(scene.speaker())
            assert refusal(speaker.greet(f"n{number % 7}", **fields)) == "CHALLENGE"
        with scene.speaker() as honest:
            honest.join("beside-the-unproved")
    with scene.attack():
        for signature in ("0" * 128, "f" * 128, key.sign(b"another").hex()):
            with scene.speaker() as speaker:
                speaker.greet("prover", **fields)
                body = json.dumps({"signature": signature}).encode()
                speaker.send(Kind.PROOF, 0, 1, body)
                assert refusal(speaker.frame()) == "proof_wrong"
        for body in (b"", b"[]", b"{}", b'{"signature": 5}', b"[" * 60_000):
            with scene.speaker() as speaker:
                speaker.greet("prover", **fields)
                speaker.send(Kind.PROOF, 0, 1, body)
                assert refusal(speaker.frame()) in {"hello_malformed", "proof_malformed"}
    assert "prover" not in str(scene.daemon.status()["roster"])


def test_lanes(scene: Scene) -> None:
    with ExitStack() as held, scene.attack():
        first = held.enter_context(scene.speaker()).join("many-lanes")
        answers = Counter[str]()
        for _ in range(2 * MOST_LANES):
            lane, answer = first.another_lane(scene.hub, "many-lanes")
            held.callback(lane.sock.close)
            answers[refusal(answer)] += 1
        assert answers == {"WELCOME": MOST_LANES - 1, "lanes_full": MOST_LANES + 1}


BROKEN_MESSAGES = [
    b"",
    b"null",
    b"[" * 100_000,
    b'{"type": ' + b'{"a": ' * 50_000,
    b'"\xed\xa0\x80"',
    b'{"type": "ray", "phase": NaN}',
    b'{"type": "ray", "phase": 1e999, "version": "\\u0000"}',
    b'{"type": "conditions", "conditions": {"a": 1}}',
    b'{"type": "conditions", "conditions": [[[]]]}',
    b'{"type": "dial_back", "ports": [' + b"9" * 5000 + b"]}",
    b'{"type": "nodes", "nodes": []}',
    b'{"type": "ray_auth", "mode": "token", "token": "mine"}',
    b'{"type": "head_ray", "phase": "off"}',
    b'{"type": "' + b"x" * 60_000 + b'"}',
    b'{"type": "\\u001b]0;owned\\u0007"}',
]


def test_messages_that_are_none(scene: Scene) -> None:
    """Each is said, at most, and the session goes on; nothing of it is passed on."""
    with scene.attack(), scene.speaker() as speaker:
        speaker.join("talker")
        for turn in range(6 * len(BROKEN_MESSAGES)):
            speaker.tell(BROKEN_MESSAGES[turn % len(BROKEN_MESSAGES)])
        still_there(speaker)
    assert scene.worker.status()["state"] == scene.daemon.status()["state"]


def keep_telling(speaker: Speaker, seconds: float, bodies: Iterator[object]) -> None:
    """As many messages as the hub takes in that time."""
    end = time.monotonic() + seconds
    speaker.sock.settimeout(seconds)
    with suppress(TimeoutError):
        while time.monotonic() < end:
            speaker.tell(next(bodies))
    speaker.sock.settimeout(PATIENCE)


def test_say_again_without_end(scene: Scene) -> None:
    """24 bytes in, and much more out: not each time, and nothing piles up."""
    conditions = [
        {"code": "ray_died", "severity": "error", "subject": f"w/{i}", "cause": "x" * 2000,
         "remedy": "y" * 2000}
        for i in range(50)
    ]  # fmt: skip
    with scene.attack(memory=40 * MEGABYTE), scene.speaker() as speaker:
        speaker.join("again")
        speaker.takes_messages = False
        speaker.tell({"type": "conditions", "conditions": conditions})
        keep_telling(speaker, 6, itertools.repeat({"type": "say_again"}))
        scene.daemon.status()


def test_conditions_without_end(scene: Scene) -> None:
    """With names of its own making, and words that become longer when they are written down."""

    def bodies() -> Iterator[object]:
        for turn in itertools.count():
            yield {
                "type": "conditions",
                "conditions": [
                    {"code": f"made_up_{turn}_{i}", "severity": "error", "subject": f"w{i}",
                     "cause": EMOJI * 1900 + ESCAPES, "remedy": ESCAPES * 100}
                    for i in range(20)
                ],
            }  # fmt: skip

    with scene.attack(memory=MOST_KEPT, log=1_500_000), scene.speaker() as speaker:
        speaker.join("inventor")
        keep_telling(speaker, 6, bodies())
    names = {event["event"] for event in scene.daemon.events()}
    assert not {name for name in names if name.startswith("made_up")}


def test_plans_without_end(scene: Scene) -> None:
    """Each HELLO of another session and with other ports: few of them are written down."""
    roster = scene.head.host_path(f"{STATE_DIR}/roster.json")
    written, answers = set(), Counter[str]()
    with scene.attack():
        for turn in range(200):
            with scene.speaker() as speaker:
                answer = speaker.greet("churner", worker_ports=8 + turn % 2, session=new_session())
                answers[refusal(answer)] += 1
            written.add(roster.stat().st_mtime_ns)
    assert len(written) <= 8
    assert answers["plan_changes"] > 50


def test_names_without_end(scene: Scene) -> None:
    """Each says all that it may, and gives its name back: nothing of it stays."""
    ports = list(range(40_000, 42_000))
    with (  # listeners for ports of several names, until these are known to be gone
        scene.attack(memory=24 * MEGABYTE, descriptors=20_000, log=2_000_000),
        scene.attack(scene.worker, memory=24 * MEGABYTE, descriptors=20_000),
    ):
        began = time.monotonic()
        for turn in range(400):
            if time.monotonic() - began > 60:
                break
            with scene.speaker() as speaker:
                name = f"gone-{turn}"
                speaker.join(name, ephemeral=True, features=frozenset({"overlay", "changes"}))
                speaker.tell({"type": "ray", "phase": "up", "version": None, "python": None})
                speaker.tell({"type": "open_ports", "anew": True, "opened": ports, "closed": []})
                told = {"code": "ray_died", "severity": "error", "subject": name, "seen_by": name}
                speaker.tell(
                    {"type": "conditions", "conditions": [{**told, "cause": "", "remedy": ""}]}
                )
                speaker.send(Kind.CLOSE)
                speaker.is_cut()


def test_streams_whose_other_end_takes_nothing(scene: Scene) -> None:
    """Two names of the attacker's, so that the hub is between them: 314 MB are offered."""
    with (
        scene.attack(memory=MOST_KEPT + MEMORY),
        scene.speaker() as near,
        scene.speaker() as far,
    ):
        near.join("near")
        place = target(far.join("far").address, far.first_port)
        for number in range(1, 2401, 2):
            near.send(Kind.OPEN, number, 0, place)
            for part in range(4):
                near.send(Kind.DATA, number, part << 16, bytes(1 << 16))
            for speaker in (near, far):
                for _ in speaker.frames(0.001):
                    pass


def test_a_message_without_end(scene: Scene) -> None:
    with scene.attack(), scene.speaker() as speaker:
        speaker.join("endless")
        speaker.tell_raw(struct.pack(">I", 1 << 31) + bytes(1000))
        assert speaker.is_cut()


def test_lies_about_a_nodes_ray(scene: Scene) -> None:
    """A worker may say of itself what it likes: it is shown escaped, and cut."""
    with scene.attack(), scene.speaker() as speaker:
        speaker.join("liar", resources={f"r{i}": 1e12 for i in range(256)})
        for phase in ("up", ESCAPES, "x" * 200_000, "up"):
            speaker.tell({"type": "ray", "phase": phase, "version": ESCAPES, "python": phase})
        still_there(speaker)
        argv = [str(scene.lab.rayfwd), "status", "--config", "/home/ray/rayfwd.toml"]
        shown = scene.head.run(argv, check=False).stdout
        assert "liar" in shown
        assert "\x1b" not in shown


def still_there(speaker: Speaker) -> None:
    """The hub still answers in this session. Raises AssertionError."""
    token = time.monotonic_ns()
    speaker.send(Kind.PING, 0, token)
    for frame in speaker.frames(20):
        if frame.kind is Kind.PONG and frame.offset == token:
            return
    raise AssertionError("the session has ended")


def test_streams_to_where_nothing_is(scene: Scene) -> None:
    """They are refused, each by itself, and nothing else happens."""
    with scene.attack(), scene.speaker() as speaker:
        speaker.join("opener")
        nowhere = [target("10.1.2.3", 22), target("127.77.255.9", 22), target(scene.address, 22)]
        refused = set[int]()

        def hear(seconds: float) -> None:
            frames = speaker.frames(seconds)
            refused.update(frame.stream for frame in frames if frame.kind is Kind.RESET)

        numbers = range(1, 8001, 2)
        for number in numbers:
            speaker.send(Kind.OPEN, number, 0, nowhere[number % 3])
            if number % 200 == 1:
                hear(0.02)
        deadline = time.monotonic() + 30
        while len(refused) < len(numbers) and time.monotonic() < deadline:
            hear(0.5)
        assert refused == set(numbers)


@pytest.mark.parametrize("number", [2, 0, 1 << 40, (1 << 64) - 1])
def test_streams_with_numbers_that_are_not_ones_own(scene: Scene, number: int) -> None:
    with scene.attack(), scene.speaker() as speaker:
        speaker.join("numbers")
        speaker.send(Kind.OPEN, number, 0, target(scene.address, ECHO))
        assert speaker.is_cut()


@pytest.mark.parametrize("what", [b"", b"x", b"x" * 6, b"x" * 262_144])
def test_targets_that_are_none(scene: Scene, what: bytes) -> None:
    with scene.attack(), scene.speaker() as speaker:
        speaker.join("targets")
        speaker.send(Kind.OPEN, 1, 0, what)
        assert any(frame.kind in {Kind.RESET, Kind.CLOSE} for frame in speaker.frames(10))


def test_data_that_nobody_may_send(scene: Scene) -> None:
    """Over the credit, into the middle, with offsets that overflow: each ends the session."""
    frames = [
        (Kind.DATA, 1, 1 << 63, b"x"),
        (Kind.DATA, 1, 300 * MEGABYTE, b"x"),
        (Kind.END, 1, (1 << 64) - 1, b""),
        (Kind.ACK, 1, 1 << 62, struct.pack(">Q", 1 << 63)),
        (Kind.ACK, 1, 0, b"x"),
        (Kind.HELLO, 0, 1, b"{}"),
    ]
    with scene.attack():
        for kind, stream, offset, payload in frames:
            with scene.speaker() as speaker:
                speaker.join("breaker")
                speaker.send(Kind.OPEN, 1, 0, target(scene.address, ECHO))
                speaker.send(kind, stream, offset, payload)
                assert speaker.is_cut(), kind


def test_a_slow_reader(scene: Scene) -> None:
    """It has asked for more than it takes: what waits for it is bounded, and it is cut."""
    with scene.attack(), scene.speaker() as speaker:
        speaker.join("slow")
        endless = struct.pack(">Q", 1 << 40)
        for number in range(1, 65, 2):
            speaker.send(Kind.OPEN, number, 0, target(scene.address, ECHO))
            speaker.send(Kind.DATA, number, 0, b"!")
            speaker.send(Kind.ACK, number, 0, endless)
        time.sleep(8)  # nothing is read; it would take hundreds of megabytes
    scene.daemon.wait_event("lane_lost", 20, where={"node": "slow"})


def test_a_flood_of_connections(scene: Scene) -> None:
    with scene.attack(descriptors=MOST_SILENT + ACCEPTED):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            with suppress(OSError):
                scene.speaker().sock.close()


def test_pings_without_end(scene: Scene) -> None:
    """Answers to which nobody listens are not kept."""
    with scene.attack(), scene.speaker() as speaker:
        speaker.join("pinger")
        speaker.sock.settimeout(1)
        ping = b"".join(struct.pack(">IQQ", Kind.PING << 24, 0, k) for k in range(2000))
        end = time.monotonic() + 5
        with suppress(OSError):
            while time.monotonic() < end:
                speaker.sock.sendall(ping)


def test_forged_addresses(scene: Scene) -> None:
    """A worker's OPEN with another node's source address is no target."""
    with scene.attack(), scene.speaker() as speaker:
        speaker.join("forger", advertise=None)
        forged = target(scene.address_of("w1"), 20_050) + os.urandom(4)
        speaker.send(Kind.OPEN, 1, 0, forged)
        assert any(frame.kind is Kind.RESET for frame in speaker.frames(10))
    for address in ("255.255.255.255", "0.0.0.1", "169.254.169.254", "127.0.0.1", "224.0.0.1"):
        with scene.speaker() as speaker:
            assert refusal(speaker.greet("advertiser", advertise=address)) in {
                *("join_bad", "hello_malformed")
            }
