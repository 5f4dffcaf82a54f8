"""`rayfwd doctor`: its rules, what it reads of this machine, and a worker's way to a real hub."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from rayfwd import __version__, codes
from rayfwd.cli import VERBS, doctor, main
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config, HeadConfig, parse
from rayfwd.doctor import common_checks, judgements, observe, rows, settings, sshd, unit_checks
from rayfwd.doctor.examination import examine, of_a_mistake
from rayfwd.doctor.head_checks import HeadExamination
from rayfwd.doctor.hub_probe import SHORTEST_TRANSFER, HubProbe
from rayfwd.doctor.judgements import SshdOptions, Tick
from rayfwd.doctor.rows import Row, document, failed, passed, skipped, summary, warned, worst
from rayfwd.hub import HubOffer
from rayfwd.ray import install
from rayfwd.ray.install import RayInstall, Versions
from rayfwd.session.frames import Kind, ProtocolError, first_frame
from rayfwd.session.handshake import Refusal
from rayfwd.system import sockdiag
from tests.unit.cluster import Cluster, free_place
from tests.unit.loops import run
from tests.unit.ssh_server import Sshd
from tests.unit.test_cli import STATUS, condition, daemon, rayfwd

PROBLEM = codes.CLOCK_OFFSET.problem("it is late", "wind it")
NETWORK = "127.77.0.0/16"


@pytest.fixture(autouse=True)
def _no_logging_left_behind() -> Iterator[None]:
    yield
    import io

    from rayfwd.config import LogConfig
    from rayfwd.system import logs

    logs.setup(LogConfig(), io.StringIO())


# -- rows


def test_the_worst_decides() -> None:
    good, bad = passed("a", "fine", n=1), failed("b", PROBLEM)
    late, unseen = warned("c", PROBLEM, seconds=2), skipped("d", "not asked")
    assert [worst(found) for found in ([], [good, unseen], [good, late], [late, bad])] == [
        *("pass", "pass", "warn", "fail")
    ]
    assert summary([good, late, bad, unseen, good]) == "2 pass, 1 warn, 1 fail, 1 skipped"
    for row in (good, bad, late, unseen):
        assert Row.from_wire(json.loads(json.dumps(row.to_wire()))) == row
    whole = document("head", "h", "1.0", [good, late])
    assert (whole["schema"], whole["result"]) == (rows.SCHEMA, "warn")
    assert whole["checks"][1] == {
        "check": "c",
        "result": "warn",
        "said": "it is late",
        "code": "clock_offset",
        "remedy": "wind it",
        "seen": {"seconds": 2},
    }


def test_exit_codes() -> None:
    codes = [doctor.exit_code([row]) for row in (passed("a", ""), skipped("a", ""))]
    codes += [doctor.exit_code([row]) for row in (warned("a", PROBLEM), failed("a", PROBLEM))]
    assert [*codes, doctor.exit_code([of_a_mistake(["role = 5"])])] == [0, 0, 4, 1, 2]


# -- rules


RECORDED = {
    # Asked from a machine whose clock is right, 5 ms and 200 ms away; and of 2.5 h behind.
    "right": [Tick(1000.0, 1000.0026, 0.005), Tick(1001.0, 1001.13, 0.2)],
    "far": [Tick(1000.0, 1000.11, 0.21), Tick(1001.0, 1001.19, 0.2)],
    "ahead": [Tick(1000.0, 996.9, 0.2), Tick(1001.0, 998.0025, 0.005)],
    "behind": [Tick(1000.0, 10000.1, 0.2)],
    "far and unsure": [Tick(1000.0, 1004.5, 5.0)],
}


@pytest.mark.parametrize(
    ("ticks", "ahead", "said"),
    [
        ("right", 0.0001, ""),
        ("far", 0.09, ""),
        ("ahead", -3.0, "3.0 s ahead of the head's"),
        ("behind", 9000.0, "2.5 hours behind the head's"),
        ("far and unsure", 2.0, ""),
    ],
)
def test_the_clock(ticks: str, ahead: float, said: str) -> None:
    found, doubt = judgements.offset(RECORDED[ticks])
    assert found == pytest.approx(ahead, abs=1e-6)
    problem = judgements.judge_clock(found, doubt)
    assert (problem is None) == (not said)
    assert problem is None or said in problem.cause


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ((0.04, 5e7, 5e6), []),
        ((0.25, 1e6, 1e6), []),
        ((0.3, 5e7, 5e7), ["300 ms"]),
        ((0.04, 9.9e5, 5e7), ["990 kB/s from the head"]),
        ((0.4, 800.0, 5e3), ["400 ms", "800 B/s from", "5 kB/s to the head"]),
    ],
)
def test_the_link(seen: tuple[float, float, float], said: list[str]) -> None:
    problem = judgements.judge_link(*seen)
    assert (problem is None) == (not said)
    assert problem is None or all(words in problem.cause for words in said)


@pytest.mark.parametrize(
    ("limit", "running", "cpus", "low"),
    [(None, 10**6, 64, False), (4000, 100, 4, False), (1200, 100, 4, True), (4000, 100, 64, True)],
)
def test_threads(limit: int | None, running: int, cpus: int, low: bool) -> None:
    problem = judgements.judge_threads(limit, running, cpus)
    assert (problem is not None and problem.code == codes.PROCESSES_LOW) == low


PROXY = {"http_proxy": "http://ann:sesame@proxy.example:3128"}


@pytest.mark.parametrize(
    ("env", "catches"),
    [
        ({}, ""),
        ({"NO_PROXY": ""}, ""),
        ({"http_proxy": ""}, ""),
        (PROXY, "http_proxy"),
        ({"HTTPS_PROXY": "x"}, "HTTPS_PROXY"),
        ({"ALL_PROXY": "socks5://x"}, "ALL_PROXY"),
        ({"http_proxy": "", "HTTP_PROXY": "x"}, ""),  # the small one counts, and says none
        (PROXY | {"NO_PROXY": "localhost, 127.77.0.0/16"}, ""),
        (PROXY | {"NO_PROXY": "127.0.0.0/8"}, ""),
        (PROXY | {"no_proxy": "*"}, ""),
        (PROXY | {"no_proxy": "127.77.0.1,127.77.0.2"}, ""),
        (PROXY | {"no_proxy": "127.77.0.1"}, "127.77.0.2"),
        (PROXY | {"no_proxy": "localhost,.example.org,10.0.0.0/8,fd00::/8"}, "http_proxy"),
        (PROXY | {"no_proxy": "localhost", "NO_PROXY": "127.77.0.0/16"}, "http_proxy"),
    ],
)
def test_proxies(env: dict[str, str], catches: str) -> None:
    problem = judgements.judge_proxies(env, {}, NETWORK, ["127.77.0.1", "127.77.0.2"])
    assert (problem is None) == (not catches)
    if problem is not None:
        assert problem.code == codes.PROXY_CATCHES
        assert catches in problem.cause
        assert NETWORK in problem.remedy
        assert "sesame" not in str(problem)


@pytest.mark.parametrize(
    ("env", "ray_env", "catches"),
    [
        ({}, PROXY, False),  # rayfwd sets NO_PROXY for Ray
        ({}, PROXY | {"NO_PROXY": "localhost"}, True),
        (PROXY | {"NO_PROXY": "127.77.0.0/16"}, {"no_proxy": "localhost"}, True),
        ({}, PROXY | {"NO_PROXY": "127.77.0.0/16"}, False),
        ({}, {"NO_PROXY": "localhost"}, False),
    ],
)
def test_proxies_of_rays_own_environment(
    env: dict[str, str], ray_env: dict[str, str], catches: bool
) -> None:
    problem = judgements.judge_proxies(env, ray_env, NETWORK, ["127.77.0.1"])
    assert (problem is not None) == catches
    assert problem is None or "ray.env" in problem.remedy


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("AllowStreamLocalForwarding no", ["AllowStreamLocalForwarding"]),
        ("AllowStreamLocalForwarding=remote", ["AllowStreamLocalForwarding"]),
        ("allowstreamlocalforwarding yes\nAllowStreamLocalForwarding no", []),
        ("AllowStreamLocalForwarding local", []),
        ("AllowTcpForwarding no", ["AllowTcpForwarding"]),
        ("AllowTcpForwarding remote", ["AllowTcpForwarding"]),
        ("AllowTcpForwarding local\nPermitOpen any", []),
        ("PermitOpen none", ["PermitOpen"]),
        ("PermitOpen 127.0.0.1:80", ["PermitOpen"]),
        ("DisableForwarding yes", ["AllowStreamLocalForwarding"]),
        ("  # DisableForwarding yes", []),
        ("Match User ann\n  AllowStreamLocalForwarding no\n  MaxSessions 0", []),
        ('ForceCommand "/bin/backup now" # nightly', ["ForceCommand"]),
        ("ForceCommand none\nMaxSessions 10\nPubkeyAuthentication yes", []),
        ("PubkeyAuthentication no\nMaxSessions 0", ["PubkeyAuthentication", "MaxSessions"]),
        ("MaxStartups 3:30:60", ["MaxStartups"]),
        ("MaxStartups 4", []),
    ],
)
def test_sshds_options(tmp_path: Path, text: str, names: list[str]) -> None:
    (tmp_path / "sshd_config").write_text(text)
    options = sshd.read_options(tmp_path / "sshd_config")
    assert options is not None
    found = judgements.judge_sshd(SshdOptions(options, None), workers=4)
    assert [problem.cause.split()[0] for problem in found] == names


def test_sshds_included_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sshd, "SSHD_CONFIG", tmp_path / "sshd_config")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.conf").write_text("Port 2222\nMatch all\nMaxSessions 0\n")
    (tmp_path / "d" / "2.conf").write_text("MaxSessions 5\nInclude sshd_config\n")  # a circle
    (tmp_path / "d" / "3.conf").symlink_to("/nonexistent")
    (tmp_path / "sshd_config").write_text("Include d/*.conf\nMaxSessions 1\nPort 22\n")
    options = sshd.read_options(tmp_path / "sshd_config")
    assert options is not None
    assert SshdOptions(options, None).first_values()["maxsessions"] == "5"
    assert set(options["port"]) == {"22", "2222"}
    assert sshd.read_options(tmp_path / "absent") is None


PRINTED = """\
port 22
maxstartups 10:30:100
forcecommand /opt/rayfwd/bin/rayfwd attach
listenaddress [::]:22
listenaddress 0.0.0.0:22
allowstreamlocalforwarding no
macs hmac-sha2-256
"""


def test_what_sshd_prints_of_itself() -> None:
    options = SshdOptions(sshd.parse_printed(PRINTED), "ann")
    assert options.values["listenaddress"] == ["[::]:22", "0.0.0.0:22"]
    (problem,) = judgements.judge_sshd(options, workers=4)
    assert "AllowStreamLocalForwarding no" in problem.cause
    assert "for the user ann" in problem.cause


@pytest.mark.parametrize("works", [True, False])
def test_sshd_is_asked_and_its_files_are_read_where_it_says_nothing(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "sshd"
    fake.write_text(f'#!/bin/sh\necho "forcecommand $*"\nexit {0 if works else 255}\n')
    fake.chmod(0o755)
    (tmp_path / "sshd_config").write_text("ForceCommand /bin/file")
    monkeypatch.setattr(sshd, "SSHD_CONFIG", tmp_path / "sshd_config")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(fake))

    async def main() -> None:
        found = await sshd.sshd_options("ann")
        assert found is not None
        flag = "-t" if os.geteuid() == 0 else "-g"
        asked = f"{flag} -c user=ann,host=localhost,addr=192.0.2.1"
        (value,) = found.values["forcecommand"]
        assert (value, found.user) == ((asked, "ann") if works else ("/bin/file", None))

    run(main)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has sshd print what holds")
def test_a_match_block_of_a_real_sshd(tmp_path: Path) -> None:
    key, config = tmp_path / "key", tmp_path / "sshd_config"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    config.write_text(f"HostKey {key}\nMatch User ann\n  MaxSessions 0\n")
    inner = "mount -t tmpfs none /run && mkdir /run/sshd && exec /usr/sbin/sshd -T -f $0 -C $1"
    for user, wrong in (("ann", ["MaxSessions"]), ("bob", [])):
        spec = f"user={user},host=localhost,addr=192.0.2.1"
        argv = ["unshare", "-m", "sh", "-c", inner, str(config), spec]
        ran = subprocess.run(argv, check=True, capture_output=True, text=True)
        options = SshdOptions(sshd.parse_printed(ran.stdout), user)
        found = judgements.judge_sshd(options, workers=1)
        assert [problem.cause.split()[0] for problem in found] == wrong


# -- this machine


def test_limits_of_this_process_and_of_a_daemon() -> None:
    for pid in (None, os.getpid()):
        found = observe.limits(pid)
        assert found.descriptors == -1 or found.descriptors > 100
        assert found.threads is None or found.threads > found.running > 0
        assert ("daemon" in found.whose) == (pid is not None)


def test_a_control_groups_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tightest of those above counts, which is seldom the nearest."""
    group = tmp_path / "groups" / "system.slice" / "rayfwd.service"
    group.mkdir(parents=True)
    for directory, limit, tasks in ((group, "max", 3), (group.parent, "500", 400)):
        (directory / "pids.max").write_text(f"{limit}\n")
        (directory / "pids.current").write_text(f"{tasks}\n")
    (tmp_path / "proc" / str(os.getpid())).mkdir(parents=True)
    cgroup = "0::/system.slice/rayfwd.service\n"
    (tmp_path / "proc" / str(os.getpid()) / "cgroup").write_text(cgroup)
    monkeypatch.setattr(observe, "PROC", tmp_path / "proc")
    monkeypatch.setattr(observe, "CGROUPS", tmp_path / "groups")
    found = observe.limits(os.getpid())
    assert (found.threads, found.running) == (500, 400)


def test_a_listener_that_is_taken_is_named() -> None:
    place = free_place()
    node = NodePlan("w2", "worker", place.address, place.port, 8)
    own = NodePlan("w1", "worker", "127.77.0.9", 30000, 8)
    assert observe.blocked_listeners([node, own], own) == []
    with socket.create_server((place.address, place.port + 3)):
        (problem,) = observe.blocked_listeners([node, own], own)
        assert problem.code == codes.LISTENER_BLOCKED
        assert str(place.port + 3) in problem.cause
        assert observe.blocked_listeners([replace(node, advertised=True)], own) == []


def test_names_are_looked_up() -> None:
    async def main_() -> None:
        seconds, addresses = await observe.resolve("localhost", 22)
        assert seconds < 20
        assert {"127.0.0.1", "::1"} & set(addresses)
        with pytest.raises(Exception, match=r"no\.such\.host\.invalid cannot be resolved"):
            await observe.resolve("no.such.host.invalid", 22)

    run(main_)


@pytest.mark.parametrize(
    ("unit", "config", "user"),
    [
        ("User=ray\nExecStart=/o/rayfwd run", "/etc/rayfwd.toml", "ray"),
        ("User=ray\nExecStart=/o/rayfwd run", "/etc/other.toml", None),
        ("User=ray\nExecStart=/o/rayfwd --config /etc/o.toml run", "/etc/o.toml", "ray"),
        ("User=ray\nExecStart=/o/rayfwd --config /etc/o.toml run", "/etc/rayfwd.toml", None),
        ("ExecStart=/o/rayfwd run", "/etc/rayfwd.toml", None),
        (None, "/etc/rayfwd.toml", None),
    ],
)
def test_whose_service_it_is(
    tmp_path: Path, unit: str | None, config: str, user: str | None
) -> None:
    if unit is not None:
        (tmp_path / "rayfwd.service").write_text(unit)
    found = unit_checks.of(tmp_path, Path(config))
    assert (None if found is None else found.user) == user


def test_a_users_own_service_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_checks, "SYSTEM", tmp_path / "system")
    own = tmp_path / ".config" / "systemd" / "user"
    for folder in (own, unit_checks.SYSTEM):
        folder.mkdir(parents=True)
        (folder / "rayfwd.service").write_text("ExecStart=/o/rayfwd --config /h/r.toml run\n")
    for at in (own, unit_checks.SYSTEM):
        found = unit_checks.find(Path("/h/r.toml"), {"HOME": str(tmp_path)})
        assert found is not None
        assert found.path.parent == at
        found.path.unlink()
    assert unit_checks.find(Path("/h/r.toml"), {"HOME": str(tmp_path)}) is None


# -- the keeper


def test_the_keeper_before_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_checks, "SYSTEM", tmp_path)
    unit = f"[Service]\nExecStart=/o/rayfwd --config {tmp_path / 'rayfwd.toml'} run\n"

    async def main_() -> None:
        async with site(tmp_path) as s:
            s.env["HOME"] = str(tmp_path)
            assert (await s.look())["keeper"].result == "skip"
            (tmp_path / "rayfwd.service").write_text(unit)
            assert (await s.look())["keeper"].result == "skip", "an older unit has none"
            text = f"{unit}Environment=RAYFWD_KEEPER=%t/rayfwd-ray/keeper.sock\n"
            (tmp_path / "rayfwd.service").write_text(text)
            missing = (await s.look())["keeper"]
            assert missing.problem is not None
            assert missing.problem.code == codes.KEEPER_ABSENT
            assert "`rayfwd init`" in missing.problem.remedy
            (tmp_path / "rayfwd-ray.service").write_text("[Service]\n")
            assert (await s.look())["keeper"].result == "pass"

    run(main_)


def test_the_overlays_service_before_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts with the daemon's, so that it does not answer yet is no reason for listeners."""
    monkeypatch.setattr(unit_checks, "SYSTEM", tmp_path)
    monkeypatch.setattr(common_checks, "OVERLAY_SOCKET", tmp_path / "overlay.sock")
    monkeypatch.setattr(common_checks, "check_commands", lambda: None)
    unit = f"[Service]\nExecStart=/o/rayfwd --config {tmp_path / 'rayfwd.toml'} run\n"
    unit += "Environment=RAYFWD_OVERLAY=%t/rayfwd-net/overlay.sock\n"
    (tmp_path / "rayfwd.service").write_text(unit)

    async def main_() -> None:
        async with site(tmp_path) as s:
            s.env["HOME"] = str(tmp_path)
            absent = (await s.look())["network"]
            assert absent.said.startswith("listeners: the service rayfwd-net does not answer")
            (tmp_path / "rayfwd-net.service").write_text("[Service]\n")
            there = (await s.look())["network"]
            assert (there.result, there.seen["level"]) == ("pass", "overlay")
            assert "rayfwd-net.service is there, and starts with rayfwd.service" in there.said

    run(main_)


def test_what_a_level_lacks_and_whether_others_reach_rays_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_checks, "SYSTEM", tmp_path)
    impossible = codes.OVERLAY_IMPOSSIBLE.problem("there is no right to", "ask for it")

    async def main_() -> None:
        async with site(tmp_path) as s:
            s.env["HOME"] = str(tmp_path)

            async def said(level: str, **more: Any) -> str:
                network = {"level": level, "why": "so", "interface": None, "refused": {}, **more}
                with daemon(tmp_path, status=status_of("up") | {"network": network}):
                    return (await s.look())["network"].said

            monkeypatch.setattr(common_checks, "possible", lambda: impossible)
            assert await said("listeners") == "listeners: so; to get the overlay: ask for it"
            hosts = await said("listeners", hosts_line="127.77.0.2 gpu-1")
            assert hosts.endswith("and no other with that name: 127.77.0.2 gpu-1")
            monkeypatch.setattr(common_checks, "possible", lambda: None)
            possible = "the overlay is possible now: restart rayfwd, which then restarts this"
            assert possible in await said("listeners")
            assert "network.guard_from names no machine" in await said("overlay")
            assert await said("overlay", guard=True) == "overlay: so"

    run(main_)


def test_the_keeper_beside_a_daemon(tmp_path: Path) -> None:
    """The daemon's environment says where it is, whatever any file has."""
    keeper = tmp_path / "keeper"
    keeper.mkdir()

    async def main_() -> None:
        env = {**os.environ, "RAYFWD_KEEPER": str(keeper / "control.sock")}
        child = await asyncio.create_subprocess_exec("sleep", "60", env=env)
        status = status_of("up") | {"pid": child.pid}
        try:
            async with site(tmp_path) as s:
                with daemon(tmp_path, status=status_of("up")):
                    assert (await s.look())["keeper"].result == "skip", "it has none"
                with daemon(tmp_path, status=status):
                    absent = (await s.look())["keeper"]
                    assert absent.problem is not None
                    assert absent.problem.code == codes.KEEPER_ABSENT
                    with daemon(keeper, exit_code={"exit_code": None}):
                        assert (await s.look())["keeper"].result == "pass"
        finally:
            child.kill()
            await child.wait()

    run(main_)


# -- a worker's way to the hub


def status_of(state: str, *wrong: dict[str, Any]) -> Any:
    """What a daemon says of itself, this process being it; `state` is its Ray's."""
    blocked = [row["id"] for row in wrong if row["code"] == "listener_blocked"]
    waiting = any(row["blocks_ready"] for row in wrong)
    return STATUS | {
        "pid": os.getpid(),
        "state": "waiting" if waiting else "ready",
        "summary": "as it is",
        "conditions": list(wrong),
        "node": NodePlan("w1", "worker", "203.0.113.7", 20048, 70, advertised=True).to_wire(),
        "ray": STATUS["ray"] | {"state": state, "pid": None},
        "listeners": {"open": 97, "blocked": len(blocked), "conditions": blocked, "refused": []},
    }


class Site:
    """A head with hub and sshd, and a worker's configuration."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sshd = Sshd(directory)
        self.head = Cluster(directory)
        self.fields: dict[str, Any] = {}
        self.env: dict[str, str] = dict(os.environ) | {"NO_PROXY": "*", "no_proxy": "*"}

    def config(self) -> Config:
        directory = self.directory
        self.sshd.identity.chmod(0o600)
        data: dict[str, Any] = {
            "role": "worker",
            "name": "w1",
            "state_dir": str(directory / "state"),
            "runtime_dir": str(directory / "run"),
            "head": {
                "ssh": f"ray@127.0.0.1:{self.sshd.port}",
                "identity": str(self.sshd.identity),
                "known_hosts": str(self.sshd.known_hosts),
                "ssh_config": str(directory / "ssh_config"),
                "socket": str(self.head.hub.socket.path),
            },
            "ray": {"command": str(directory / "ray"), "num_cpus": 2},
        }
        for key, value in self.fields.items():
            section, _, name = key.rpartition(".")
            (data[section] if section else data)[name] = value
        return parse(data, directory / "rayfwd.toml")

    async def look(self, **fields: Any) -> dict[str, Row]:
        """The rows of a configuration with these keys."""
        self.fields = {key.replace("__", "."): value for key, value in fields.items()}
        return await self._examine(self.config(), rows.WORKER)

    async def look_as_client(self, **fields: Any) -> dict[str, Row]:
        """The same of a client on this machine."""
        data = self.config().model_dump(mode="json", include={"name", "state_dir", "head"})
        head = {key: data["head"][key] for key in ("ssh", "identity", "known_hosts", "socket")}
        head["ssh_config"] = str(self.directory / "ssh_config")
        head |= {key: value for key, value in fields.items() if key in HeadConfig.model_fields}
        given = {key: value for key, value in fields.items() if key not in head}
        client = {**data, "role": "client", "head": head, **given}
        return await self._examine(parse(client, self.directory / "client.toml"), rows.CLIENT)

    async def _examine(self, config: Config, checks: tuple[str, ...]) -> dict[str, Row]:
        told: list[Row] = []
        found = await examine(config, self.directory / "control.sock", self.env, told.append)
        assert told == found
        assert tuple(row.check for row in found) == checks
        return {row.check: row for row in found}


@asynccontextmanager
async def site(directory: Path, hub: bool = True) -> AsyncIterator[Site]:
    made = Site(directory)
    (directory / "ssh_config").write_text("")
    (directory / "state").mkdir()
    if hub:
        await made.head.start()
    await made.sshd.start()
    try:
        yield made
    finally:
        await made.sshd.stop()
        await made.head.close()


def results(found: Mapping[str, Row], *checks: str) -> list[str]:
    return [found[check].result for check in checks]


WAY = ("ssh", "host_key", "auth", "channel", "hub", "place")
MEASURED = ("clock", "link")


@pytest.fixture
def any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is too slow: how fast a machine that runs tests is at the moment is not theirs."""
    for name in ("LOOKUP_SLOW", "LOGIN_SLOW", "ROUND_TRIP_SLOW"):
        monkeypatch.setattr(judgements, name, 60.0)
    monkeypatch.setattr(judgements, "RATE_SLOW", 1.0)


@pytest.mark.usefixtures("any_speed")
@pytest.mark.parametrize("via", ["socket", "exec"])
def test_a_good_way(tmp_path: Path, via: str) -> None:
    async def main_() -> None:
        async with site(tmp_path) as s:
            s.sshd.attach_to = s.head.hub.socket.path
            found = await s.look(head__via=via)
            assert results(found, *WAY, *MEASURED) == ["pass"] * 8
            assert results(found, "ports", "listeners", "names", "proxies") == ["pass"] * 4
            assert "will get" in found["place"].said
            assert found["hub"].seen["version"] == __version__
            clock = found["clock"].seen
            assert abs(clock["seconds_behind"]) < 0.5 + clock["doubt"], "it is one clock"
            assert found["link"].seen["down"] > 0
            assert found["link"].seen["up"] > 0
            assert results(found, "advertise", "advertise_self") == ["skip", "skip"]
            assert found["ray"].problem is not None
            assert found["ray"].problem.code == codes.RAY_NOT_FOUND
            assert found["versions"].result == "skip"
            assert s.head.hub.nodes == {}

    run(main_)


@pytest.mark.parametrize(
    ("break_", "stage", "code"),
    [
        ("port", "ssh", "ssh_unreachable"),
        ("name", "ssh", "ssh_unreachable"),
        ("other host key", "host_key", "host_key_mismatch"),
        ("no host key", "host_key", "host_key_unknown"),
        ("other key", "auth", "ssh_auth_refused"),
        ("bad key", "auth", "ssh_key_unusable"),
        ("stream-local", "channel", "channel_refused"),
        ("socket", "hub", "hub_absent"),
        ("attach", "hub", "hub_absent"),
    ],
)
def test_where_the_way_ends(tmp_path: Path, break_: str, stage: str, code: str) -> None:
    async def main_() -> None:
        async with site(tmp_path) as s:
            fields: dict[str, Any] = {}
            key = asyncssh.generate_private_key("ssh-ed25519")
            match break_:
                case "port":
                    fields["head__ssh"] = f"ray@127.0.0.1:{free_place().port}"
                case "name":
                    fields["head__ssh"] = "ray@no.such.host.invalid"
                case "other host key":
                    s.sshd.known_hosts.write_text(s.sshd.known_hosts_line(key))
                case "no host key":
                    s.sshd.known_hosts.write_text("")
                case "other key":
                    key.write_private_key(s.sshd.identity)
                case "bad key":
                    s.sshd.identity.write_text("no key\n")
                case "stream-local":
                    s.sshd.prohibits = True
                case "socket":
                    fields["head__socket"] = str(tmp_path / "absent.sock")
                case "attach":
                    s.sshd.attach_to = tmp_path / "absent.sock"
                    fields["head__via"] = "exec"
            found = await s.look(**fields)
            at = WAY.index(stage)
            before = "skip" if break_ == "bad key" else "pass"
            assert results(found, *WAY) == [before] * at + ["fail"] + ["skip"] * (5 - at)
            problem = found[stage].problem
            assert problem is not None
            assert problem.code.name == code
            assert problem.remedy
            assert results(found, *MEASURED, "ports", "listeners") == ["skip"] * 4
            if break_ == "name":
                assert found["names"].result == "fail"

    run(main_)


def test_another_version_and_a_name_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayfwd.hub.gate.__version__", "0.0.1")

    async def main_() -> None:
        async with site(tmp_path) as s:
            await s.head.worker("w1")  # its key is another than ours would be
            found = await s.look()
            assert results(found, *WAY) == [*["pass"] * 4, "warn", "fail"]
            assert found["hub"].problem is not None
            assert found["hub"].problem.code == codes.RAYFWD_VERSION_DIFFERS
            assert found["place"].problem is not None
            assert found["place"].problem.code == codes.NAME_TAKEN
            assert results(found, *MEASURED) == ["pass", "pass"], "the rest is looked at"
            assert s.head.hub.nodes["w1"].state == "up"
            (tmp_path / "state" / "node.key").write_text(s.head.workers["w1"].hello.key)
            found = await s.look(ray__worker_ports=40)
            assert found["place"].result == "pass"
            assert "has 127." in found["place"].said
            assert s.head.hub.nodes["w1"].state == "up"

    run(main_)


def test_a_hub_that_is_older(tmp_path: Path) -> None:
    """It does not know the kind of frame, and says so as rayfwd always did."""
    kinds: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kinds.append((await reader.read(1 << 16))[0])
        wrong = codes.FRAME_UNKNOWN.problem("a frame of unknown kind 13", "upgrade")
        writer.write(Refusal(wrong).encode())
        writer.close()

    async def main_() -> None:
        async with site(tmp_path, hub=False) as s:
            server = await asyncio.start_unix_server(serve, s.head.hub.socket.path)
            found = await s.look()
            server.close()
            assert results(found, *WAY) == [*["pass"] * 4, "warn", "skip"]
            assert found["hub"].problem is not None
            assert found["hub"].problem.code == codes.HUB_OLDER
            assert results(found, *MEASURED, "versions") == ["skip"] * 3
            assert kinds == [Kind.CHECK]

    run(main_)


def test_this_hub_refuses_what_a_newer_doctor_asks(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError) as caught:
        first_frame(bytearray(bytes([max(Kind) + 1]) + bytes(19)), 100)
    assert caught.value.code == codes.FRAME_UNKNOWN


def test_what_answers_is_no_hub(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async def main_() -> None:
        async with site(tmp_path, hub=False) as s:
            server = await asyncio.start_unix_server(serve, s.head.hub.socket.path)
            found = await s.look()
            server.close()
            assert results(found, *WAY) == [*["pass"] * 4, "fail", "skip"]
            assert "is not rayfwd" in found["hub"].said

    run(main_)


def test_a_login_that_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judgements, "LOGIN_SLOW", 0.3)

    async def main_() -> None:
        async with site(tmp_path) as s:
            s.sshd.login_takes = 0.4
            found = await s.look()
            assert found["auth"].result == "warn"
            assert found["auth"].problem is not None
            assert found["auth"].problem.code == codes.LOGIN_SLOW
            assert found["place"].result == "pass"

    run(main_)


@pytest.mark.parametrize("way", ["_pull", "_push"])
@pytest.mark.parametrize(
    ("how", "result"), [("for a moment", "pass"), ("all the time", "warn")], ids=str
)
def test_a_slow_way_is_told_from_a_busy_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, how: str, result: str
) -> None:
    """A process waits for a processor as long as a short transfer takes on a slow way."""
    move, moved = getattr(HubProbe, way), list[int]()

    async def late(probe: HubProbe, size: int) -> None:
        if how == "all the time" or not moved:
            await asyncio.sleep(max(SHORTEST_TRANSFER, size / 2e5))
        moved.append(size)
        await move(probe, size)

    monkeypatch.setattr(HubProbe, way, late)

    async def main_() -> None:
        async with site(tmp_path) as s:
            link = (await s.look())["link"]
        assert link.result == result, link.said
        if link.problem is not None:
            assert link.problem.code == codes.LINK_POOR

    run(main_)


def test_ports_and_listeners_that_are_taken(tmp_path: Path) -> None:
    async def main_() -> None:
        async with site(tmp_path) as s:
            found = await s.look()
            first = int(str(found["place"].seen["ports"]).split("-")[0])
            with socket.create_server(("0.0.0.0", first)):
                found = await s.look()
            assert found["ports"].problem is not None
            assert found["ports"].problem.code == codes.PORT_IN_USE
            assert f"{first} (held by python" in found["ports"].said
            with socket.create_server((s.head.address, 6379)):
                found = await s.look()
            assert found["ports"].result == "pass"
            assert found["listeners"].problem is not None
            assert found["listeners"].problem.code == codes.LISTENER_BLOCKED
            assert "port 6379 is in use" in found["listeners"].said

    run(main_)


def test_other_versions_than_the_heads(tmp_path: Path) -> None:
    async def main_() -> None:
        async with site(tmp_path) as s:
            packages = tmp_path / "site"
            (packages / "ray-2.40.0.dist-info").mkdir(parents=True)
            (packages / "ray-2.40.0.dist-info" / "METADATA").write_text(
                "Name: ray\nVersion: 2.40.0\n"
            )
            python = tmp_path / "python"
            python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
            python.chmod(0o755)
            ray = tmp_path / "ray"
            ray.write_text(f"#!{python}\n")
            ray.chmod(0o755)
            found = await s.look()
            assert found["ray"].result == "pass"
            assert found["ray"].seen["ray"] == "2.40.0"
            assert found["versions"].problem is not None
            assert found["versions"].problem.code == codes.RAY_VERSION_DIFFERS
            s.head.offered = HubOffer(ray="2.40.0", python=found["ray"].seen["python"])
            assert (await s.look())["versions"].result == "pass"
            s.head.offered = HubOffer()
            assert "does not know its own Ray" in (await s.look())["versions"].said

    run(main_)


def test_beside_a_daemon(tmp_path: Path) -> None:
    """Its word is taken for ports, listeners and the advertised address: nothing is held here."""

    dropped = condition("advertise_dropped", "w1", cause="no way", blocks_ready=True)
    blocked = condition("listener_blocked", "w1/127.77.0.1:6379", cause="port 6379 is in use")

    async def main_() -> None:
        async with site(tmp_path) as s:
            with daemon(tmp_path, status=status_of("up")):
                found = await s.look(ray__advertise="203.0.113.7")
                assert results(found, "daemon", "ports", "listeners") == ["pass"] * 3
                assert results(found, "advertise", "advertise_self") == ["pass"] * 2
                assert "in use by this node's Ray" in found["ports"].said
            with daemon(tmp_path, status=status_of("failed", blocked, dropped)):
                found = await s.look(ray__advertise="203.0.113.7")
                assert results(found, "daemon", "ports", "listeners") == ["warn", "pass", "fail"]
                assert results(found, "advertise", "advertise_self") == ["fail", "skip"]
                assert "`rayfwd status`" in str(found["daemon"].problem)
            with daemon(tmp_path, status=status_of("starting")):
                assert (await s.look())["ports"].result == "skip"

    run(main_)


# -- a client


@pytest.mark.parametrize("via", ["socket", "exec", None])
def test_a_clients_way(tmp_path: Path, via: str | None) -> None:
    """Without `via` it goes on to the command where streams are refused, as the client does."""

    async def main_() -> None:
        async with site(tmp_path) as s:
            s.sshd.attach_to = s.head.hub.socket.path
            s.sshd.prohibits = via is None
            found = await s.look_as_client(**({} if via is None else {"via": via}))
            assert results(found, *WAY[:-1], "link", "listen", "names", "proxies") == ["pass"] * 9
            assert ("rayfwd attach" in found["channel"].said) == (via != "socket")
            assert "with Ray 2.60.0" in found["hub"].said
            assert s.head.hub.clients == {}

    run(main_)


@pytest.mark.parametrize(
    ("via", "stage", "code"),
    [
        ("socket", "channel", "channel_refused"),
        (None, "channel", "channel_refused"),  # and there is no command either
        ("exec", "hub", "hub_closed"),
    ],
)
def test_where_a_clients_way_ends(tmp_path: Path, via: str | None, stage: str, code: str) -> None:
    async def main_() -> None:
        async with site(tmp_path) as s:
            s.sshd.prohibits = True
            found = await s.look_as_client(**({} if via is None else {"via": via}))
            problem = found[stage].problem
            assert problem is not None
            assert problem.code.name == code
            assert found["link"].result == "skip"

    run(main_)


def test_a_key_for_clients_alone(tmp_path: Path) -> None:
    """As docs/security.md has it; an older head takes the question for a node's."""

    async def main_() -> None:
        async with site(tmp_path) as s:
            s.sshd.attach_to, s.sshd.attach_words = s.head.hub.socket.path, ("--client",)
            s.sshd.prohibits = True
            assert results(await s.look_as_client(), "hub", "link") == ["pass"] * 2
            assert (await s.look(head__via="exec"))["hub"].problem is not None
            s.sshd.attach_says = b"rayfwd attach: client_only: it is no client; use another key\n"
            found = await s.look_as_client(via="exec")
            assert found["hub"].result == "warn"
            assert found["hub"].problem is not None
            assert found["hub"].problem.code == codes.HUB_OLDER

    run(main_)


def test_where_a_client_would_listen(tmp_path: Path) -> None:
    async def main_() -> None:
        async with site(tmp_path) as s:
            with socket.create_server(("127.0.0.1", 0)) as other:
                port = other.getsockname()[1]
                found = (await s.look_as_client(client={"dashboard_port": port}))["listen"]
                assert found.problem is not None
                assert found.problem.code == codes.LISTEN_TAKEN
            found = (await s.look_as_client(client={"dashboard_port": port}))["listen"]
            assert found.result == "pass"
            assert found.seen["dashboard"] == f"127.0.0.1:{port}"

    run(main_)


# -- the command


def head_file(directory: Path, text: str = "") -> Path:
    path = directory / "rayfwd.toml"
    dirs = f'state_dir = "{directory}/s"\nruntime_dir = "{directory}/r"\n'
    ray = f'[ray]\nport = {free_place().port}\ncommand = "/none/ray"\n'
    path.write_text(f'{dirs}role = "head"\nname = "h"\n{text}{ray}')
    return path


@pytest.mark.runs("rayfwd doctor --json")
def test_a_head_as_json(tmp_path: Path) -> None:
    ran = rayfwd("--config", head_file(tmp_path), "doctor", "--json")
    whole = json.loads(ran.stdout)
    assert ran.returncode == 1
    assert (whole["role"], whole["name"], whole["version"]) == ("head", "h", __version__)
    found = {row["check"]: row for row in whole["checks"]}
    assert tuple(found) == rows.HEAD
    assert found["ray"]["code"] == "ray_not_found"
    assert found["socket"]["result"] == "pass"
    assert {found[c]["result"] for c in ("clock", "names", "link")} == {"skip"}
    assert not (tmp_path / "s").exists(), "it makes nothing"


@pytest.mark.runs("rayfwd doctor")
def test_a_line_a_check_and_the_remedy(tmp_path: Path) -> None:
    ran = rayfwd("--config", head_file(tmp_path), "doctor")
    lines = ran.stdout.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert [line.split()[1] for line in heads[:-1]] == list(rows.HEAD)
    at = next(i for i, line in enumerate(lines) if line.startswith("fail  ray "))
    assert "ray_not_found: ray.command" in lines[at]
    assert "do" in lines[at + 1]
    assert "install Ray" in lines[at + 1]
    assert heads[-1].endswith("skipped")


def test_where_there_is_no_file_it_says_how_to_begin(tmp_path: Path) -> None:
    ran = rayfwd("--config", tmp_path / "none.toml", "doctor")
    assert ran.returncode == 2
    assert "none.toml: no such file" in ran.stdout
    assert "`rayfwd init`" in ran.stdout
    assert "`rayfwd head`" in ran.stdout
    assert "correct the file" not in ran.stdout


def test_a_mistake_in_the_file(tmp_path: Path) -> None:
    ran = rayfwd("--config", head_file(tmp_path, "ride_through = 1\n"), "doctor", "--json")
    assert ran.returncode == 2
    (row,) = json.loads(ran.stdout)["checks"]
    assert (row["check"], row["code"]) == ("config", "config_invalid")
    assert "ride_through = 1: must be at least 5" in row["said"]
    ran = rayfwd("--config", head_file(tmp_path, "[hub]\nport_base = 32760\n"), "doctor")
    assert ran.returncode == 2
    assert "port_base" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_a_head_whose_hub_cannot_be(tmp_path: Path) -> None:
    text = '[hub]\nusers = ["no-such-user"]\n'
    ran = rayfwd("--config", head_file(tmp_path, text), "doctor", "--json")
    assert {r["check"]: r["code"] for r in json.loads(ran.stdout)["checks"]}["socket"] == (
        "user_unknown"
    )
    (tmp_path / "r").mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "r" / "hub.sock"))
        other.listen()
        ran = rayfwd("--config", head_file(tmp_path), "doctor", "--json")
    assert {r["check"]: r["code"] for r in json.loads(ran.stdout)["checks"]}["socket"] == (
        "socket_in_use"
    )


def test_words_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert "doctor" in VERBS
    assert main(["doctor", "--log", "/x"]) == 2
    assert "--report" in capsys.readouterr().err
    assert main(["doctor", "--with-logs"]) == 2
    assert "--with-logs: needs --report" in capsys.readouterr().err


def test_as_another_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        ran = rayfwd("--config", head_file(tmp_path), "doctor", "--user", "nobody")
        assert ran.returncode == 2
        assert "needs root" in ran.stderr
        return
    ran = rayfwd("--config", head_file(tmp_path), "doctor", "--user", "no-such-user")
    assert ran.returncode == 2
    assert "there is no such user" in ran.stderr


# The machine of these tests is one, and has one clock; that the head's clock is what is read is
# seen in `test_the_clock_that_is_asked_is_the_hubs`.


def test_the_clock_that_is_asked_is_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late:
        @staticmethod
        def time() -> float:
            return time.time() - 90.0

    monkeypatch.setattr("rayfwd.hub.doctor_answers.time", Late)

    async def main_() -> None:
        async with site(tmp_path) as s:
            found = await s.look()
            assert found["clock"].problem is not None
            assert found["clock"].problem.code == codes.CLOCK_OFFSET
            assert "90.0 s ahead of the head's" in found["clock"].said
            assert found["clock"].seen["seconds_behind"] == pytest.approx(-90.0, abs=0.5)

    run(main_)


@pytest.mark.parametrize(
    ("auth", "kept", "version", "shell", "is_warned"),
    [
        ("off", None, None, "/bin/bash", True),
        ("off", "token", None, "/bin/bash", True),
        ("auto", "off", None, "/bin/bash", True),
        ("auto", "token", "2.60.0", "/bin/bash", False),
        ("auto", None, None, "/bin/bash", False),
        ("auto", None, "2.40.0", "/bin/bash", True),
        ("auto", None, "2.60.0", "/bin/bash", True),
        ("auto", None, "2.61.0", "/bin/bash", False),
        ("token", None, "2.60.0", "/bin/bash", False),
        ("off", None, None, "/usr/sbin/nologin", False),
    ],
)
def test_others_who_log_in_where_ray_has_no_token(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    auth: str,
    kept: str | None,
    version: str | None,
    shell: str,
    is_warned: bool,
) -> None:
    logs_in(monkeypatch, tmp_path, shell)
    if kept is not None:
        record = {"mode": kept, "token": "x" * 32 if kept == "token" else None}
        (tmp_path / "ray_auth.json").write_text(json.dumps(record))
    ray = {"auth": auth}
    config = parse({"role": "head", "name": "h", "state_dir": str(tmp_path), "ray": ray})
    found = [line for line in settings.warnings(config, version) if "may log in" in line]
    assert [line.partition(" may")[0] for line in found] == (["ann"] if is_warned else [])


@pytest.mark.parametrize("told", [None, "off", "token"])
def test_a_worker_knows_what_the_head_has_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    logs_in(monkeypatch, tmp_path)
    if told is not None:
        record = {"mode": told, "token": "x" * 32 if told == "token" else None}
        (tmp_path / "ray_auth.json").write_text(json.dumps(record))
    config = parse({"role": "worker", "state_dir": str(tmp_path), "head": {"ssh": "ann@h"}})
    assert (settings.no_token(config, "2.60.0") is not None) == (told == "off")


@pytest.mark.parametrize("is_told", [True, False])
def test_others_at_the_ports_of_a_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """They are kept out by the kernel's word, where it gives it."""
    logs_in(monkeypatch, tmp_path)

    def silent() -> sockdiag.SockDiag:
        raise OSError("no netlink")

    if not is_told:
        monkeypatch.setattr(sockdiag, "opened", silent)
    config = parse({"role": "client", "state_dir": str(tmp_path), "head": {"ssh": "ann@h"}})
    found = [line for line in settings.warnings(config) if "may log in" in line]
    assert len(found) == (0 if is_told else 1)


def test_a_heads_doctor_warns_before_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it knows which Ray there is."""
    logs_in(monkeypatch, tmp_path)
    installed = RayInstall("/r/ray", "/r/python", Versions("2.60.0", "3.11.7"))

    async def find(command: str, env: Mapping[str, str]) -> RayInstall:
        return installed

    monkeypatch.setattr(install, "find", find)
    config = parse({"role": "head", "name": "h", "state_dir": str(tmp_path)})
    rows: list[Row] = []
    examination = HeadExamination(config, tmp_path / "control.sock", {}, rows.append)

    async def body() -> None:
        row = await examination._ray()
        assert (row.check, row.result) == ("ray", "warn")
        assert "ann may log in" in row.said

    run(body)


def logs_in(monkeypatch: pytest.MonkeyPatch, home: Path, shell: str = "/bin/bash") -> None:
    """Beside this user there is ann, who has that shell; this user's home has no token."""
    monkeypatch.setenv("HOME", str(home))
    users = [
        pwd.struct_passwd((name, "x", uid, uid, "", "/", sh))
        for name, uid, sh in (
            ("own", os.geteuid(), "/bin/sh"),
            ("daemon", 2, "/bin/sh"),
            ("nobody", 65534, "/bin/sh"),
            ("ann", 54321, shell),
        )
    ]
    monkeypatch.setattr("pwd.getpwall", lambda: users)
