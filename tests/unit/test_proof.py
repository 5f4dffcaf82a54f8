"""A node's proof of its key: what it shows, what it is worth elsewhere, and the way from the secret
that an earlier version sent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from rayfwd.cluster import identity
from rayfwd.cluster.identity import Identity
from rayfwd.hub.connection import HELLO_TIMEOUT
from rayfwd.problems import ProblemError
from rayfwd.session import checks
from rayfwd.session.frames import MAX_PAYLOAD, Frame, Kind, encode, first_frame
from rayfwd.session.handshake import PROOF, Challenge, Hello, Proof, Refusal, Welcome
from rayfwd.session.proof import Claim, NodeKey, check
from tests.unit.cluster import Cluster, SocketLane, cluster, hello_of, knock
from tests.unit.loops import log_events, of, until
from tests.unit.loops import run_on_fake_clock as run

NONCE = Challenge("0f" * 32)
OLDER = "the secret of 0.1.0".ljust(64, "!")


def greeting(hello: Hello, kind: Kind = Kind.HELLO) -> Frame:
    said = hello.encode() if kind is Kind.HELLO else checks.first_question(hello)
    frame = first_frame(bytearray(said), MAX_PAYLOAD)
    assert frame is not None
    return frame


def hello_by(who: Identity, name: str = "w1", **fields: object) -> Hello:
    return hello_of(name, key=who.public, features=frozenset({PROOF}), **fields)


class TestWhatAProofIsWorth:
    WHO = Identity.make()
    HELLO = hello_by(WHO, session="f")

    def test_it_shows_the_key(self) -> None:
        said = greeting(self.HELLO)
        claim = check(self.WHO.public, said, NONCE, self.WHO.prove(said, NONCE))
        assert claim is not None
        assert (claim.key, claim.proven) == (self.WHO.public, True)

    @pytest.mark.parametrize(
        "other",
        [
            greeting(replace(HELLO, node="w2")),
            greeting(replace(HELLO, session="10")),
            greeting(replace(HELLO, lane=hello_of("x").lane.BULK)),
            greeting(replace(HELLO, role="client")),
            greeting(replace(HELLO, advertise="203.0.113.7")),
            greeting(HELLO, Kind.CHECK),
        ],
    )
    def test_it_is_worth_nothing_for_anything_else_that_is_said(self, other: Frame) -> None:
        proof = self.WHO.prove(greeting(self.HELLO), NONCE)
        assert check(self.WHO.public, other, NONCE, proof) is None

    def test_nor_at_another_connection_or_hub_nor_for_another_key(self) -> None:
        said = greeting(self.HELLO)
        proof = self.WHO.prove(said, NONCE)
        assert check(self.WHO.public, said, Challenge("f0" * 32), proof) is None
        assert check(Identity.make().public, said, NONCE, proof) is None

    def test_a_key_that_is_none(self) -> None:
        said = greeting(self.HELLO)
        for public in ("", "zz" * 32, "00" * 5):
            assert check(public, said, NONCE, Proof("00" * 64)) is None

    def test_it_shows_the_older_secret_and_does_not_hold_it(self) -> None:
        who = replace(self.WHO, older=OLDER)
        said = greeting(self.HELLO)
        proof = who.prove(said, NONCE)
        claim = check(who.public, said, NONCE, proof)
        assert claim is not None
        assert claim.knows(hashlib.sha256(OLDER.encode()).hexdigest())
        assert not claim.knows(hashlib.sha256(b"another").hexdigest())
        assert OLDER not in proof.encode().decode(errors="replace")

    def test_keys_are_not_shown(self) -> None:
        who = replace(self.WHO, older=OLDER)
        assert OLDER not in repr(who)
        assert who.key.to_text() not in repr(who)


class TestTheFile:
    def test_it_is_made_once_and_private(self, tmp_path: Path) -> None:
        path = tmp_path / "node.key"
        first = identity.kept(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert identity.kept(path).public == first.public
        assert first.older is None
        assert len(path.read_text().splitlines()) == 1

    def test_the_secret_of_an_earlier_version_is_kept_beside_a_new_key(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "node.key"
        path.write_text(OLDER + "\n")
        first = identity.kept(path)
        assert first.older == OLDER
        again = identity.kept(path)
        assert (again.public, again.older) == (first.public, OLDER)

    @pytest.mark.parametrize("text", ["", "short", "ed25519:", "ed25519:zz\n"])
    def test_what_is_no_key_of_any_version_is_replaced(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "node.key"
        path.write_text(text)
        assert identity.kept(path).older is None
        assert NodeKey.from_text(path.read_text().strip()).public == identity.kept(path).public

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "node.key").mkdir()
        with pytest.raises(ProblemError) as caught:
            identity.kept(tmp_path / "node.key")
        assert caught.value.problem.code.name == "node_key_unusable"


async def said_by(lane: SocketLane) -> Frame | None:
    """The next frame of the hub's; None: it has closed."""
    async with asyncio.timeout(2 * HELLO_TIMEOUT):
        frame = await lane.answer
    lane.answer = asyncio.get_running_loop().create_future()
    further = first_frame(lane._buffer, MAX_PAYLOAD)  # it came together with that
    if further is not None or lane.closed.done():
        lane.answer.set_result(further)
    return frame


async def challenge_of(lane: SocketLane) -> Challenge:
    frame = await said_by(lane)
    assert frame is not None
    return Challenge.decode(frame)


async def result(lane: SocketLane) -> str:
    """How it ends: `welcome`, the code of a refusal, or nothing."""
    frame = await said_by(lane)
    lane.close()
    await lane.closed
    if frame is None:
        return ""
    if frame.kind is Kind.REFUSE:
        return Refusal.decode(frame).problem.code.name
    Welcome.decode(frame)
    return "welcome"


async def come(c: Cluster, who: Identity, hello: Hello) -> str:
    """Say hello, and prove it where that is asked for."""
    lane = await knock(c.hub.socket.path, hello.encode())
    if PROOF in hello.features:
        challenge = await challenge_of(lane)
        lane.write([who.prove(greeting(hello), challenge).encode()])
    return await result(lane)


def record(c: Cluster, name: str = "w1") -> dict[str, str]:
    nodes = json.loads((c.hub.socket.path.parent / "roster.json").read_text())["nodes"]
    (found,) = [node for node in nodes if node["plan"]["name"] == name]
    return dict(found)


class TestAtTheHub:
    def test_who_proves_its_key_is_known_by_it(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c:
                who = Identity.make()
                assert await come(c, who, hello_by(who)) == "welcome"
                assert record(c)["public_key"] == who.public
                assert who.key.to_text() not in (tmp_path / "roster.json").read_text()
                assert await come(c, who, hello_by(who)) == "welcome"

        run(main)

    def test_a_hello_that_was_stolen_is_worth_nothing(self, tmp_path: Path) -> None:
        """All that ever went over a lane, said again on another: word for word, without the
        feature, with the proof of another lane, with another key's."""

        async def main() -> None:
            async with cluster(tmp_path) as c:
                who, thief = Identity.make(), Identity.make()
                hello = hello_by(who)
                lane = await knock(c.hub.socket.path, hello.encode())
                stolen = who.prove(greeting(hello), await challenge_of(lane))
                lane.write([stolen.encode()])
                assert await result(lane) == "welcome"
                for proof in (stolen, thief.prove(greeting(hello), NONCE)):
                    lane = await knock(c.hub.socket.path, hello.encode())
                    assert await challenge_of(lane) != NONCE
                    lane.write([proof.encode()])
                    assert await result(lane) == "proof_wrong"
                # Both frames in one write: the hub's nonce is not known yet.
                lane = await knock(c.hub.socket.path, hello.encode() + stolen.encode())
                await challenge_of(lane)
                assert await result(lane) == "proof_wrong"
                # As a version would that sends its secret.
                assert await come(c, who, replace(hello, features=frozenset())) == "name_taken"
                assert await come(c, thief, hello_by(thief)) == "name_taken"
                assert record(c)["public_key"] == who.public

        run(main)

    def test_nor_does_it_join_a_session_that_stands(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c:
                who = Identity.make()
                hello = hello_by(who)
                lane = await knock(c.hub.socket.path, hello.encode())
                lane.write([who.prove(greeting(hello), await challenge_of(lane)).encode()])
                assert (await said_by(lane) or NONE).kind is Kind.WELCOME
                for stolen in (hello, replace(hello, features=frozenset())):
                    thief = await knock(c.hub.socket.path, stolen.encode())
                    if PROOF in stolen.features:
                        await challenge_of(thief)
                        thief.write([Proof("00" * 64).encode()])
                    assert await result(thief) in {"proof_wrong", "name_taken"}
                mux = c.hub.nodes["w1"].mux
                assert mux is not None
                assert len(mux.lanes) == 1
                lane.close()
                await lane.closed

        run(main)

    def test_an_earlier_versions_secret_is_good_once(self, tmp_path: Path) -> None:
        """The worker was upgraded after its head: it proves the secret that the roster has the
        digest of, and from then on that secret is worth nothing."""

        async def main() -> None:
            async with cluster(tmp_path) as c:
                before = hello_of("w1", key=OLDER)
                assert await come(c, Identity.make(), before) == "welcome"
                assert record(c)["public_key"] is None
                plan = record(c)["plan"]
                stranger = Identity(NodeKey.make(), "another secret".ljust(64))
                assert await come(c, stranger, hello_by(stranger)) == "name_taken"
                who = Identity(NodeKey.make(), OLDER)
                assert await come(c, who, hello_by(who)) == "welcome"
                assert (record(c)["public_key"], record(c)["plan"]) == (who.public, plan)
                assert await come(c, who, hello_of("w1", key=OLDER)) == "name_taken"
                thief = Identity(NodeKey.make(), OLDER)
                assert await come(c, thief, hello_by(thief)) == "name_taken"
                assert await come(c, who, hello_by(replace(who, older=None))) == "welcome"

        run(main)

    def test_an_upgrade_in_the_middle_of_a_session(self, tmp_path: Path) -> None:
        """The worker's new process goes on with its session. Its first lane shows the secret, which
        it forgets then: all further ones go by the key."""

        async def main() -> None:
            async with cluster(tmp_path) as c:
                before = hello_of("w1", key=OLDER)
                stands = await knock(c.hub.socket.path, before.encode())
                assert (await said_by(stands) or NONE).kind is Kind.WELCOME
                who = Identity(NodeKey.make(), OLDER)
                hello = replace(hello_by(who), session=before.session, resumes=True)
                assert await come(c, who, hello) == "welcome"
                assert record(c)["public_key"] == who.public
                who = replace(who, older=None)
                assert await come(c, who, hello) == "welcome"
                assert await come(c, who, replace(before, resumes=True)) == "name_taken"
                thief = Identity(NodeKey.make(), OLDER)
                stolen = replace(hello_by(thief), session=before.session, resumes=True)
                assert await come(c, thief, stolen) == "name_taken"
                stands.close()
                await stands.closed

        run(main)

    def test_a_head_that_was_an_earlier_version_for_a_while(self, tmp_path: Path) -> None:
        """That knows a public key as it knows secrets; it is proved from the next hello on."""

        async def main() -> None:
            async with cluster(tmp_path) as c:
                who = Identity.make()
                c.roster.join("w1", who.public, 40, None)
                assert await come(c, who, hello_by(who)) == "welcome"
                assert record(c)["public_key"] == who.public

        run(main)

    def test_a_worker_of_an_earlier_version_works_with_this_hub(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                assert c.hub.nodes["w1"].state == "up"
                assert record(c)["public_key"] is None

        run(main)

    def test_a_clients_session_is_its_own_too(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c:
                who = Identity.make()
                hello = hello_by(who, "laptop", role="client", worker_ports=0)
                lane = await knock(c.hub.socket.path, hello.encode())
                lane.write([who.prove(greeting(hello), await challenge_of(lane)).encode()])
                assert (await said_by(lane) or NONE).kind is Kind.WELCOME
                thief = replace(hello, features=frozenset(), resumes=True)
                assert await come(c, who, thief) == "session_unknown"
                assert len(c.hub.clients) == 1
                lane.close()
                await lane.closed

        run(main)

    def test_who_does_not_answer_is_dropped(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c:
                who = Identity.make()
                lane = await knock(c.hub.socket.path, hello_by(who).encode())
                await challenge_of(lane)
                assert await result(lane) == "hello_missing"
                assert not c.hub.gate.pending._challenged

        run(main)

    def test_who_takes_its_hello_back_is_let_go(self, tmp_path: Path) -> None:
        async def main() -> None:
            with log_events() as log:
                async with cluster(tmp_path) as c:
                    lane = await knock(c.hub.socket.path, hello_by(Identity.make()).encode())
                    await challenge_of(lane)
                    lane.write([encode(Kind.CLOSE, payload=b"it stops")])
                    assert await result(lane) == ""
                    assert not c.hub.nodes
            assert of(log, "lane_refused") == []

        run(main)

    def test_many_that_do_not_answer_keep_nobody_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("rayfwd.hub.pending.MAX_CHALLENGED", 8)

        async def main() -> None:
            async with cluster(tmp_path) as c:
                lanes = []
                for _ in range(20):
                    lane = await knock(c.hub.socket.path, hello_by(Identity.make()).encode())
                    await challenge_of(lane)
                    lanes.append(lane)
                await until(lambda: sum(lane.closed.done() for lane in lanes) == 12)
                assert all(lane.closed.done() for lane in lanes[:12]), "the oldest make room"
                who = Identity.make()
                assert await come(c, who, hello_by(who)) == "welcome"
                for lane in lanes[12:]:
                    lane.abort("enough")
                    await lane.closed

        run(main)

    @pytest.mark.parametrize(
        "answer",
        [b"", b"{}", b"[]", b'{"signature": 5}', b'{"signature": "00"}', b"\xff", b"[" * 9000],
    )
    def test_an_answer_that_is_none(self, tmp_path: Path, answer: bytes) -> None:
        async def main() -> None:
            async with cluster(tmp_path) as c:
                lane = await knock(c.hub.socket.path, hello_by(Identity.make()).encode())
                await challenge_of(lane)
                lane.write([encode(Kind.PROOF, 0, 1, answer)])
                assert await result(lane) == "hello_malformed"

        run(main)


NONE = Frame(Kind.CLOSE, 0, 0, b"")


def test_a_claim_by_a_secret_is_no_claim_to_a_public_key() -> None:
    who = Identity.make()
    assert not Claim(who.public).proven
