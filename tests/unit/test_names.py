"""Who is who: a node by its SSH key, names that are given back, and room for more."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.daemon import names as names_module
from rayfwd.hub import clash
from rayfwd.hub.clash import IN_USE_SECONDS, is_live
from rayfwd.hub.roster import Roster
from rayfwd.problems import ProblemError
from rayfwd.session.frames import Frame, Kind, encode, first_frame
from rayfwd.session.handshake import Hello, Refusal, Vouch, Welcome
from rayfwd.system.paths import SECRET
from tests.need import tool
from tests.unit.cluster import answer_to, cluster, hello_of
from tests.unit.daemons import site
from tests.unit.loops import run as run_in_real_time
from tests.unit.loops import run_on_fake_clock as run
from tests.unit.loops import until
from tests.unit.real_sshd import RealSshd

OWN = NodePlan("head", "head", "127.77.0.1", 20000, 40, False, {"gcs": 6379})


def roster(path: Path, port_base: int = 20000) -> Roster:
    return Roster(path / "roster.json", replace(OWN, base=port_base), "127.77.0.0/24", port_base)


# -- the SSH key is who it is


def test_a_machine_made_anew_has_its_name_address_and_ports_by_its_ssh_key(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as c:
            w1 = await c.worker("w1")
            before = dict(w1.welcome.node) if w1.welcome is not None else {}
            secret = c.hub.socket.path.with_name(SECRET)
            assert secret.stat().st_mode & 0o777 == 0o600
            vouch = Vouch("w1", secret.read_text().strip()).encode()
            anew = hello_of("w1", key="another key of the node w1, as made anew")

            clone = await answer_to(c.hub.socket.path, vouch + anew.encode())
            assert isinstance(clone, Refusal), "no two live machines under one name"
            assert clone.problem.code == codes.NAME_IN_USE
            await w1.close()

            stranger = await answer_to(c.hub.socket.path, anew.encode())
            assert isinstance(stranger, Refusal)
            assert stranger.problem.code == codes.NAME_TAKEN
            other = Vouch("w2", vouch_secret(vouch)).encode()
            assert (
                refusal(await answer_to(c.hub.socket.path, other + anew.encode()))
                == codes.NAME_TAKEN
            )
            forged = Vouch("w1", "0" * 64).encode()
            assert (
                refusal(await answer_to(c.hub.socket.path, forged + anew.encode()))
                == codes.VOUCH_WRONG
            )

            welcome = await answer_to(c.hub.socket.path, vouch + anew.encode())
            assert isinstance(welcome, Welcome)
            assert dict(welcome.node) == before
            again = replace(anew, session=f"{int(anew.session, 16) + 1:x}")
            assert isinstance(await answer_to(c.hub.socket.path, again.encode()), Welcome)

    run(main)


OURS, OTHERS = (f"SHA256:{letter * 43}" for letter in "ab")
"""Fingerprints of SSH keys."""


def by_key(path: Path, ssh_key: str) -> bytes:
    """What `rayfwd attach` says first where sshd tells the key, and its line names no node."""
    return Vouch(None, path.with_name(SECRET).read_text().strip(), ssh_key).encode()


def test_a_machine_made_anew_is_known_by_the_key_that_sshd_tells(tmp_path: Path) -> None:
    """Though no line names it: by the key with which that node came last, unless others have it."""

    async def main() -> None:
        async with cluster(tmp_path) as c:
            path = c.hub.socket.path
            first = hello_of("w1")
            welcome = await answer_to(path, by_key(path, OURS) + first.encode())
            assert isinstance(welcome, Welcome)
            anew = hello_of("w1", key="another key of the node w1, as made anew")

            async def tried(first: bytes, hello: Hello = anew) -> object:
                answer = await answer_to(path, first + hello.encode())
                return answer.problem.code if isinstance(answer, Refusal) else dict(answer.node)  # type: ignore[union-attr]

            assert await tried(by_key(path, OURS)) == codes.NAME_IN_USE, "it was heard just now"
            await asyncio.sleep(IN_USE_SECONDS)
            assert await tried(b"") == codes.NAME_TAKEN
            assert await tried(by_key(path, OTHERS)) == codes.NAME_TAKEN
            assert await tried(by_key(path, OURS)) == dict(welcome.node)

            for name in ("w2", "w3"):
                assert isinstance(await tried(by_key(path, OTHERS), hello_of(name)), dict)
            await asyncio.sleep(IN_USE_SECONDS)
            other = hello_of("w2", key="another key of the node w2, as made anew")
            assert await tried(by_key(path, OTHERS), other) == codes.NAME_TAKEN, "w3 has it too"

    run(main)


def test_a_real_sshd_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `ExposeAuthInfo yes`, and a forced command that names no node."""
    monkeypatch.setattr(clash, "IN_USE_SECONDS", 0.0)

    async def come(sshd: RealSshd, hello: Hello) -> Frame | None:
        argv = [tool("ssh"), "-F", "none", "-i", str(sshd.identity), "-p", str(sshd.port)]
        argv += ["-o", f"UserKnownHostsFile={tmp_path}/known", f"{sshd.user}@127.0.0.1"]
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(hello.encode())
        said = bytearray()
        while (frame := first_frame(said, 1 << 20)) is None:
            said += await process.stdout.read(65536)
        process.stdin.close()
        process.kill()
        await process.wait()
        return frame

    async def main() -> None:
        async with cluster(tmp_path) as c:
            sshd = RealSshd(tmp_path / "sshd")
            attach = f"{sys.executable} -m rayfwd attach --socket {c.hub.socket.path}"
            sshd.authorize(f'restrict,command="{attach}" {sshd.public_key}')
            (tmp_path / "known").write_text(sshd.known_hosts_line())
            # Whoever tests may have a shell that does much in its own home.
            await sshd.start("ExposeAuthInfo yes", f"SetEnv HOME={tmp_path}")
            try:
                welcome = await come(sshd, hello_of("w1"))
                await until(lambda: not is_live(c.hub.nodes["w1"]))
                anew = hello_of("w1", key="another key of the node w1, as made anew")
                again = await come(sshd, anew)
            finally:
                await sshd.stop()
            assert welcome is not None
            assert again is not None
            assert Welcome.decode(again).node == Welcome.decode(welcome).node

    run_in_real_time(main)


def test_the_ssh_key_of_a_worker_is_kept(tmp_path: Path) -> None:
    first = roster(tmp_path)
    first.join("w1", "k" * 32, 40, None, ssh_key=OURS)
    first.join("w1", "k" * 32, 40, None)
    again = roster(tmp_path)
    assert again.came_by("w1", OURS), "once told, it is known where sshd tells none"
    assert not again.came_by("w1", None)
    assert not again.came_by("w2", OURS)
    again.join("w1", "k" * 32, 40, None, ssh_key=OTHERS)
    assert not again.came_by("w1", OURS), "it has a new one"
    path = tmp_path / "roster.json"
    path.write_text(path.read_text().replace(OTHERS, "SHA256:x"))
    assert [plan.name for plan in roster(tmp_path).plans()] == ["head"], "no fingerprint"


def vouch_secret(vouch: bytes) -> str:
    frame = first_frame(bytearray(vouch), 1 << 16)
    assert frame is not None
    return str(json.loads(frame.payload)["secret"])


def refusal(answer: Welcome | Refusal | None) -> object:
    assert isinstance(answer, Refusal)
    return answer.problem.code


@pytest.mark.runs("rayfwd attach --node *")
def test_it_is_who_it_is_through_attach_itself(tmp_path: Path) -> None:
    """As sshd starts it, with pipes that it passes on."""

    async def main() -> None:
        async with cluster(tmp_path) as c:
            w1 = await c.worker("w1")
            before = dict(w1.welcome.node) if w1.welcome is not None else {}
            await w1.close()
            argv = [sys.executable, "-m", "rayfwd", "attach", "--socket", str(c.hub.socket.path)]
            process = await asyncio.create_subprocess_exec(
                *(*argv, "--node", "w1"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(hello_of("w1", key="made anew".ljust(40, ".")).encode())
            said = bytearray()
            while (frame := first_frame(said, 1 << 20)) is None:
                said += await process.stdout.read(65536)
            assert dict(Welcome.decode(frame).node) == before
            process.kill()
            await process.wait()

    run_in_real_time(main)


def attach(tmp_path: Path, hello: bytes, *words: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "rayfwd", "attach", "--socket", str(tmp_path / "hub.sock")]
    ran = subprocess.run([*argv, *words], input=hello, capture_output=True, timeout=60)
    return ran.returncode, ran.stderr.decode()


def test_a_key_that_names_a_node_is_for_no_other(tmp_path: Path) -> None:
    code, said = attach(tmp_path, hello_of("w2").encode(), "--node", "w1")
    assert code == 1
    assert said.startswith("rayfwd attach: key_of_another: this SSH key is for the node w1, but")
    assert "--name w1" in said


@pytest.mark.parametrize(
    "hello", [hello_of("w2").encode()[:-9], b"", b"[" * 4000, b"SSH-2.0-x\r\n"]
)
def test_a_key_that_names_a_node_brings_nothing_of_which_it_is_not_known_whose_it_is(
    tmp_path: Path, hello: bytes
) -> None:
    """The rest of a hello might come when only the hub reads it."""
    code, said = attach(tmp_path, hello, "--node", "w1")
    assert code == 1
    assert said.startswith("rayfwd attach: hello_missing: this SSH key is for the node w1, and")


def test_a_key_that_names_a_node_is_for_the_hubs_own_user(tmp_path: Path) -> None:
    code, said = attach(tmp_path, hello_of("w1").encode(), "--node", "w1")
    assert code == 1
    assert said.startswith("rayfwd attach: hub_not_permitted: ")


@pytest.mark.runs("rayfwd attach --client")
def test_a_key_for_clients_is_for_no_node(tmp_path: Path) -> None:
    code, said = attach(tmp_path, hello_of("w1").encode(), "--client")
    assert code == 1
    assert said.startswith("rayfwd attach: client_only: ")


def test_what_attach_says_first_is_what_the_hub_reads(tmp_path: Path) -> None:
    from rayfwd.cli.attach import _node_of, _vouch  # what sshd starts

    (tmp_path / SECRET).write_text("ab" * 32 + "\n")
    frame = first_frame(bytearray(_vouch("w1", tmp_path / "hub.sock")), 1 << 16)
    assert frame is not None
    assert Vouch.decode(frame) == Vouch("w1", "ab" * 32)
    assert _node_of(hello_of("w1").encode()) == "w1"
    client = Hello(node="x", key="k" * 32, version="0", worker_ports=0, role="client")
    assert _node_of(client.encode()) is None
    assert _node_of(encode(Kind.PING, 0, 1, b"")) is None
    assert "secret" not in repr(Vouch("w1", "ab" * 32)).partition("node")[2]


def test_attach_says_which_ssh_key_it_was_where_sshd_tells(tmp_path: Path) -> None:
    from rayfwd.cli.attach import ssh_key  # what sshd starts

    public = "AAAAC3NzaC1lZDI1NTE5AAAAIJzJoNlLhWyxaXIAOsI4xl+mCjF1hRWJ8HVkhzpt0G40"
    file = tmp_path / "auth"
    environ = {"SSH_USER_AUTH": str(file)}
    assert ssh_key({}) is None
    assert ssh_key(environ) is None, "the file is not there"
    file.write_text(f"publickey ssh-ed25519 {public}\nkeyboard-interactive\n")
    key = tmp_path / "key.pub"
    key.write_text(f"ssh-ed25519 {public} w1\n")
    shown = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True)
    assert ssh_key(environ) == shown.stdout.split()[1]
    for broken in ("publickey ssh-ed25519 %%%\n", "publickey\n", "password\n", ""):
        file.write_text(broken)
        assert ssh_key(environ) is None


def test_the_ledger_has_the_ssh_key_that_a_node_came_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through attach itself, with a line that names no node."""
    (tmp_path / "auth").write_text("publickey ssh-ed25519 AAAA\n")
    monkeypatch.setenv("SSH_USER_AUTH", str(tmp_path / "auth"))
    from rayfwd.cli.attach import ssh_key

    async def main() -> None:
        async with cluster(tmp_path) as c:
            for name, words in (("w1", ()), ("w2", ("--node", "w2"))):
                hello = hello_of(name).encode()
                argv = [
                    sys.executable,
                    "-m",
                    "rayfwd",
                    "attach",
                    "--socket",
                    str(c.hub.socket.path),
                ]
                process = await asyncio.create_subprocess_exec(
                    *(*argv, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                assert process.stdin is not None
                process.stdin.write(hello)
                await until(lambda name=name: name in c.hub.nodes)  # type: ignore[misc]
                process.kill()
                await process.wait()
            keys = {row.name: row.key for row in c.hub.ledger.accounts()}
            assert keys == dict.fromkeys(("w1", "w2"), ssh_key(os.environ))

    run_in_real_time(main)


# -- names are given back


def test_a_name_that_was_away_for_long_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(names_module, "RETURN_SECONDS", 0.0)

    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            await s.start()
            await s.workers["w1"].stop()
            await until(lambda: s.head.peer("w1").state == "down")
            await asyncio.sleep(names_module.NAMES_INTERVAL + 5)
            clock[0] += 2592000 + 3700
            w2 = s.workers["w2"]
            await until(lambda: w2.role.node.view.node_named("w1") is None, 200)
            assert [r["name"] for r in (await s.head.ask("status"))["roster"]] == ["head", "w2"]

    run(main, 400)


def test_an_ephemeral_node_that_went_while_no_head_ran_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time in which it may still come: as w1, which is one too, and w3, which is none."""

    async def main() -> None:
        async with site(tmp_path, "w1", "w2", "w3") as s:
            for name in ("w1", "w2"):
                s.workers[name].more = "ephemeral = true"
                s.workers[name].write()
            await s.start()
            await s.head.stop()
            await s.workers["w2"].stop()
            await s.workers["w3"].stop()
            await s.head.start()
            await asyncio.sleep(names_module.RETURN_SECONDS - names_module.NAMES_INTERVAL)
            there = {row["name"] for row in (await s.head.ask("status"))["roster"]}
            assert there == {"head", "w1", "w2", "w3"}
            await asyncio.sleep(2 * names_module.NAMES_INTERVAL)
            there = {row["name"] for row in (await s.head.ask("status"))["roster"]}
            assert there == {"head", "w1", "w3"}

    run(main, 900)


def test_when_a_worker_was_seen_is_kept(tmp_path: Path) -> None:
    first = roster(tmp_path)
    first.join("w1", "k" * 32, 40, None)
    first.join("w2", "k" * 32, 40, None)
    assert first.away_for(60, 1e9) == [], "what is not known is not counted"
    first.note_seen({"w1"}, 1000.0)
    first.note_seen({"w1"}, 2000.0)
    again = roster(tmp_path)
    assert again.away_for(900, 2000.0) == ["w2"]
    again.join("w2", "k" * 32, 48, None)
    assert again.away_for(900, 2000.0) == ["w2"], "a place that changes says nothing of it"
    again.join("w2", "k" * 32, 48, None, ephemeral=True)
    assert roster(tmp_path).for_a_while() == ["w2"]
    again.join("w2", "k" * 32, 48, None)
    assert roster(tmp_path).for_a_while() == []


@pytest.mark.parametrize("seen", ['"x"', "true", "-1", "1e300"])
def test_a_time_that_is_none_is_damage(tmp_path: Path, seen: str) -> None:
    kept = roster(tmp_path)
    kept.join("w1", "k" * 32, 40, None)
    path = tmp_path / "roster.json"
    path.write_text(path.read_text().replace('"seen": 0', f'"seen": {seen}'))
    assert [plan.name for plan in roster(tmp_path).plans()] == ["head"]


def test_that_there_is_little_room_is_said_before_it_is_full(tmp_path: Path) -> None:
    """Soon after each node that comes or goes for good, and of the last one that it was."""

    async def main() -> None:
        async with site(tmp_path, "w1", "w2", "w3") as s:
            s.head.place = f"port_base = {32768 - 3 * 16}"
            s.head.write()
            await s.head.start()
            board = s.head.role.node.board

            def said() -> list[str]:
                return [c.problem.cause for c in board.conditions if c.code is nearly]

            nearly = codes.PLAN_NEARLY_FULL
            begins = "there are addresses and ports for"
            for words, name in (("only 2 more workers", "w1"), ("only 1 more worker", "w2")):
                wanted = [f"{begins} {words} as large as the largest"]
                await until(functools.partial(lambda wanted: said() == wanted, wanted))
                await s.workers[name].start()
            await until(lambda: "for no more worker as" in said()[0], 5)
            await s.workers["w3"].start()
            health = s.workers["w3"].runtime.health
            await until(lambda: [c.code for c in health.waiting_for()] == [codes.PLAN_FULL])
            await s.workers["w1"].stop()
            await s.head.ask("forget", name="w1", keep_token=True)
            await s.workers["w3"].ready()

    run(main)


def test_how_many_more_there_is_room_for(tmp_path: Path) -> None:
    nearly = roster(tmp_path, 32768 - 4 * 48)
    assert nearly.room(5) == (3, "plan")
    nearly.join("w1", "k" * 32, 40, None)
    assert nearly.room(5) == (2, "plan")
    nearly.join("w2", "k" * 32, 40, None)
    nearly.join("w3", "k" * 32, 40, None)
    assert nearly.room(5) == (0, "plan")
    with pytest.raises(ProblemError) as exc:
        nearly.join("w4", "k" * 32, 40, None)
    assert exc.value.problem.code == codes.PLAN_FULL
    assert roster(tmp_path / "other").room(5) == (5, "plan")
