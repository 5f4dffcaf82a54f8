"""The lab itself: its firewalls drop, its machines are machines, and it leaves nothing behind.

Were one of these not so, the tests of rayfwd that stand on it would prove less than they say.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import pytest

from tests.lab.cluster import HUB_SOCKET, Cluster, change
from tests.lab.machines import INIT, Lab, Machine, left_over, made, tag
from tests.lab.process import HOME, UID, CommandFailed, Process, began, boot_time, state, until
from tests.lab.shared import shared as shared_by_files
from tests.need import CHECKOUT, need, no_ray, ray_envs

LISTEN = """
import socket, sys, time
sockets = [socket.create_server(("0.0.0.0", int(port))) for port in sys.argv[1:]]
print("listening", flush=True)
time.sleep(600)
"""

DIAL = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), 1.0).close()
    except TimeoutError:
        print("dropped")
    except ConnectionRefusedError:
        print("refused")
    else:
        print("open")
"""

HEAR = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("0.0.0.0", 7000))
    print("listening", flush=True)
    while True:
        print(s.recv(100).decode(), flush=True)
"""

SHOUT = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.sendto(sys.argv[2].encode(), (sys.argv[1], 7000))
"""

SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]


def python(machine: Machine) -> str:
    assert machine.lab.rayfwd is not None
    return str(machine.lab.rayfwd.with_name("python"))


def listen(machine: Machine, *ports: int) -> Process:
    process = machine.popen([python(machine), "-c", LISTEN, *map(str, ports)])
    deadline = time.monotonic() + 20
    while "listening" not in process.log.read_text():
        assert process.poll() is None, process.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def dial(machine: Machine, address: str, *ports: int) -> list[str]:
    words = [python(machine), "-c", DIAL, address, *map(str, ports)]
    return machine.run(words).stdout.split()


@pytest.fixture(scope="module")
def shared(module_lab: Lab) -> Lab:
    """A lab with sshd, for tests that leave it as they find it."""
    module_lab.machine("head").start_sshd()
    return module_lab


def test_head_lets_in_ssh_and_nothing_else(shared: Lab) -> None:
    head, w1, w2 = shared.machines
    listen(head, 6379, 8265, 10001, 20000, 40000)
    assert dial(head, head.address, 22, 6379, 40000) == ["open"] * 3
    for worker in (w1, w2):
        assert dial(worker, head.address, 22) == ["open"]
        assert dial(worker, head.address, 6379, 8265, 10001, 20000, 40000) == ["dropped"] * 5
        assert dial(worker, head.address, 7) == ["dropped"], "no more where nothing listens"


def test_workers_let_in_nothing(shared: Lab) -> None:
    head, w1, w2 = shared.machines
    listen(w1, 2222, 20048, 40000)
    assert dial(w1, w1.address, 2222, 40000) == ["open"] * 2
    for other in (head, w2):
        assert dial(other, w1.address, 22, 2222, 20048, 40000) == ["dropped"] * 4


def test_firewall_is_what_drops(lab: Lab) -> None:
    """The same ports are reached once the firewall says so: it is not the network."""
    head, w1, _ = lab.machines
    listen(head, 7000)
    assert dial(w1, head.address, 7000, 7001) == ["dropped", "dropped"]
    head.firewall([7000, 7001])
    assert dial(w1, head.address, 7000, 7001) == ["open", "refused"]
    head.firewall()
    assert dial(w1, head.address, 7000, 7001) == ["dropped", "dropped"]


def test_machines_reach_nothing_outside(shared: Lab) -> None:
    for machine in shared.machines:
        links = json.loads(machine.network_command("ip", "-json", "link"))
        assert [link["ifname"] for link in links] == ["lo", "eth0"]
        routes = json.loads(machine.network_command("ip", "-json", "route"))
        assert [route["dst"] for route in routes] == ["198.51.100.0/24"]


def test_login_by_ssh(shared: Lab) -> None:
    head, w1, _ = shared.machines
    command = "hostname; id -un; id -u"
    said = w1.run([*SSH, f"ray@{head.address}", command]).stdout
    assert said.split() == ["head", "ray", str(UID)]
    others = w1.run([*SSH, f"root@{head.address}", "true"], check=False)
    assert others.returncode == 255
    assert "Permission denied" in others.stderr


def test_host_keys_are_the_labs_own(shared: Lab) -> None:
    head, w1, w2 = shared.machines
    assert len({m.host_key for m in shared.machines}) == 3
    known = w1.run(["cat", f"{HOME}/.ssh/known_hosts"]).stdout
    assert known == f"{head.address} {head.host_key}\n"
    w1.know(f"{head.address} {w2.host_key}")
    try:
        refused = w1.run([*SSH, f"ray@{head.address}", "true"], check=False)
    finally:
        w1.know(known.rstrip("\n"))
    assert refused.returncode == 255
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in refused.stderr


def test_a_key_that_is_not_authorized(shared: Lab) -> None:
    head, w1, w2 = shared.machines
    head.authorize(w2.public_key)
    try:
        refused = w1.run([*SSH, f"ray@{head.address}", "true"], check=False)
        let_in = w2.run([*SSH, f"ray@{head.address}", "true"], check=False)
    finally:
        head.authorize(w1.public_key, w2.public_key)
    assert (refused.returncode, let_in.returncode) == (255, 0)
    assert "Permission denied" in refused.stderr


def test_a_machine_sees_its_own_processes_only(shared: Lab) -> None:
    marker = shared.machine("w2").popen(["sleep", "601"])
    assert marker.pid in shared.machine("w2").pids()
    seen = {m.name: m.run(["ps", "-e", "-o", "args"]).stdout for m in shared.machines}
    assert "sleep 601" in seen["w2"]
    for name in ("head", "w1"):
        assert "sleep 601" not in seen[name]
        inits = [line for line in seen[name].splitlines() if INIT in line]
        assert len(inits) == 1, "its own init and nobody else's"
    marker.signal(signal.SIGKILL)
    assert marker.wait() == -signal.SIGKILL


def test_a_machine_has_its_own_files_and_name(shared: Lab) -> None:
    for machine in shared.machines:
        machine.write(f"{HOME}/a/note", f"of {machine.name}")
        for place in ("/tmp", "/var/tmp", "/dev/shm"):
            machine.run(["sh", "-c", f"echo {machine.name} > {place}/note"])
    for machine in shared.machines:
        assert machine.run(["hostname"]).stdout.strip() == machine.name
        assert machine.run(["cat", "a/note"]).stdout == f"of {machine.name}"
        assert machine.host_path(f"{HOME}/a/note").stat().st_uid == UID
        for place in ("/tmp", "/var/tmp", "/dev/shm"):
            assert machine.run(["cat", f"{place}/note"]).stdout.strip() == machine.name
    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        assert not Path(place, "note").exists()
    head, w1 = shared.machine("head"), shared.machine("w1")
    assert head.run(["ls", "-A", "/root/.ssh"], user="root", check=False).returncode != 0
    assert "w1" not in head.run(["cat", "/etc/hosts"]).stdout
    assert "head" not in w1.run(["cat", "/etc/hosts"]).stdout


def test_commands(shared: Lab) -> None:
    w1 = shared.machine("w1")
    assert w1.run(["pwd"]).stdout == f"{HOME}\n"
    assert w1.run(["cat"], input="said").stdout == "said"
    assert w1.run(["id", "-u"], user="root").stdout == "0\n"
    env = w1.run(["env"], env={"MINE": "1"}).stdout.split("\n")
    assert "MINE=1" in env
    assert f"HOME={HOME}" in env
    assert not [line for line in env if line.startswith(("PYTEST", "RAYFWD"))]
    assert w1.run(["sh", "-c", "exit 3"], check=False).returncode == 3
    with pytest.raises(CommandFailed, match="to stderr"):
        w1.run(["sh", "-c", "echo to stderr >&2; exit 3"])
    before = w1.pids()
    with pytest.raises(TimeoutError, match="so far"):  # it has said that, if it starts in time
        w1.run(["sh", "-c", "echo so far; sleep 602 | cat"], timeout=3)
    until(lambda: set(w1.pids()) <= set(before), 5, lambda: f"{w1.pids()} beside {before}")


def test_signals_reach_the_process_itself(shared: Lab) -> None:
    w1 = shared.machine("w1")
    process = w1.popen(["sleep", "603"])
    assert Path(f"/proc/{process.pid}/cmdline").read_bytes() == b"sleep\x00603\x00"
    process.signal(signal.SIGSTOP)
    time.sleep(0.3)
    assert process.poll() is None
    process.signal(signal.SIGCONT)
    with pytest.raises(TimeoutError):
        process.wait(0.5)
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert w1.popen(["sh", "-c", "exit 4"]).wait() == 4
    assert w1.popen(["no-such-command"]).wait() == 127


def test_cut_heal_and_reset(lab: Lab) -> None:
    head, w1, w2 = lab.machines
    head.start_sshd()
    # A line a moment, so that what is lost and what is late can be told apart.
    words = [*SSH, f"ray@{head.address}", "i=0; while sleep 0.1; do i=$((i+1)); echo $i; done"]
    talk = w1.popen(words)

    def lines() -> int:
        return len(talk.log.read_text().split())

    def grows(within: float) -> bool:
        begun, deadline = lines(), time.monotonic() + within
        while time.monotonic() < deadline:
            if lines() > begun:
                return True
            time.sleep(0.05)
        return False

    assert grows(15)
    lab.cut(w1)
    # What was on its way arrives; a line that is sent now does not.
    assert not (grows(2) and grows(2) and grows(2))
    assert dial(w1, head.address, 22) == ["dropped"]
    assert dial(w2, head.address, 22) == ["open"]
    lab.heal(w1)
    assert grows(30)
    numbers = [int(word) for word in talk.log.read_text().split()]
    assert numbers == list(range(1, len(numbers) + 1)), "held, not lost"
    assert lab.reset_connections(w1) == 1
    assert talk.wait(10) == 255
    assert dial(w1, head.address, 22) == ["open"]


def test_drop_one_way(lab: Lab) -> None:
    for machine in lab.machines:
        machine.network_command("nft", "delete", "table", "inet", "firewall")
    head, w1, w2 = lab.machines
    ears = {m.name: m.popen([python(m), "-c", HEAR]) for m in lab.machines}
    until(lambda: all("listening" in ear.log.read_text() for ear in ears.values()), 20, lab.tails)

    def heard(word: str) -> set[str]:
        """Who hears whom, when all call all; what is last is never dropped."""
        for source, target in permutations(lab.machines, 2):
            words = f"{source.name}>{target.name} {word}"
            source.run([python(source), "-c", SHOUT, target.address, words])
        for machine in lab.machines:
            machine.run([python(machine), "-c", SHOUT, machine.address, f"end {word}"])
        until(
            lambda: all(f"end {word}\n" in ear.log.read_text() for ear in ears.values()),
            20,
            lab.tails,
        )
        lines = [line for ear in ears.values() for line in ear.log.read_text().splitlines()]
        return {line.split()[0] for line in lines if line.endswith(word)} - {"end"}

    everybody = {f"{a.name}>{b.name}" for a, b in permutations(lab.machines, 2)}
    assert heard("first") == everybody
    lab.drop_one_way(w1, head)
    assert heard("second") == everybody - {"w1>head"}
    lab.drop_one_way(None, w2)
    assert heard("third") == everybody - {"w1>head", "w1>w2", "head>w2"}
    lab.drop_nothing()
    lab.drop_one_way(head)
    assert heard("fourth") == everybody - {"head>w1", "head>w2"}
    lab.drop_nothing()
    assert heard("fifth") == everybody


def test_a_cut_stays_silent(shared: Lab) -> None:
    """ARP does not time out, after which connects would fail at once."""
    for machine in shared.machines:
        found = json.loads(machine.network_command("ip", "-json", "neigh"))
        others = {other.address for other in shared.machines if other is not machine}
        assert {entry["dst"] for entry in found} == others
        assert [entry["state"] for entry in found] == [["PERMANENT"]] * 2


def test_sshd_stops_and_starts(lab: Lab) -> None:
    head, w1, _ = lab.machines
    for _ in range(2):
        assert dial(w1, head.address, 22) == ["refused"]
        head.start_sshd()
        assert dial(w1, head.address, 22) == ["open"]
        head.stop_sshd()


def test_kill_all_is_a_reboot(lab: Lab) -> None:
    head, w1, _ = lab.machines
    head.start_sshd()
    # In a session of its own, and its parent gone: nothing is overlooked.
    head.run(["sh", "-c", "setsid sleep 604 > /dev/null 2>&1 &"])
    sleeper = head.popen(["sh", "-c", "trap '' TERM; sleep 605 & sleep 606"])
    until(lambda: len(head.pids()) >= 4, 20, lambda: "its processes")  # the shell forks yet
    head.kill_all()
    assert head.pids() == []
    assert sleeper.wait() == -signal.SIGKILL
    assert dial(w1, head.address, 22) == ["refused"]
    head.start_sshd()
    assert w1.run([*SSH, f"ray@{head.address}", "hostname"]).stdout == "head\n"


def test_orphans_are_reaped(shared: Lab) -> None:
    w1 = shared.machine("w1")
    orphan = int(w1.run(["sh", "-c", "(sleep 610 > /dev/null 2>&1 & echo $!)"]).stdout)
    w1.run(["kill", str(orphan)])
    until(lambda: not w1.host_path(f"/proc/{orphan}").exists(), 20, lambda: "it is reaped")


def test_rayfwd_is_the_installed_one(shared: Lab) -> None:
    w1 = shared.machine("w1")
    where = "import rayfwd; print(rayfwd.__file__)"
    assert "/site-packages/rayfwd/" in w1.run([python(w1), "-c", where]).stdout
    assert "usage: rayfwd" in w1.run([str(shared.rayfwd), "--help"]).stdout


@pytest.mark.parametrize("version", ["2.60.0", "2.40.0", "2.9.3"])
def test_ray_is_there_for_an_ordinary_user(shared: Lab, version: str) -> None:
    need(no_ray(version))
    w1 = shared.machine("w1")
    words = [str(w1.ray_python(version)), "-c", "import ray; print(ray.__version__)"]
    assert w1.run(words).stdout == f"{version}\n"
    assert str(w1.ray(version)).startswith(str(ray_envs()))


def test_configurations_of_a_cluster(shared: Lab) -> None:
    cluster = Cluster(
        shared,
        every={"ride_through": 30},
        w1={"ray.advertise": "198.51.100.2", "head": {"via": "exec"}, "head.socket": None},
        w2={"forward": [{"listen": "127.0.0.1:9000", "to": "head:8000"}]},
        ray={"num_cpus": 2, "resources": {"a b": 1.5}},
    )
    for name in ("head", "w1", "w2"):
        machine = shared.machine(name)
        machine.write(f"{HOME}/try.toml", cluster.config(name))
        words = [str(shared.rayfwd), "check", "--config", f"{HOME}/try.toml"]
        machine.run(words)
        written = tomllib.loads(cluster.config(name))
        assert written["ride_through"] == 30
        assert written["ray"]["resources"] == {"a b": 1.5}
    assert HUB_SOCKET not in cluster.config("w1")
    assert 'via = "exec"\n' in cluster.config("w1")
    forward = {"listen": "127.0.0.1:9000", "to": "head:8000"}
    assert tomllib.loads(cluster.config("w2"))["forward"] == [forward]


def test_a_shared_cluster_is_made_anew_where_it_was_broken(tmp_path: Path) -> None:
    folders = iter(tmp_path / name for name in ("first", "second"))

    @contextmanager
    def made() -> Iterator[Cluster]:
        with Lab(next(folders), names=("head",)) as lab:
            cluster = Cluster(lab, workers=(), every={"ray.start": False})
            cluster.start()
            cluster.wait_ready()
            yield cluster
            cluster.stop()

    with shared_by_files(made) as held:
        first = held.whole()
        assert held.whole() is first
        first.head.kill()
        second = held.whole()
        assert second is not first
        assert second.head.status()["state"] == "ready"
        assert first.lab.machines == ()
    assert second.lab.machines == ()


def test_changes() -> None:
    config = {"name": "a", "ray": {"x": 1, "y": True}}
    change(config, {"ray.x": 2, "ray": {"z": ["é", 1]}, "name": None, "log.format": "json"})
    assert config == {"ray": {"x": 2, "y": True, "z": ["é", 1]}, "log": {"format": "json"}}


def spaces_in_use(before: float = math.inf) -> set[str]:
    """Every namespace that a process of this host is in which began before that time.

    The kernel gives the number of a namespace that is gone to the next, of another run maybe.
    """
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and began(int(entry.name)) < before:
            for kind in ("net", "pid", "mnt", "uts", "ipc"):
                try:
                    found.add(os.readlink(entry / "ns" / kind))
                except OSError:
                    break
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "lab"
    holder = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.holder", str(folder)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert holder.stdout is not None
        said = json.loads(holder.stdout.readline())
        assert set(said["spaces"]) <= spaces_in_use()
        assert all(Path(f"/proc/{pid}").exists() for pid in said["pids"])
        interrupted = boot_time()
        os.kill(holder.pid, number)
        code = holder.wait(30)
    finally:
        holder.kill()
        holder.communicate()
    assert code != 0
    deadline = time.monotonic() + 10
    while True:
        left = sorted(set(said["spaces"]) & spaces_in_use(interrupted))
        left += [f"process {pid}" for pid in said["pids"] if Path(f"/proc/{pid}").exists()]
        mounts = Path("/proc/self/mountinfo").read_text()
        left += [line for line in mounts.splitlines() if f"{said['tag']}-" in line]
        left += [link for link in os.listdir("/sys/class/net") if link.startswith(said["tag"])]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert not left
    # What stays is the folder that it was given: logs and keys.
    assert {path.name for path in tmp_path.iterdir()} == {"lab"}


def test_what_is_stopped_ends_with_its_lab(tmp_path: Path) -> None:
    before = left_over()
    with Lab(tmp_path / "lab") as lab:
        stopped = [machine.popen(["sleep", "608"]) for machine in lab.machines]
        for process in stopped:
            process.signal(signal.SIGSTOP)
        while {state(process.parent) for process in stopped} != {"T"}:
            time.sleep(0.01)
    assert [process.poll() for process in stopped] == [-signal.SIGKILL] * 3
    assert sorted(left_over()) == sorted(before)


def test_left_over_sees_a_lab(tmp_path: Path) -> None:
    before = left_over()
    with Lab(tmp_path / "lab") as lab:
        pid = lab.machine("w1").popen(["sleep", "607"]).pid
        during = "\n".join(left_over())
        assert f"process {pid} in a lab's namespace: sleep 607" in during
        assert "a lab's init" in during
    assert sorted(left_over()) == sorted(before)


@pytest.mark.parametrize("ours", [True, False])
def test_left_over_leaves_out_what_another_runs_lab_began(ours: bool) -> None:
    """The kernel gives a namespace's number again; here it is the very one that is listed."""
    mark = json.dumps({"tag": f"{tag() if ours else 'rfl1'}-w1"})
    argv = ["unshare", "--mount", "sh", "-c", "sleep 609 & echo $!; wait", mark]
    parent = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, space = 0, ""
    try:
        pid = int(parent.stdout.readline())
        space = os.readlink(f"/proc/{pid}/ns/mnt")
        made[space] = math.inf
        # By its number alone: it may not have got as far as to be called `sleep`.
        listed = any(line.startswith(f"process {pid} in a lab's") for line in left_over())
        assert listed is ours
    finally:
        made.pop(space, None)
        if pid:
            os.kill(pid, signal.SIGKILL)
        parent.kill()
        parent.communicate()
