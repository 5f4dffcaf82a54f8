"""Whatever keeps a node from working is one event with cause and remedy, and heals by itself.

Each test removes the cause under the running daemon, which is never restarted.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rayfwd.transport.listeners import RETRY_LAST
from tests.lab.cluster import HUB_SOCKET, STATE_DIR, Cluster, change
from tests.lab.daemon import CONFIG, Daemon
from tests.lab.machines import Lab, Machine
from tests.lab.named import waited_for
from tests.lab.process import until

GUESTS = {"guest": 4300, "stranger": 4301}
"""Users of the head that are not rayfwd's."""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    """A head and two workers without Ray; each test starts the worker that it is about."""
    head = module_lab.machine("head")
    add_guests(head, module_lab.machine("w1").public_key)
    cluster = Cluster(module_lab, every={"ray.start": False})
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")
    yield cluster
    cluster.stop()


def add_guests(head: Machine, key: str) -> None:
    for file, lines in {
        "passwd": [f"{u}:x:{i}:{i}::/home/{u}:/bin/bash" for u, i in GUESTS.items()],
        "group": [f"{u}:x:{i}:" for u, i in GUESTS.items()],
        "shadow": [f"{u}:*:19000:0:99999:7:::" for u in GUESTS],
    }.items():
        path = head.host_path(f"/run/lab/etc/{file}")
        # In place: it is mounted on the file below /etc.
        with path.open("a") as out:
            out.writelines(f"{line}\n" for line in lines)
    for user in GUESTS:
        home = f"/home/{user}"
        script = (
            f"install -d -o {user} -g {user} {home} && "
            f"install -d -m 700 -o {user} -g {user} {home}/.ssh && "
            f"echo '{key}' > {home}/.ssh/authorized_keys"
        )
        head.run(["bash", "-c", script], user="root")


def attempts(cluster: Cluster, worker: str) -> int:
    """How many connections of a worker the head's sshd has written about."""
    log = (cluster.lab.folder / "head-sshd.log").read_text(errors="replace")
    address = re.escape(cluster.lab.machine(worker).address)
    return len(set(re.findall(rf"{address} port (\d+)", log)))


def tries_on(cluster: Cluster, worker: str, more: int = 3) -> None:
    """Wait until the worker has dialled so many times more."""
    before = attempts(cluster, worker)
    until(
        lambda: attempts(cluster, worker) >= before + more,
        90,
        lambda: f"{worker} has dialled {attempts(cluster, worker) - before} times more",
    )


def errors(daemon: Daemon) -> list[dict[str, Any]]:
    return [event for event in daemon.events() if event.get("level") == "error"]


def check_said_once(daemon: Daemon, code: str, cause: str, remedy: str) -> None:
    """One error of this code, of no other, that names the thing and what to do; status has it."""
    status = daemon.wait_status(waited_for, 20)
    assert status["state"] == "waiting"
    assert [problem["code"] for problem in waited_for(status)] == [code]
    (event,) = errors(daemon)
    assert event["event"] == code
    assert cause in event["cause"]
    assert remedy in event["remedy"]
    row = waited_for(status)[0]
    assert (row["cause"], row["remedy"]) == (event["cause"], event["remedy"])
    assert (row["severity"], row["subject"]) == ("error", status["name"])


def check_healed(daemon: Daemon, *said: str) -> None:
    """It is ready, and said no more than these errors."""
    daemon.wait_status(lambda status: status["state"] == "ready", 60)
    assert [event["event"] for event in errors(daemon)] == list(said)
    assert waited_for(daemon.status()) == []


@pytest.fixture
def end(cluster: Cluster) -> Iterator[None]:
    """End the workers and put back what the test changed."""
    yield
    head = cluster.lab.machine("head")
    for daemon in cluster.daemons:
        if daemon is not cluster.head and daemon.process.poll() is None:
            assert daemon.stop() == 0
    for name in ("w1", "w2"):
        machine = cluster.lab.machine(name)
        machine.know(f"{head.address} {head.host_key}")
        cluster.configs[name]["name"] = name
        cluster.configs[name]["head"]["ssh"] = f"ray@{head.address}"
        machine.run(["rm", "-rf", STATE_DIR])
        forget(cluster, name)
    head.authorize(*(cluster.lab.machine(name).public_key for name in ("w1", "w2")))


def forget(cluster: Cluster, name: str) -> None:
    argv = [str(cluster.lab.rayfwd), "forget", name, "--config", CONFIG]
    cluster.lab.machine("head").run(argv, check=False)


def restart_head(cluster: Cluster, users: list[str]) -> None:
    if cluster.head.process.poll() is None:
        assert cluster.head.stop() == 0
    cluster.configs["head"]["hub"] = {"users": users}
    cluster.start_node("head").wait_event("hub_listening")


@pytest.mark.ray
@pytest.mark.usefixtures("end")
class TestTheLink:
    def test_host_key_mismatch(self, cluster: Cluster) -> None:
        head, w1 = cluster.lab.machine("head"), cluster.lab.machine("w1")
        w1.know(f"{head.address} {w1.host_key}")
        worker = cluster.start_node("w1")
        worker.wait_event("host_key_mismatch")
        tries_on(cluster, "w1")
        check_said_once(worker, "host_key_mismatch", head.address, f"ssh-keygen -R {head.address}")
        w1.know(f"{head.address} {head.host_key}")
        check_healed(worker, "host_key_mismatch")

    def test_host_key_unknown(self, cluster: Cluster) -> None:
        head, w1 = cluster.lab.machine("head"), cluster.lab.machine("w1")
        w1.know()
        worker = cluster.start_node("w1")
        worker.wait_event("host_key_unknown")
        tries_on(cluster, "w1")
        check_said_once(worker, "host_key_unknown", head.address, "known_hosts")
        w1.know(f"{head.address} {head.host_key}")
        check_healed(worker, "host_key_unknown")

    def test_key_refused(self, cluster: Cluster) -> None:
        """Tried twice a minute only: servers count refused keys."""
        head, w1 = cluster.lab.machine("head"), cluster.lab.machine("w1")
        head.authorize(cluster.lab.machine("w2").public_key)
        worker = cluster.start_node("w1")
        worker.wait_event("ssh_auth_refused")
        tries_on(cluster, "w1", 1)
        check_said_once(worker, "ssh_auth_refused", f"ray@{head.address}", "authorized_keys")
        head.authorize(w1.public_key)
        check_healed(worker, "ssh_auth_refused")

    def test_nothing_listens_for_ssh(self, cluster: Cluster) -> None:
        head = cluster.lab.machine("head")
        head.stop_sshd()
        worker = cluster.start_node("w1")
        worker.wait_event("ssh_unreachable")
        # Nobody is there to count the attempts: they come 0.2, 0.4, 0.8 and 1.6 s after each other.
        time.sleep(4)
        check_said_once(worker, "ssh_unreachable", f"ray@{head.address}", "sshd")
        head.start_sshd()
        check_healed(worker, "ssh_unreachable")

    def test_hub_absent(self, cluster: Cluster) -> None:
        """It is asked for again on the connection that stands: sshd sees one login for a minute."""
        assert cluster.head.stop() == 0
        worker = cluster.start_node("w1")
        worker.wait_event("hub_absent")
        before = attempts(cluster, "w1")
        time.sleep(5)  # some attempts, of which nobody writes
        assert attempts(cluster, "w1") == before
        check_said_once(worker, "hub_absent", HUB_SOCKET, "start rayfwd on the head")
        cluster.start_node("head")
        check_healed(worker, "hub_absent")

    def test_hub_not_permitted(self, cluster: Cluster) -> None:
        cluster.configs["w1"]["head"]["ssh"] = f"guest@{cluster.lab.machine('head').address}"
        worker = cluster.start_node("w1")
        worker.wait_event("hub_not_permitted")
        tries_on(cluster, "w1")
        check_said_once(worker, "hub_not_permitted", HUB_SOCKET, "hub.users")
        # While the head is restarted it is absent, which is news of its own.
        restart_head(cluster, ["guest"])
        worker.wait_status(lambda status: status["state"] == "ready", 60)
        assert {event["event"] for event in errors(worker)} <= {"hub_not_permitted", "hub_absent"}
        restart_head(cluster, [])

    def test_user_not_allowed(self, cluster: Cluster) -> None:
        restart_head(cluster, ["guest"])
        cluster.configs["w1"]["head"]["ssh"] = f"stranger@{cluster.lab.machine('head').address}"
        worker = cluster.start_node("w1")
        worker.wait_event("user_not_allowed")
        tries_on(cluster, "w1")
        check_said_once(worker, "user_not_allowed", "stranger", "hub.users")
        refused = cluster.head.events("lane_refused")
        assert [event["code"] for event in refused] == ["user_not_allowed"]
        restart_head(cluster, ["guest", "stranger"])
        worker.wait_status(lambda status: status["state"] == "ready", 60)
        assert {event["event"] for event in errors(worker)} <= {"user_not_allowed", "hub_absent"}
        restart_head(cluster, [])


@pytest.mark.ray
@pytest.mark.usefixtures("end")
class TestNames:
    def test_two_nodes_of_one_name(self, cluster: Cluster) -> None:
        cluster.start_node("w1").wait_ready()
        cluster.configs["w2"]["name"] = "w1"
        second = cluster.start_node("w2")
        second.wait_event("name_taken")
        tries_on(cluster, "w2")
        check_said_once(second, "name_taken", "w1", "another name")
        assert cluster.worker("w1").status()["state"] == "ready", "the first one goes on"
        assert cluster.worker("w1").stop() == 0
        # Only now may it be told to forget the first one, and that is news.
        second.wait_event("name_taken", 90, lambda event: "rayfwd forget" in event["remedy"])
        forget(cluster, "w1")
        check_healed(second, "name_taken", "name_taken")

    def test_a_copied_machine(self, cluster: Cluster) -> None:
        """The same name and the same key, as on a cloned disk."""
        first = cluster.start_node("w1")
        first.wait_ready()
        w1, w2 = cluster.lab.machine("w1"), cluster.lab.machine("w2")
        key = w1.host_path(f"{STATE_DIR}/node.key").read_text()
        w2.write(f"{STATE_DIR}/node.key", key)
        cluster.configs["w2"]["name"] = "w1"
        second = cluster.start_node("w2")
        second.wait_event("name_in_use")
        tries_on(cluster, "w2")
        check_said_once(second, "name_in_use", "w1", "node.key")
        assert first.status()["state"] == "ready", "the first one goes on"
        told = [(event["event"], event["seen_by"]) for event in errors(first)]
        assert told == [("name_in_use", "head")], "it hears of the other one, and nothing else"
        assert first.stop() == 0
        check_healed(second, "name_in_use")


@pytest.mark.ray
@pytest.mark.usefixtures("end")
def test_listener_blocked(cluster: Cluster) -> None:
    """Something else listens on a port that stands for one of the head's."""
    port = cluster.head.status()["node"]["base"] + 1
    squatter = squat(cluster.lab.machine("w1"), port)
    worker = cluster.start_node("w1")
    event = worker.wait_event("listener_blocked")
    assert f"port {port} is in use on this machine by user ray (python" in event["cause"]
    assert f"sport = :{port}" in event["remedy"]
    # No service's port: who starts Ray by hand is told how.
    status = worker.wait_status(lambda s: s["ray"]["state"] == "by_hand", 30)
    assert status["state"] == "waiting", "something of the head's is a stranger's here"
    assert [problem["code"] for problem in status["conditions"]] == ["listener_blocked"]
    assert status["conditions"][0]["blocks_ready"]
    assert status["listeners"]["blocked"] == 1
    assert status["listeners"]["conditions"] == [status["conditions"][0]["id"]]
    time.sleep(RETRY_LAST + 1)  # tried again, which only what it would say shows
    assert len(errors(worker)) == 1
    squatter.signal(signal.SIGKILL)
    worker.wait_event("listener_unblocked", 30)
    status = worker.wait_status(lambda s: s["state"] == "ready" and not s["conditions"], 30)
    assert status["listeners"]["blocked"] == 0


@pytest.mark.ray
@pytest.mark.usefixtures("end")
@pytest.mark.runs("rayfwd reload")
def test_metrics_blocked_and_a_forward_to_nobody(cluster: Cluster) -> None:
    """The first ends with what has the port, the second with a better file that is read again."""
    w1, port = cluster.lab.machine("w1"), 9477
    squatter = squat(w1, port)
    config = cluster.configs["w1"]
    own = {"metrics.listen": f"127.0.0.1:{port}"}
    change(config, {**own, "forward": [{"listen": "127.0.0.1:7000", "to": "nobody:80"}]})
    worker = cluster.start_node("w1")
    event = worker.wait_event("metrics_blocked")
    assert f"sport = :{port}" in event["remedy"]
    seen = worker.wait_event("forward_target_unknown", where={"node": "w1/127.0.0.1:7000"})
    assert "the plan has no node nobody" in seen["cause"]
    status = worker.wait_status(lambda s: s["state"] == "ready", 30)
    codes = [(problem["code"], problem["severity"]) for problem in status["conditions"]]
    assert sorted(codes) == [("forward_target_unknown", "note"), ("metrics_blocked", "error")]
    # The other node is told of what is more than a note.
    blocked = {"node": "w1", "seen_by": "w1"}
    cluster.head.wait_event("metrics_blocked", 20, where=blocked)
    squatter.signal(signal.SIGKILL)
    worker.wait_event("metrics_listening", 30)
    change(config, {"forward": [{"listen": "127.0.0.1:7000", "to": "head:80"}]})
    w1.write(CONFIG, cluster.config("w1"))
    w1.run([str(cluster.lab.rayfwd), "reload", "--config", CONFIG])
    worker.wait_status(lambda s: not s["conditions"], 30)
    cluster.head.wait_event("problem_over", 30, where={"node": "w1", "code": "metrics_blocked"})
    assert [event["event"] for event in errors(worker)] == ["metrics_blocked"]
    change(config, {"metrics": None, "forward": None})


def squat(machine: Machine, port: int) -> Any:
    """A program that holds a port on every address."""
    code = (
        f"import socket, time; s = socket.create_server(('0.0.0.0', {port})); "
        "print('held', flush=True); time.sleep(1000)"
    )
    assert machine.lab.rayfwd is not None
    process = machine.popen([str(machine.lab.rayfwd.with_name("python")), "-c", code])
    until(lambda: "held" in process.log.read_text(), 20, lambda: f"port {port}")
    return process
