"""The service as it is lived with: restarted, upgraded, reloaded, hung, misconfigured, stopped.

One cluster for all tests, which run in the order of this file. A driver on the head and its actor
on the worker's node are there from the first to the last: their state shows that nothing was
started anew, and one driver costs less than one for each question.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from rayfwd.system.logs import REPEAT_LIMIT
from tests.lab.process import tail, until
from tests.systemd.cluster import BOTH, PYTHON, TASKS, Cluster, that_worked
from tests.systemd.machines import Machine

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400), pytest.mark.story]

CONFIG = "/etc/rayfwd.toml"
WHOLE = 90.0
"""Seconds for a restart until tasks run everywhere: it takes 3 where nothing else runs, and so long
where something hangs, which systemd ends then (TimeoutStopSec=)."""

WATCHDOG = 6
QUICK = f"""\
[Service]
WatchdogSec={WATCHDOG}
TimeoutAbortSec=2
"""
"""A drop-in: what takes 40 s otherwise."""
START = 15
"""Seconds that a start has until it asks for more; on a busy machine, Python alone takes some."""

ASKED = "/home/ray/asked"
"""The pipe by which the driver is asked."""

DRIVER = f"""
import json, os, ray, sys
ray.init(address="auto", logging_level="error", log_to_driver=False)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

class Counter:
    def __init__(self): self.count = 0
    def add(self):
        self.count += 1
        return [os.getpid(), ray.util.get_node_ip_address(), self.count]

(node,) = [n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == "127.77.0.2"]
# A connection that a killed daemon has cut is made anew by the next call, which is one more try.
counter = ray.remote(num_cpus=0, max_task_retries=3)(Counter).options(
    scheduling_strategy=On(node, soft=False)
).remote()
# For writing as well: it does not end when one who has asked is done.
asked = os.fdopen(os.open("{ASKED}", os.O_RDWR))
print("ready", flush=True)
for line in asked:
    if line == "end\\n":
        break
    print("counter", json.dumps(ray.get(counter.add.remote(), timeout=60)))
    exec({TASKS!r})
    print("answered", line, end="", flush=True)
"""


GREETED = """
import socket, sys
try:
    sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
    print("greeted" if sock.recv(9) else "closed")
except ConnectionResetError:  # also of `connect`: it may come before that looks
    print("reset")
"""
"""Ray greets whoever comes to it: on another node, by rayfwd's listener."""


def counted(said: str) -> tuple[int, str, int]:
    """Process id, address of its node, and how often it was asked, by what `DRIVER` has said."""
    (line,) = [line for line in said.splitlines() if line.startswith("counter ")]
    pid, address, count = json.loads(line.removeprefix("counter "))
    return pid, address, count


def processes(machine: Machine) -> dict[int, str]:
    """Process id to name, as seen inside."""
    found = {}
    for path in machine.host_path("/proc").glob("[0-9]*/comm"):
        try:
            found[int(path.parent.name)] = path.read_text().strip()
        except OSError:
            continue
    return found


def raylet(machine: Machine) -> int:
    (pid,) = raylets(machine)
    return pid


def raylets(machine: Machine) -> list[int]:
    found = [pid for pid, name in processes(machine).items() if name == "raylet"]
    return [pid for pid in found if parent(machine, pid) not in found]


def parent(machine: Machine, pid: int) -> int:
    """As seen inside; a process that was forked has its parent's name for a moment."""
    try:
        stat = machine.read(f"/proc/{pid}/stat")
    except OSError:  # it has ended
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def group(machine: Machine, pid: int) -> str:
    """The unit that a process is in."""
    return machine.read(f"/proc/{pid}/cgroup").strip().rpartition("/")[2]


class Kept:
    """What must be the same before and after."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        cluster.head.run(["mkfifo", ASKED], user="ray")
        self._driver = cluster.head.popen([str(PYTHON), "-c", DRIVER], user="ray")
        self._wait_said("ready\n")
        self.count = 0
        self.pid, _, _ = counted(self._ask())
        self.raylets = self.now()
        head, worker = (m.status()["node"] for m in cluster.lab.machines)
        self._others = {
            "worker": (head["address"], str(head["head_services"]["gcs"])),
            "head": (worker["address"], str(worker["base"])),  # its raylet
        }
        """What each dials of the other's Ray."""

    def now(self) -> list[int]:
        return [raylet(machine) for machine in self.cluster.lab.machines]

    def check(self) -> None:
        """Ray is the same everywhere, and the cluster is whole: tasks with data on every node, and
        new connections both ways, as a new driver would make them."""
        assert self.now() == self.raylets
        for name, place in self._others.items():
            # After a crash of the head's a service is active before its link is up again.
            until(lambda n=name, p=place: self._greeted(n, p), 20, lambda n=name: f"{n} is greeted")  # type: ignore[misc]
        said = self._ask()
        assert counted(said) == (self.pid, "127.77.0.2", self.count)
        assert that_worked(said) == BOTH

    def _greeted(self, name: str, place: tuple[str, str]) -> bool:
        machine = self.cluster.lab.machine(name)
        said = machine.run(["python3", "-c", GREETED, *place], user="ray").stdout
        return said == "greeted\n"

    def _ask(self) -> str:
        """What the driver says to one more question."""
        self.count += 1
        before = len(self._driver.log.read_text())
        self._tell(str(self.count))
        self._wait_said(f"answered {self.count}\n")
        return self._driver.log.read_text()[before:]

    def _wait_said(self, text: str) -> None:
        driver = self._driver

        def said() -> bool:
            ended = driver.poll() is not None
            there = text in driver.log.read_text()
            assert there or not ended, f"the driver has ended{tail(driver.log)}"
            return there

        until(said, 200, lambda: f"the driver says {text!r}{tail(driver.log)}")

    def _tell(self, line: str) -> None:
        """Raises OSError where the driver has ended."""
        pipe = os.open(self.cluster.head.host_path(ASKED), os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(pipe, f"{line}\n".encode())
        finally:
            os.close(pipe)

    def end(self) -> None:
        """Let the driver end, and its actor with it."""
        self._tell("end")
        assert self._driver.wait(60) == 0, tail(self._driver.log)


@pytest.fixture(scope="module")
def kept(cluster: Cluster) -> Kept:
    return Kept(cluster)


def edit(machine: Machine, change: Callable[[str], str]) -> str:
    """Change the configuration; what it was."""
    before = machine.read(CONFIG)
    machine.host_path(CONFIG).write_text(change(before))
    return before


def with_key(line: str) -> Callable[[str], str]:
    """A key of the file's first part."""
    return lambda text: f"{line}\n{text}"


def with_section(lines: str) -> Callable[[str], str]:
    return lambda text: f"{text}\n{lines}\n"


@pytest.mark.runs("systemd-analyze security rayfwd")
def test_ray_has_a_service_of_its_own(kept: Kept) -> None:
    for machine in kept.cluster.lab.machines:
        assert group(machine, raylet(machine)) == "rayfwd-ray.service"
        daemon = int(machine.show()["MainPID"])
        status = dict(
            line.split(":\t", 1) for line in machine.read(f"/proc/{daemon}/status").splitlines()
        )
        assert status["Uid"].split() == ["1000"] * 4
        assert int(status["CapBnd"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        asked = ["systemd-analyze", "security", "--no-pager", "--threshold=20", "rayfwd"]
        assert machine.run(asked, check=False).returncode == 0


def test_confined_as_it_is_it_does_its_job(kept: Kept) -> None:
    """The canary is a driver in the daemon's own sandbox: Ray's sockets and shared memory."""
    said = kept.cluster.head.run(["rayfwd", "canary", "--json"], user="ray", timeout=100)
    assert {n["name"]: n["ok"] for n in json.loads(said.stdout)["nodes"]} == {
        "head": True,
        "worker": True,
    }


def doctor(machine: Machine) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and the checks by their names."""
    ran = machine.run(["rayfwd", "doctor", "--json"], check=False)
    return ran.returncode, {row["check"]: row for row in json.loads(ran.stdout)["checks"]}


def test_the_doctor_beside_the_service(kept: Kept) -> None:
    """Root's question, answered as the service's user; nothing of the service is disturbed."""
    for machine in kept.cluster.lab.machines:
        code, rows = doctor(machine)
        wrong = {check: row for check, row in rows.items() if row["result"] in {"warn", "fail"}}
        assert (code, wrong) == (0, {})
        assert rows["daemon"]["seen"] == {"pid": int(machine.show()["MainPID"]), "state": "ready"}
        assert "/run/rayfwd-ray/keeper.sock" in rows["keeper"]["said"]
        assert rows["limits"]["seen"]["whose"] == "the daemon's"
        assert rows["ports"]["said"].endswith("in use by this node's Ray")
    assert rows["link"]["seen"]["down"] > 1e6
    kept.check()


@pytest.mark.parametrize("name", ["worker", "head"])
def test_a_restart_leaves_ray_alone(kept: Kept, name: str) -> None:
    machine = kept.cluster.lab.machine(name)
    before = machine.show()["MainPID"]
    began = time.monotonic()
    machine.systemctl("restart", "rayfwd")  # returns when it is ready
    kept.cluster.wait_ready()
    kept.check()
    assert time.monotonic() - began < WHOLE
    assert machine.show()["MainPID"] != before
    assert machine.events("ray_left_running")[-1]["OURS"] == "true"
    assert machine.events("ray_adopted")[-1]["OURS"] == "true"


@pytest.mark.thorough  # test_cluster.py has one under a job that counts every call
@pytest.mark.runs("/opt/rayfwd/bin/pip install --upgrade *")
def test_an_upgrade_leaves_ray_alone(kept: Kept) -> None:
    """As docs/operations.md has it, each file of rayfwd replaced under its keeper."""
    wheel = "/opt/rayfwd/bin/pip install --upgrade --force-reinstall --no-deps /wheels/rayfwd-*.whl"
    for machine in kept.cluster.lab.machines:
        machine.run(["sh", "-c", wheel], timeout=120)
        words = ["--fingerprint", kept.cluster.head.fingerprint]
        machine.run(["rayfwd", "init", machine.name, *words * (machine.name == "worker")])
        machine.systemctl("restart", "rayfwd")
    kept.cluster.wait_ready()
    kept.check()


@pytest.mark.parametrize("name", ["worker", "head"])
def test_a_daemon_that_is_killed_comes_back_to_its_ray(kept: Kept, name: str) -> None:
    machine = kept.cluster.lab.machine(name)
    before = machine.show()
    machine.systemctl("kill", "--signal=KILL", "rayfwd")
    restarts = str(int(before["NRestarts"]) + 1)
    machine.wait_for(NRestarts=restarts, ActiveState="active", SubState="running")
    kept.cluster.wait_ready()
    kept.check()


@pytest.mark.runs("systemctl reload rayfwd")
def test_a_reload_takes_effect_without_a_break(kept: Kept) -> None:
    """A forward is opened and leads nowhere, until the other side exposes the port."""
    head, worker = kept.cluster.head, kept.cluster.worker
    pids = [m.show()["MainPID"] for m in (head, worker)]
    sections = '[[forward]]\nlisten = "127.0.0.1:9022"\nto = "head:22"\n[log]\nlevel = "debug"'
    file = edit(worker, lambda text: with_section(sections)(with_key("ride_through = 60.0")(text)))
    worker.systemctl("reload", "rayfwd")
    (reloaded,) = worker.events("config_reloaded")
    assert json.loads(reloaded["CHANGED"]) == ["log.level", "forward"]
    (told,) = worker.events("config_kept")
    assert (json.loads(told["KEPT"]), told["PRIORITY"]) == (["ride_through"], "4")
    until(lambda: dial(worker, 9022) == "", 20, lambda: "the listener is open")
    exposed = edit(head, with_key("expose = [22]"))
    head.systemctl("reload", "rayfwd")
    until(lambda: dial(worker, 9022).startswith("SSH-2.0"), 20, lambda: "port 22 is exposed")
    assert [m.show()["MainPID"] for m in (head, worker)] == pids
    for machine, text in ((head, exposed), (worker, file)):
        edit(machine, lambda _, text=text: text)  # type: ignore[misc]
        machine.systemctl("reload", "rayfwd")
    until(lambda: dial(worker, 9022) == "refused", 20, lambda: "the listener is closed")
    kept.check()


DIAL = """
import socket, sys
try:
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10) as sock:
        print(sock.recv(100).decode())
except ConnectionRefusedError:
    print("refused")
except ConnectionResetError:
    print("")
"""


def dial(machine: Machine, port: int) -> str:
    """What a port of loopback says first; empty: it is reset, or closed."""
    return machine.run(["python3", "-c", DIAL, str(port)], user="ray").stdout.strip()


def test_a_reload_of_a_broken_file_changes_nothing(kept: Kept) -> None:
    worker = kept.cluster.worker
    before = worker.show()
    file = edit(
        worker, lambda text: with_section('[log]\nlevel = "loud"')(with_key("expoze = 1")(text))
    )
    asked = worker.run(["systemctl", "reload", "rayfwd"], check=False)
    assert asked.returncode != 0
    lines = [e for e in worker.journal() if "/etc/rayfwd.toml: " in str(e["MESSAGE"])]
    assert [e["PRIORITY"] for e in lines] == ["3", "3"]
    said = " ".join(e["MESSAGE"] for e in lines)
    assert [word in said for word in ("expoze", "log.level")] == [True, True]
    worker.systemctl("kill", "--signal=HUP", "--kill-whom=main", "rayfwd")
    until(lambda: len(worker.events("config_refused")) == 2, 20, lambda: "the daemon says so, too")
    after = worker.show()
    assert [after[k] for k in ("MainPID", "ActiveState")] == [before["MainPID"], "active"]
    edit(worker, lambda _: file)
    worker.systemctl("reload", "rayfwd")


@pytest.mark.runs("systemctl status rayfwd")
def test_a_mistake_in_the_file_ends_it_with_a_line_and_leaves_ray_alone(kept: Kept) -> None:
    worker = kept.cluster.worker
    file = edit(worker, with_key("ride_through = 1"))
    mark = time.time()
    assert worker.run(["systemctl", "restart", "rayfwd"], check=False).returncode != 0
    shown = worker.wait_for(ActiveState="failed", ExecMainStatus="2")
    assert "ride_through = 1" in shown["StatusText"]
    assert (
        "ride_through = 1"
        in worker.run(["systemctl", "status", "--no-pager", "rayfwd"], check=False).stdout
    )
    said = [
        e
        for e in worker.journal(f"--since=@{mark:.3f}")
        if "ride_through" in str(e["MESSAGE"]) and e["_COMM"] != "systemd"
    ]
    assert [(e["PRIORITY"], "at least 5" in e["MESSAGE"]) for e in said] == [("3", True)]
    code, rows = doctor(worker)
    assert (code, rows["config"]["code"]) == (2, "config_invalid")
    # Not in `auto-restart`, which is what systemd waits in: it is over.
    assert worker.wait_for(ActiveState="failed", SubState="failed")["NRestarts"] == "0"
    edit(worker, lambda _: file)
    worker.systemctl("start", "rayfwd")
    kept.cluster.wait_ready()
    kept.check()


def quick_watchdog(machine: Machine) -> None:
    machine.run(["mkdir", "-p", "/etc/systemd/system/rayfwd.service.d"])
    machine.write("/etc/systemd/system/rayfwd.service.d/quick.conf", QUICK)
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "rayfwd")


def test_a_lost_link_is_no_reason_to_restart(kept: Kept) -> None:
    worker = kept.cluster.worker
    quick_watchdog(worker)
    kept.cluster.wait_ready()
    before = worker.show()
    kept.cluster.lab.unplug(worker)
    until(lambda: worker.events("link_parked"), 40, lambda: "the link is parked")
    cut = int(worker.show()["WatchdogTimestampMonotonic"])

    def fed_since() -> float:
        return (int(worker.show()["WatchdogTimestampMonotonic"]) - cut) / 1e6

    until(lambda: fed_since() > 2 * WATCHDOG, 5 * WATCHDOG, lambda: f"fed for {fed_since()} s")
    shown = worker.show()
    assert [shown[k] for k in ("MainPID", "ActiveState", "NRestarts")] == [
        before["MainPID"],
        "active",
        "0",
    ]
    kept.cluster.lab.plug(worker)
    until(lambda: worker.events("link_resumed"), 40, lambda: "the link is back")
    kept.check()


def test_a_hung_daemon_is_killed_and_comes_back_to_its_ray(kept: Kept) -> None:
    worker = kept.cluster.worker
    pid = worker.show()["MainPID"]
    worker.run(["kill", "-STOP", pid])
    worker.wait_for(timeout=60, NRestarts="1", ActiveState="active", SubState="running")
    assert any("Watchdog timeout" in str(e["MESSAGE"]) for e in worker.journal())
    kept.cluster.wait_ready()
    kept.check()


def test_a_daemon_that_hangs_before_it_is_ready_is_killed_too(kept: Kept) -> None:
    """systemd's watchdog begins with READY; before that the start asks for more time."""
    worker = kept.cluster.worker
    drop_in = "/etc/systemd/system/rayfwd.service.d/quick.conf"
    worker.write(drop_in, QUICK + f"TimeoutStartSec={START}\nEnvironment=NOBODY=%n\n")
    worker.systemctl("daemon-reload")
    kept.cluster.lab.unplug(worker)
    worker.systemctl("restart", "--no-block", "rayfwd")
    until(lambda: worker.show()["ActiveState"] == "activating", 20, lambda: "it waits")
    time.sleep(START + 6)  # that it is not ended then is to be seen, and has no event
    shown = worker.show()
    assert (shown["ActiveState"], shown["NRestarts"]) == ("activating", "0")
    kept.cluster.lab.plug(worker)
    kept.cluster.wait_ready()
    kept.check()


CONNECT = """
import socket, sys
for path in sys.argv[1:]:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        print(path, "lets in")
    except PermissionError:
        print(path, "keeps out")
"""


def test_another_user_reaches_none_of_its_sockets(kept: Kept) -> None:
    head = kept.cluster.head
    paths = ["/run/rayfwd/control.sock", "/run/rayfwd/hub.sock", "/run/rayfwd-ray/keeper.sock"]
    asked = ["runuser", "-u", "nobody", "--", "python3", "-c", CONNECT, *paths]
    assert head.run(asked).stdout.splitlines() == [f"{path} keeps out" for path in paths]


LISTEN = """
import os, socket, subprocess, sys, time
os.setgroups([]); os.setgid(65534); os.setuid(65534)
places = [(sys.argv[1], int(port)) for port in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.readline()
tries, got, end = 0, set(), time.monotonic() + 4
while time.monotonic() < end:
    for place in places:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(place)
            sock.listen()
            got.add(place)
        except OSError:
            tries += 1
        sock.close()
print(tries > 1000, got)
"""


def test_nobody_can_listen_in_its_place_after_a_crash(kept: Kept) -> None:
    """systemd waits two seconds before it starts the daemon again. It holds the listeners."""
    worker = kept.cluster.worker
    services = kept.cluster.head.status()["node"]["head_services"].values()
    before = int(worker.show()["NRestarts"])
    kill = '(sleep 1; systemctl kill --signal=KILL rayfwd) & echo | exec python3 -c "$@"'
    words = [LISTEN, "127.77.0.1", *map(str, services)]
    said = worker.run(["sh", "-c", kill, "sh", *words]).stdout.split("\n")
    assert said[1] == "True set()"
    until(lambda: int(worker.show()["NRestarts"]) == before + 1, 20, lambda: "it is back")
    kept.cluster.wait_ready()
    kept.check()


def test_another_user_uses_none_of_its_listeners(kept: Kept) -> None:
    worker = kept.cluster.worker
    dial = ["python3", "-c", GREETED, "127.77.0.1", "6379"]
    said = {
        user: worker.run(["runuser", "-u", user, "--", *dial]).stdout.strip()
        for user in ("ray", "root", "nobody")
    }
    assert said == {"ray": "greeted", "root": "greeted", "nobody": "reset"}
    assert [e["USER"] for e in worker.events("connection_refused")] == ["nobody"]
    kept.check()


def test_no_worker_takes_anothers_name(kept: Kept) -> None:
    """With that worker's own SSH key, from its own machine, and without the secret of its node."""
    worker = kept.cluster.worker
    text = worker.read(CONFIG).replace('"/var/lib/rayfwd"', '"/home/ray/thief/state"')
    text = text.replace('"/run/rayfwd"', '"/home/ray/thief/run"')
    worker.write("/home/ray/thief.toml", f"{text}\nstart = false\n", owner="ray")
    thief = worker.popen(["rayfwd", "--config", "/home/ray/thief.toml", "run"], user="ray")
    try:
        until(lambda: "name_taken" in thief.log.read_text(), 30, thief.log.read_text)
        assert "session_started" not in thief.log.read_text()
    finally:
        thief.signal(signal.SIGTERM)
        thief.wait(20)
    refused = kept.cluster.head.events("lane_refused")
    assert ("name_taken", "worker") in {(e["CODE"], e["NODE"]) for e in refused}
    kept.check()


def test_the_journal(kept: Kept) -> None:
    """Bounded, without colours, without secrets, each line an entry, whatever Ray writes."""
    worker = kept.cluster.worker
    mark = time.time()
    words = "\x1b[31mred\x1b[0m RAY_AUTH_TOKEN=sesame123456 "
    lines = [words + "x" * 200_000, *(f"{words} {n}" for n in range(3000))]
    target = worker.host_path("/var/lib/rayfwd/ray.log")
    with target.open("a") as log:
        log.write("\n".join(lines) + "\n")

    def entries() -> list[dict[str, Any]]:
        return worker.journal(f"--since=@{mark:.3f}")

    def told() -> bool:
        return any(e.get("EVENT") == "events_suppressed" for e in entries())

    def output() -> int:
        return sum(e.get("EVENT") == "ray_output" for e in entries())

    until(told, 30, lambda: "a flood is bounded")
    # All but what the same half minute had before: what journald has no room for comes later.
    until(lambda: output() >= REPEAT_LIMIT - 50, 10, lambda: f"{output()} lines")
    found = entries()
    # Of one name so many are written in half a minute: the flood may come at the turn of two.
    assert sum(e.get("EVENT") == "ray_output" for e in found) <= 2 * REPEAT_LIMIT
    assert not [e for e in found if "RAYFWD_LOST" in e], "what journald has no room for waits"
    text = json.dumps(worker.journal())
    assert "\\u001b" not in text
    assert "sesame" not in text
    for entry in worker.journal():
        assert all(isinstance(value, str) for value in entry.values()), entry
        assert max(len(str(value)) for value in entry.values()) <= 16_000
        assert "\n" not in entry["MESSAGE"]
    assert not [e for e in found if "_LINE_BREAK" in e], "no line is longer than the journal's"


ON_NODE = """
import ray, sys
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(address="auto", logging_level="error", log_to_driver=False)
there = On(sys.argv[1], soft=False)
address = ray.remote(num_cpus=0)(ray.util.get_node_ip_address).options(scheduling_strategy=there)
print("ran on", ray.get(address.remote(), timeout=60))
"""


def test_a_keeper_that_is_killed_takes_ray_with_it_and_both_come_back(kept: Kept) -> None:
    """systemd ends what is left of its unit; the daemon lives on, and starts Ray anew."""
    kept.end()
    head, worker = kept.cluster.head, kept.cluster.worker

    def nodes() -> set[str]:
        """The worker's in Ray's table; one that has gone stays there for a while."""
        table = (head.status()["cluster"] or {"nodes": []})["nodes"]
        return {n["node_id"] for n in table if n["address"] == "127.77.0.2"}

    daemon, others, old = worker.show()["MainPID"], raylets(head), nodes()
    worker.systemctl("kill", "--signal=KILL", "--kill-whom=main", "rayfwd-ray")
    until(lambda: nodes() - old, 60, lambda: "it joins as a new node")
    (new,) = nodes() - old
    assert "ran on 127.77.0.2" in kept.cluster.driver(ON_NODE, new).splitlines()
    assert "`journalctl -u rayfwd-ray`" in worker.events("ray_died")[-1]["REMEDY"]
    assert (worker.show()["MainPID"], raylets(head)) == (daemon, others)
    assert group(worker, raylet(worker)) == "rayfwd-ray.service"


@pytest.mark.runs("systemctl stop rayfwd-ray", "systemctl edit rayfwd", "systemctl edit rayfwd-ray")
def test_ray_of_a_daemon_that_has_failed_is_ended_by_its_own_service(kept: Kept) -> None:
    """And with changed units both begin again."""
    worker = kept.cluster.worker
    file = edit(worker, with_key("ride_through = 1"))
    worker.run(["systemctl", "restart", "rayfwd"], check=False)
    worker.wait_for(ActiveState="failed")
    assert raylets(worker)
    worker.systemctl("stop", "rayfwd-ray")
    assert raylets(worker) == []
    edit(worker, lambda _: file)
    worker.edit_unit("rayfwd", "[Service]\nLimitNOFILE=65432\n")
    worker.edit_unit("rayfwd-ray", "[Service]\nTasksMax=54321\n")
    worker.systemctl("restart", "rayfwd")
    kept.cluster.wait_ready()
    assert worker.show()["LimitNOFILE"] == "65432"
    assert worker.show("rayfwd-ray")["TasksMax"] == "54321"
    assert raylets(worker)


@pytest.mark.runs("systemctl stop rayfwd")
def test_a_stop_ends_ray_in_order_and_leaves_nothing(kept: Kept) -> None:
    for machine in reversed(kept.cluster.lab.machines):
        machine.systemctl("stop", "rayfwd")
        said = machine.events()
        asked = max(i for i, e in enumerate(said) if e["EVENT"] == "ray_stopping")
        killed = [e["TITLE"] for e in said[asked:] if e["EVENT"] == "ray_process_killed"]
        (stopped,) = [e for e in said[asked:] if e["EVENT"] == "ray_stopped"]
        assert stopped["KILLED"] == str(len(killed))
        # Of a head that is the agent, where it just waits for the GCS (docs/events.md).
        assert set(killed) <= ({"dashboard/agent.py"} if machine is kept.cluster.head else set())
        machine.wait_for("rayfwd-ray", 20, ActiveState="inactive")
        assert machine.show()["Result"] == "success"
        assert machine.show()["NFileDescriptorStore"] == "0"
        running = machine.run(["ps", "-u", "ray", "-o", "pid=,args="], check=False).stdout
        logins = ("systemd --user", "(sd-pam)")  # of the user's own logins
        assert [x for x in running.splitlines() if not x.endswith(logins)] == []
        left = machine.run(["find", "/dev/shm", "/run", "-user", "ray"]).stdout
        # Of the user's logins; and the overlay's service goes on, without an overlay.
        others = ("/run/user/", "/run/rayfwd-net/")
        assert [x for x in left.splitlines() if not x.startswith(others)] == []
