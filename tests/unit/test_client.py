"""A client over a real SSH server in this process: what it reaches, what not, and how it heals."""

from __future__ import annotations

import argparse
import asyncio
import socket
import tomllib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayfwd import client as client_module
from rayfwd import codes
from rayfwd.cli import MistakeError, attach, connect
from rayfwd.cli import main as rayfwd
from rayfwd.client import Client, Place, addresses
from rayfwd.config import ConfigError, parse
from rayfwd.hub import gate as gate_module
from rayfwd.problems import ProblemError
from rayfwd.session import messages
from rayfwd.session.checks import first_question
from rayfwd.session.frames import Kind, encode
from rayfwd.session.handshake import Hello, Refusal, Welcome
from rayfwd.session.target import Target
from rayfwd.transport import link as link_module
from tests.unit import daemons
from tests.unit.cluster import Cluster, answer_to, cluster, echo, goodbye, hello_of, serving
from tests.unit.loops import run_on_fake_clock as run
from tests.unit.loops import until
from tests.unit.ports import free_port
from tests.unit.ssh_server import Sshd


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"REDIAL_FIRST": 0.05, "REDIAL_PARKED": 0.1, "REDIAL_LAST": 0.2}.items():
        monkeypatch.setattr(link_module, name, seconds)
    monkeypatch.setattr(client_module, "RETRY_FIRST", 0.05)


@pytest.fixture
def ports() -> list[int]:
    """Free ports of 127.0.0.1."""
    return [free_port(), free_port()]


class Site:
    """A head with hub and sshd, and a client of it."""

    def __init__(self, directory: Path, ports: Sequence[int], **head: Any) -> None:
        self.directory = directory
        self.sshd = Sshd(directory)
        self.head = Cluster(directory)
        self.said: list[str] = []
        self._ports = ports
        self._fields = head
        self.running: asyncio.Task[None] | None = None

    async def start_head(self) -> None:
        ports = frozenset({8265, 10001, 8000})
        self.head.offered = replace(self.head.offered, client_ports=ports)
        await self.head.start()

    async def start(self, hub: bool = True, **further: Any) -> None:
        if hub:
            await self.start_head()
        await self.sshd.start()
        (self.directory / "ssh_config").write_text("")
        head = {
            "ssh": f"ray@127.0.0.1:{self.sshd.port}",
            "identity": str(self.sshd.identity),
            "known_hosts": str(self.sshd.known_hosts),
            "ssh_config": str(self.directory / "ssh_config"),
            "socket": str(self.head.hub.socket.path),
        }
        data = {
            "role": "client",
            "name": "laptop",
            "state_dir": str(self.directory / "state"),
            "head": head | self._fields,
            "client": {"dashboard_port": self._ports[0], "client_port": self._ports[1]},
            **further,
        }
        self.running = asyncio.create_task(Client(parse(data), self.said.append).run())

    async def connected(self) -> None:
        await until(lambda: "Ctrl-C ends it." in self.said, 10, lambda: f"{self.said}")

    async def restart_hub(self) -> None:
        """It knows no session after this."""
        await self.head.close()
        self.head = Cluster(self.directory)
        await self.start_head()

    async def close(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        await self.head.close()
        await self.sshd.stop()


@asynccontextmanager
async def site(directory: Path, ports: Sequence[int], **head: Any) -> AsyncIterator[Site]:
    made = Site(directory, ports, **head)
    try:
        yield made
    finally:
        await made.close()


async def passes(place: int | Target) -> bool:
    """A connection there (a port is of 127.0.0.1) brings back what is sent."""
    where = Target("127.0.0.1", place) if isinstance(place, int) else place
    reader, writer = await asyncio.open_connection(*where)
    writer.write(b"hello")
    writer.write_eof()
    try:
        return await reader.read() == b"hello"
    except ConnectionError:
        return False
    finally:
        await goodbye(writer)


def test_dashboard_client_and_forward_are_here(tmp_path: Path, ports: list[int]) -> None:
    async def main() -> None:
        async with site(tmp_path, ports) as s:
            third = free_port()
            await s.start(forward=[{"listen": f"127.0.0.1:{third}", "to": "head:8000"}])
            await s.connected()
            for port, at_head in zip([*ports, third], (8265, 10001, 8000), strict=True):
                async with serving(echo, Target(s.head.address, at_head)):
                    assert await passes(port)
            assert not await passes(ports[0]), "nothing listens at the head's"
            (client,) = s.head.hub.clients.values()
            assert (client.name, client.state, len(s.head.roster.plans())) == ("laptop", "up", 1)

    run(main)


def test_a_cut_is_ridden_through_and_a_restart_of_the_hub_survived(
    tmp_path: Path, ports: list[int]
) -> None:
    async def main() -> None:
        async with site(tmp_path, ports) as s:
            await s.start()
            await s.connected()
            async with serving(echo, Target(s.head.address, 8265)):
                reader, writer = await asyncio.open_connection("127.0.0.1", ports[0])
                writer.write(b"before ")
                assert await reader.readexactly(7) == b"before "
                s.sshd.cut()
                writer.write(b"after")
                assert await reader.readexactly(5) == b"after"
                assert [c.link_stats.cuts for c in s.head.hub.clients.values()] == [1]
                await goodbye(writer)
                await s.restart_hub()
                await until(lambda: s.said[-1].endswith("connected again"), 10, lambda: f"{s.said}")
                assert await passes(ports[0])

    run(main)


def test_a_restart_of_the_head_hands_its_connections_over(tmp_path: Path, ports: list[int]) -> None:
    async def main() -> None:
        socket_ = str(tmp_path / "daemons/head/run/hub.sock")
        (tmp_path / "daemons").mkdir()
        async with (
            daemons.site(tmp_path / "daemons") as real,
            site(tmp_path, ports, socket=socket_) as s,
        ):
            await real.start()
            await s.start(hub=False)
            await s.connected()
            own = real.head.role.node.view.own
            assert own is not None
            async with serving(echo, Target(own.address, 8265)):
                reader, writer = await asyncio.open_connection("127.0.0.1", ports[0])
                writer.write(b"before ")
                assert await reader.readexactly(7) == b"before "
                await real.head.restart()
                writer.write(b"after")
                assert await reader.readexactly(5) == b"after"
                (client,) = real.head.runtime.health.now().clients or ()
                seen = (client.name, client.state, client.cuts)
                assert seen == ("laptop", "up", 1)
                await goodbye(writer)

    run(main)


def test_the_token_is_written_and_not_told(tmp_path: Path, ports: list[int]) -> None:
    async def main() -> None:
        async with site(tmp_path, ports) as s:
            auth = {"mode": "token", "token": "sesame"}
            s.head.offered = replace(s.head.offered, ray_auth=auth)
            await s.start()
            await s.connected()
            (path,) = (tmp_path / "state").rglob("ray_token")
            assert path.read_text() == "sesame\n"
            assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (
                0o600,
                0o700,
            )
            assert f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={path}" in s.said
            assert not any("sesame" in line for line in s.said)
            # As the head does it: lanes that come after it are told the same.
            auth = {"mode": "token", "token": "open"}
            s.head.offered = replace(s.head.offered, ray_auth=auth)
            s.head.hub.tell_all(messages.Auth(**auth), True)
            await until(lambda: path.read_text() == "open\n")

    run(main)


def test_a_hub_that_is_not_there_yet_is_awaited(tmp_path: Path, ports: list[int]) -> None:
    async def main() -> None:
        async with site(tmp_path, ports) as s:
            await s.start(hub=False)
            await until(lambda: s.said, 10)
            assert s.said[0].startswith("hub_absent: nothing answers at ")
            await s.start_head()
            await s.connected()

    run(main)


def test_what_waiting_does_not_mend_ends_it(tmp_path: Path, ports: list[int]) -> None:
    async def main() -> None:
        async with site(tmp_path, ports, known_hosts="/dev/null") as s:
            await s.start()
            assert s.running is not None
            with pytest.raises(ProblemError, match="is not in /dev/null; compare"):
                await s.running

    run(main)


class TestTheHub:
    """What it lets a client do."""

    @pytest.mark.parametrize(
        ("who", "port"), [("head", 6379), ("head", 20001), ("w1", None), ("w1", 8265)]
    )
    def test_other_ports_are_not_for_clients(
        self, tmp_path: Path, who: str, port: int | None
    ) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                c.offered = replace(c.offered, client_ports=frozenset({8265}))
                client = await c.worker("laptop", role="client", worker_ports=0)
                assert client.welcome is not None
                assert client.welcome.node == {}
                assert [node["name"] for node in client.welcome.nodes] == ["head"]
                plan = c.workers["w1"].welcome
                assert plan is not None
                place = Target(c.address_of(who), port or plan.node["base"] + 8)
                async with serving(echo, place):
                    listen = await c.listener("laptop", place)
                    assert not await passes(listen)
                async with serving(echo, Target(c.address, 8265)):
                    listen = await c.listener("laptop", Target(c.address, 8265))
                    assert await passes(listen)

        run(main)

    def test_names_do_not_clash_and_none_is_kept(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                for number in range(2):
                    key = f"key {number}".ljust(32)
                    await c.worker("w1", f"c{number}", role="client", key=key, worker_ports=0)
                await c.worker("head", "c2", role="client", worker_ports=0)
                assert sorted(x.name for x in c.hub.clients.values()) == ["head", "w1", "w1"]
                assert [plan.name for plan in c.roster.plans()] == ["head", "w1"]
                for number in range(3):
                    mux = c.workers[f"c{number}"].mux
                    assert mux is not None
                    mux.close("done")
                await until(lambda: not c.hub.clients)

        run(main)

    def test_what_a_client_says_is_not_a_workers_word(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with cluster(tmp_path, "w1") as c:
                client = await c.worker("w1", "c", role="client", key="k" * 32, worker_ports=0)
                assert client.mux is not None
                client.mux.send_message(messages.Ray("up", None, None))
                worker = c.workers["w1"]
                assert worker.mux is not None
                worker.mux.send_message(messages.Ray("down", None, None))
                await until(lambda: c.messages)
                assert c.messages == [("w1", messages.Ray("down", None, None))]
                c.hub.tell_all(messages.Cluster({}))
                c.hub.tell_all(messages.Auth("off", None), clients=True)
                await until(lambda: client.messages)
                assert client.messages == [messages.Auth("off", None)]

        run(main)

    def test_refusals(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gate_module, "MAX_CLIENTS", 1)

        async def main() -> None:
            async with cluster(tmp_path) as c:
                assert await code(c, client_hello("no name")) == "join_bad"
                assert await code(c, client_hello("a", key="short")) == "join_bad"
                assert await code(c, client_hello("a", resumes=True)) == "session_unknown"
                assert await code(c, hello_of("w1", worker_ports=0)) == "hello_malformed"
                assert not c.hub.clients
                await c.worker("a", role="client", session="10", worker_ports=0)
                assert await code(c, client_hello("a", session="ff")) == "name_in_use"
                assert await code(c, client_hello("b")) == "clients_full"
                assert await code(c, hello_of("w1")) == "", "a node is no client"

        run(main)


def client_hello(name: str, **fields: Any) -> Hello:
    return hello_of(name, **{"role": "client", "worker_ports": 0, **fields})


async def code(c: Cluster, hello: Hello) -> str:
    answer = await answer_to(c.hub.socket.path, hello.encode())
    return answer.problem.code.name if isinstance(answer, Refusal) else ""


@pytest.mark.parametrize(
    ("begun", "through"),
    [
        (client_hello("a").encode(), True),
        (client_hello("a").encode() + b"more", True),
        (client_hello("a").encode()[:-1], False),
        (first_question(client_hello("a")), True),
        (first_question(hello_of("w1")), False),
        (hello_of("w1").encode(), False),
        (Refusal(codes.named("a").problem("b", "c")).encode(), False),
        (encode(Kind.HELLO, 0, 1, b"{"), False),
        (encode(Kind.HELLO, 0, 1, b"[]"), False),
        (b"\xff" * 40, False),
        (b"", False),
    ],
)
def test_attach_for_clients_knows_one(begun: bytes, through: bool) -> None:
    assert attach._is_clients(begun) is through


class TestWords:
    """What the options amount to, and what is told."""

    def config(self, *words: str) -> Any:
        parser = connect_parser()
        return connect._config(parser.parse_args(words))

    def test_options(self) -> None:
        made = self.config(
            *("ray@h", "-p", "2222", "-i", "/k", "--via", "exec", "--socket", "/s"),
            *("--dashboard-port", "8300", "--forward", "8000=head:8000", "--forward", "7000=7001"),
        )
        head = made.head
        assert (head.ssh, str(head.identity), head.via, str(head.socket)) == (
            "ray@h:2222",
            "/k",
            "exec",
            "/s",
        )
        assert (made.client.dashboard_port, made.client.client_port) == (8300, None)
        assert [(f.listen, f.to) for f in made.forwards] == [
            ("127.0.0.1:8000", "head:8000"),
            ("127.0.0.1:7000", "head:7001"),
        ]

    def test_a_file_and_options(self, tmp_path: Path) -> None:
        file = tmp_path / "c.toml"
        file.write_text('role = "client"\n[head]\nssh = "a@b"\nvia = "exec"\n')
        made = self.config("--config", str(file))
        assert (made.head.ssh, made.head.via) == ("a@b", "exec")
        made = self.config("c@d", "--config", str(file), "--client-port", "5")
        assert (made.head.ssh, made.head.via, made.client.client_port) == ("c@d", "exec", 5)

    @pytest.mark.parametrize(
        ("host", "ssh"),
        [("::1", "[::1]:22"), ("ray@::1", "ray@[::1]:22"), ("[::1]", "[::1]:22")],
    )
    def test_ports_of_ipv6_addresses(self, host: str, ssh: str) -> None:
        assert self.config(host, "-p", "22").head.ssh == ssh

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["h:1", "-p", "2"], "rayfwd connect: --port 2: h:1 already has a port"),
            (["h", "--forward", "8000"], "must be LISTEN=TO, as in 8000=head:8000"),
            (["h", "--forward", "1=w1:1"], "a client reaches the head only: head:port"),
            (["h", "--forward", "0.0.0.0:1=1"], "must be on an IPv4 loopback address"),
            (["h", "--dashboard-port", "0"], "--dashboard-port = 0: must be at least 1"),
            (["h", "--dashboard-port", "7", "--client-port", "7"], "--client-port = 7: must diff"),
            (["@h"], 'HEAD = "@h": must be user@host'),
        ],
    )
    def test_mistakes(self, words: list[str], said: str) -> None:
        with pytest.raises(MistakeError, match=said.replace("[", r"\[")):
            self.config(*words)

    def test_a_file_of_another_role(self, tmp_path: Path, capsys: Any) -> None:
        file = tmp_path / "h.toml"
        file.write_text('role = "head"\n')
        assert rayfwd(["connect", "--config", str(file)]) == 2
        assert f'{file}: role = "head": must be "client"' in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "head: must be given on a client"),
            ('[head]\nssh="a"\n[ray]\nport=1', "ray: belongs to a node"),
            ('expose=[1]\n[head]\nssh="a"', "expose: belongs to a node"),
        ],
    )
    def test_mistakes_of_a_file(self, text: str, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            parse(tomllib.loads(f'role = "client"\n{text}'))

    def test_a_port_that_is_taken(self, ports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", ports[0]))
            taken.listen()
            config = self.config("h", "--dashboard-port", str(ports[0]))
            with pytest.raises(ProblemError, match="another program uses it") as caught:
                client_module.listen_all(config)
            assert caught.value.problem.code == codes.LISTEN_TAKEN
            monkeypatch.setitem(client_module.USUAL_PORTS, "dashboard", ports[0])
            (dashboard, client) = client_module.listen_all(self.config("h"))
            for _, sock in (dashboard, client):
                sock.close()
        assert dashboard[0].wanted == ports[0] < dashboard[0].port

    def test_a_proxy_is_thought_of(self) -> None:
        welcome = Welcome("0", {}, ({},), "n", 9.0)
        places = [Place("dashboard", 8265, 8265), Place("client", 10001, 10001)]

        def told(env: dict[str, str]) -> str:
            return "\n".join(addresses("h", welcome, places, None, env))

        assert "NO_PROXY=127.0.0.1" in told({"http_proxy": "http://p"})
        assert "NO_PROXY" not in told({"http_proxy": "http://p", "no_proxy": "x,127.0.0.1"})
        assert "NO_PROXY" not in told({})


def connect_parser() -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--cluster")
    connect.add_arguments(parser)
    return parser
