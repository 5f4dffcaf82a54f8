"""Ray's token: the head makes one, the link hands it over, and nobody gets in without it.

And an SSH key that may run `rayfwd attach` and nothing else. After a break-in, by the commands of
docs/security.md, there is another token, and that key is of no use.
"""

from __future__ import annotations

import re
import signal
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests.lab.checks import verify
from tests.lab.cluster import STATE_DIR, Cluster
from tests.lab.daemon import CONFIG
from tests.lab.machines import Machine
from tests.lab.named import waited_for
from tests.lab.process import HOME, Process, until
from tests.lab.shared import Shared

pytestmark = pytest.mark.ray

TOKEN_FILE = f"{HOME}/.ray/auth_token"
WITHIN = 30.0
SSH = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
MODE = {"RAY_AUTH_MODE": "token"}

TOOLS = """
set -e
export RAY_AUTH_MODE=token
ray status --address=127.77.0.1:6379
ray job submit --address=http://127.0.0.1:8265 -- echo done
ray list nodes --address=http://127.0.0.1:8265
"""
"""What the documents say to type in a shell."""

REQUEST = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], 8265, timeout=20)
headers = {"User-Agent": "x"}
if len(sys.argv) > 2:
    headers["Authorization"] = f"Bearer {sys.argv[2]}"
connection.request("GET", "/api/v0/nodes", headers=headers)
print(connection.getresponse().status)
"""


@pytest.fixture(scope="module")
def cluster(with_token: Shared) -> Cluster:
    cluster = with_token.whole()
    cluster.start(["w1", "w2"])
    cluster.wait_ready()
    return cluster


@pytest.fixture(scope="module")
def machines(cluster: Cluster) -> list[Machine]:
    """Those of its nodes."""
    return [cluster.lab.machine(name) for name in cluster.names]


def token(machine: Machine) -> str:
    return machine.host_path(TOKEN_FILE).read_text().strip()


def files_with(text: str, machine: Machine) -> list[str]:
    """The files of the machine's own that have it: not what is mounted there, the programs."""
    look = ["find", HOME, "/tmp", "-xdev", "-type", "f", "-exec", "grep", "-lF", text, "{}", "+"]
    return machine.run(look, check=False).stdout.split()


def ray_status(machine: Machine, env: dict[str, str] | None = None) -> Any:
    return machine.run(
        [str(machine.ray()), "status", "--address=127.77.0.1:6379"],
        env=env,
        check=False,
        timeout=90,
    )


def request(machine: Machine, *value: str) -> str:
    """What the head's dashboard answers there, to that token or to none."""
    argv = [str(machine.ray_python()), "-c", REQUEST, "127.77.0.1", *value]
    return machine.run(argv).stdout.strip()


CHECKS = ("small_tasks", "large_results", "actors", "worker_to_worker")
"""Calls of GCS, raylets, workers and object managers: who is asked for a token is asked by them."""


@pytest.mark.parametrize(
    "driver",
    ["head", pytest.param("w1", marks=pytest.mark.thorough), "w2"],  # w1: after the break-in
)
def test_drivers_need_no_further_step(cluster: Cluster, driver: str) -> None:
    lines = cluster.driver(driver, ["--checks", ",".join(CHECKS)])
    addresses = [node["address"] for node in cluster.head.status()["roster"]]
    verify(lines, driver, addresses, CHECKS)


def test_everybody_has_the_heads_token(machines: list[Machine]) -> None:
    (value,) = {token(machine) for machine in machines}
    assert len(value) == 64


@pytest.mark.runs("export RAY_AUTH_MODE=token", "ray status", "ray list", "ray job submit")
@pytest.mark.runs("ray job")
def test_tools_with_an_address_need_the_mode(cluster: Cluster) -> None:
    """What the README says of Ray before 2.61."""
    w1 = cluster.lab.machine("w1")
    assert ray_status(w1).returncode != 0
    said = w1.run(["bash", "-c", TOOLS.replace("ray ", f"{w1.ray()} ")], timeout=150).stdout
    for expected in ("3.0 CPU", "succeeded", "ALIVE"):
        assert expected in said


def test_nobody_gets_in_without_it(cluster: Cluster) -> None:
    head = cluster.lab.machine("head")
    assert request(head) == "401"
    refused = ray_status(head, {**MODE, "RAY_AUTH_TOKEN": "not the token"})
    assert refused.returncode != 0


def test_it_is_told_nowhere(cluster: Cluster, machines: list[Machine]) -> None:
    value = token(cluster.lab.machine("head")).encode()
    for machine in machines:
        for pid in machine.pids():
            # Not in the environment either: Ray is given the path.
            for name in ("cmdline", "environ"):
                try:
                    assert value not in Path(f"/proc/{pid}/{name}").read_bytes()
                except OSError:
                    pass
        allowed = [TOKEN_FILE, f"{STATE_DIR}/ray_auth.json", f"{STATE_DIR}/ray_token"]
        found = files_with(value.decode(), machine)
        assert sorted(found) == sorted(allowed), "and in no log of Ray's"
        for path in allowed:
            assert stat.S_IMODE(machine.host_path(path).stat().st_mode) == 0o600
    for daemon in cluster.daemons:
        assert value.decode() not in daemon.log.read_text()
        assert value.decode() not in str(daemon.status())


def test_the_watch_and_the_canary_go_on(cluster: Cluster) -> None:
    status = cluster.head.wait_status(lambda s: (s["cluster"] or {}).get("totals"), 60)
    assert status["cluster"]["totals"]["CPU"][1] == 3.0
    assert status["conditions"] == []
    argv = [str(cluster.lab.rayfwd), "canary", "--config", f"{HOME}/rayfwd.toml"]
    assert cluster.lab.machine("head").run(argv, timeout=150).stdout.count(" ok ") == 3


def test_another_token_in_the_users_home(cluster: Cluster) -> None:
    w1 = cluster.lab.machine("w1")
    value = token(w1)
    w1.write(TOKEN_FILE, "another\n")
    worker = cluster.worker("w1")
    status = worker.wait_status(lambda s: s["conditions"], WITHIN)
    assert [problem["code"] for problem in status["conditions"]] == ["ray_token_file_differs"]
    assert token(w1) == "another", "a user's own file is left alone"
    w1.run(["rm", TOKEN_FILE])
    worker.wait_status(lambda s: not s["conditions"], WITHIN)
    until(lambda: token(w1) == value, 5, lambda: "the cluster's token is back")


@pytest.mark.parametrize(
    ("env", "code"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "ray_token_wrong"),
        ({"RAY_AUTH_MODE": "disabled"}, "ray_token_missing"),
    ],
)
def test_a_worker_with_a_wrong_token_or_none(
    cluster: Cluster, env: dict[str, str], code: str
) -> None:
    """It is named before Ray is started with it."""
    w2 = cluster.worker("w2")
    if w2.process.poll() is None:
        assert w2.stop() == 0
    cluster.configs["w2"]["ray"]["env"] = env
    w2 = cluster.start_node("w2")
    said = w2.wait_event(code, WITHIN)
    assert "wrong" not in said["cause"]
    cluster.head.wait_event(code, WITHIN, where={"node": "w2", "seen_by": "w2"})
    status = w2.wait_status(lambda s: s["state"] == "waiting", 20)
    assert [problem["code"] for problem in waited_for(status)] == [code]
    assert w2.events("ray_starting") == []
    assert w2.stop() == 0


def test_it_is_over_when_the_worker_shows_the_heads_own(cluster: Cluster) -> None:
    del cluster.configs["w2"]["ray"]["env"]
    cluster.start_node("w2").wait_ready()
    cluster.head.wait_status(lambda s: s["conditions"] == [], 60)
    for code in ("ray_token_wrong", "ray_token_missing"):
        cluster.head.wait_event("problem_over", 5, where={"node": "w2", "code": code})


# -- the key of w2 may run `rayfwd attach` and nothing else: enough for `via = "exec"`


def commands(cluster: Cluster) -> list[str]:
    """Ids of the commands that have handed their pipes to the hub, and wait."""
    script = """for pid in $(pgrep -f 'rayfwd attach'); do
        [ "$(readlink /proc/$pid/fd/0 /proc/$pid/fd/1 | uniq)" = /dev/null ] && echo $pid
        done; true"""
    return cluster.lab.machine("head").run(["sh", "-c", script]).stdout.split()


def wait_commands(cluster: Cluster, others: Collection[str] = ()) -> list[str]:
    """The same for a link of two lanes, once they wait; none of them is one of `others`."""
    found: list[str] = []

    def look() -> bool:
        found[:] = commands(cluster)
        return len(found) == 2 and not set(found) & set(others)

    until(look, 20, lambda: f"commands: {found}, and not {others}")
    return found


def test_a_killed_command_and_a_restart_of_the_head_are_ridden_through(cluster: Cluster) -> None:
    head, w2 = cluster.head, cluster.worker("w2")
    w2.wait_status(lambda status: len(status["link"]["lanes"]) == 2, 60)
    lanes = wait_commands(cluster)
    before = w2.events()[-1]
    cluster.lab.machine("head").run(["kill", "-9", lanes[0]])
    w2.wait_event("lane_lost", 20, after=before)
    before = w2.wait_event("lane_up", 60, after=before)
    after = wait_commands(cluster, lanes[:1])
    assert lanes[1] in after
    told = head.events()[-1]
    head.process.signal(signal.SIGUSR2)
    assert head.wait_event("handover_taken", 60, after=told)["reset"] == 0
    w2.wait_event("link_resumed", 60, after=before)
    head.wait_event("rayfwd_ready", 60, after=told)
    w2.wait_status(lambda status: len(status["link"]["lanes"]) == 2, 60)
    wait_commands(cluster, after)  # those of the process before end
    addresses = [node["address"] for node in head.status()["roster"]]
    lines = cluster.driver("head", ["--checks", "small_tasks"])
    verify(lines, "head", addresses, ("small_tasks",))


def test_the_key_runs_no_command(cluster: Cluster) -> None:
    """What ssh asks for is ignored: `rayfwd attach` runs instead and ends with its input."""
    ran = ssh(cluster, [], f"touch {HOME}/proof; id")
    assert "uid=" not in ran
    assert not cluster.lab.machine("head").host_path(f"{HOME}/proof").exists()


@pytest.mark.parametrize(
    "options",
    [["-W", "127.0.0.1:22"], ["-N", "-R", "17171:127.0.0.1:22"]],
    ids=["local", "remote"],
)
def test_the_key_forwards_nothing(cluster: Cluster, options: list[str]) -> None:
    said = ssh(cluster, ["-o", "ExitOnForwardFailure=yes", *options])
    assert "administratively prohibited" in said or "remote port forwarding failed" in said
    assert "SSH-2.0" not in said


def test_the_key_reads_no_files(cluster: Cluster) -> None:
    """SFTP is a command too."""
    w2 = cluster.lab.machine("w2")
    argv = ["sftp", *SSH, "-b", "-", f"ray@{cluster.lab.machine('head').address}"]
    ran = w2.run(argv, check=False, input=f"get {HOME}/rayfwd.toml {HOME}/stolen\n")
    assert ran.returncode != 0
    assert not w2.host_path(f"{HOME}/stolen").exists()


def ssh(cluster: Cluster, options: list[str], *command: str) -> str:
    """What an attempt with the worker's key says, in all."""
    target = f"ray@{cluster.lab.machine('head').address}"
    argv = ["timeout", "20", "ssh", *SSH, *options, target, *command]
    ran = cluster.lab.machine("w2").run(argv, check=False)
    return ran.stdout + ran.stderr


# -- after a break-in

SECURITY = Path(__file__).parents[3] / "docs" / "security.md"
HELD, UNDER_WAY = "/tmp/held", "/tmp/under-way"
"""Control sockets of connections with w2's key."""

GATE = "/run/lab/gate"
GATEKEEPER = """
test "$PAM_RHOST" = {address} || exit 0
while test -e {gate}.shut; do sleep 0.05; done
"""
"""A step of PAM's that takes its time, as some do: sshd is root's until it is over."""


class Gate:
    """Keeps logins from one machine between the check of their key and the start of a session."""

    def __init__(self, head: Machine, source: Machine) -> None:
        self._head = head
        pam = Path("/etc/pam.d/sshd").read_text()
        head.host_path("/run/lab/pam").write_text(
            f"{pam}session required pam_exec.so /bin/sh {GATE}\n"
        )
        head.host_path(GATE).write_text(GATEKEEPER.format(gate=GATE, address=source.address))
        head.run(["mount", "--bind", "/run/lab/pam", "/etc/pam.d/sshd"], user="root")
        head.host_path(f"{GATE}.shut").touch()

    def open(self) -> None:
        """Let all through, for good."""
        self._head.run(["umount", "/etc/pam.d/sshd"], user="root")
        self._head.host_path(f"{GATE}.shut").unlink()


def blocks_after_a_break_in() -> list[str]:
    """What docs/security.md has an operator run, block by block."""
    section = SECURITY.read_text().split("## After a break-in\n")[1].split("\n## ")[0]
    found = re.findall(r"(?m)(?:^    .*\n)+", section)
    return [re.sub(r"(?m)^    ", "", block) for block in found]


def test_who_is_not_root_ends_a_login_that_is_under_way_the_second_time(
    cluster: Cluster, machines: list[Machine]
) -> None:
    head, _, w2 = machines
    _, end, _ = blocks_after_a_break_in()
    gate = Gate(head, w2)
    login = log_in(cluster, UNDER_WAY)
    head.run(["bash", "-ec", end])
    gate.open()
    only = ["-o", "ProxyCommand=false"]  # no connection but that one
    argv = ["ssh", *SSH, *only, "-S", UNDER_WAY, f"ray@{head.address}", "rayfwd attach"]
    assert "rayfwd attach" in w2.run(argv, check=False).stdout, "it has come through"
    head.run(["bash", "-ec", end])
    until(lambda: login.poll() is not None, 20, cluster.lab.tails)
    for name in ("w1", "w2"):
        cluster.worker(name).wait_status(lambda s: s["link"]["state"] == "up", 60)


@pytest.mark.runs("sed -i * ~/.ssh/authorized_keys", "pkill -f *", "rayfwd forget *")
def test_after_a_break_in(cluster: Cluster, machines: list[Machine]) -> None:
    """Whoever has had w2 has nothing any more: its key, its token, a connection that stands, one
    that is under way while the key is removed."""
    head, w1, w2 = machines
    old, known_as = token(w2), cluster.head.status()["workers"]
    assert {worker["name"] for worker in known_as} == {"w1", "w2"}
    assert request(head, old) == "200", "it is good for all of Ray"
    stands = log_in(cluster, HELD)
    gate = Gate(head, w2)
    under_way = log_in(cluster, UNDER_WAY)

    remove, end, forget = (block.replace("gpu-1", "w2") for block in blocks_after_a_break_in())
    head.write(f"{HOME}/.config/rayfwd.toml", head.host_path(CONFIG).read_text())
    assert cluster.lab.rayfwd is not None
    env = {"PATH": f"{cluster.lab.rayfwd.parent}:/usr/bin:/bin"}
    w1_cuts = cluster.worker("w1").status()["link"]["cuts"]
    head.run(["bash", "-ec", remove])
    head.run(["bash", "-ec", end], user="root")
    gate.open()
    cluster.worker("w1").wait_status(
        lambda s: s["link"]["cuts"] > w1_cuts and s["link"]["state"] == "up", 60
    )
    said = head.run(["bash", "-ec", forget], env=env).stdout
    assert "w2 is forgotten" in said
    assert "restarted now: Ray on head, w1\n" in said

    # The key, also with the connections that stood.
    for login in (stands, under_way):
        assert login.wait(20) == 255
    cluster.worker("w2").wait_event("ssh_auth_refused", WITHIN)
    target = f"ray@{head.address}"
    for socket in (HELD, UNDER_WAY):
        again = w2.run(["timeout", "20", "ssh", *SSH, "-S", socket, target], check=False)
        assert "Permission denied (publickey" in again.stderr, again.stderr

    # The others, which rode through it, and work with the new token.
    for name in ("head", "w1"):
        cluster.worker(name).wait_event("ray_restarting", WITHIN)
    cluster.head.wait_status(lambda s: s["state"] == "ready" and s["conditions"] == [], 120)
    cluster.worker("w1").wait_status(lambda s: s["state"] == "ready", 120)
    assert cluster.worker("w1").status()["link"]["ridden_through"] >= 1
    assert [row["name"] for row in cluster.head.status()["roster"]] == ["head", "w1"]
    assert cluster.worker("w1").events("ray_token_wrong") == []
    checks = ["small_tasks", "large_results"]
    addresses = [node["address"] for node in cluster.head.status()["roster"]]
    for driver in ("head", "w1"):
        verify(cluster.driver(driver, ["--nodes", "2", "--checks", ",".join(checks)]), driver,
               addresses, checks)  # fmt: skip

    # The token, wherever somebody who has it might still be.
    (new,) = {token(machine) for machine in (head, w1)}
    assert new != old
    for machine in (head, w1):
        assert request(machine, old) in {"401", "403"}
        assert request(machine, new) == "200"
        assert ray_status(machine, {**MODE, "RAY_AUTH_TOKEN": old}).returncode != 0
        assert files_with(old, machine) == [], "nothing has the old one any more"
    assert "2.0 CPU" in ray_status(w1, MODE).stdout
    cluster.worker("w2").stop()


def log_in(cluster: Cluster, socket: str) -> Process:
    """One more connection with w2's key, over which `rayfwd attach` could be asked for later."""
    target = f"ray@{cluster.lab.machine('head').address}"
    argv = ["ssh", *SSH, "-N", "-M", "-S", socket, target]
    w2 = cluster.lab.machine("w2")
    login = w2.popen(argv, log=cluster.lab.folder / "held.log")
    until(w2.host_path(socket).exists, 20, cluster.lab.tails)  # its key was accepted
    return login
