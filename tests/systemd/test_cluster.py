"""A cluster set up by the README's commands on two bare machines; to Ray, the worker has a GPU.

Then the service as systemd and the journal see it. Then `systemctl restart rayfwd` and an upgrade
under a job that counts every call: none is lost. Then boots, in whatever order and with the network
late, after which the cluster is there by itself: nobody says anything to systemd but to boot.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass

import pytest

from rayfwd.system.logs import REPEAT_LIMIT
from tests.lab.loadgen import Job
from tests.lab.process import until
from tests.systemd.cluster import BOTH, PYTHON, Cluster, raylet
from tests.systemd.machines import Lab, Machine

pytestmark = pytest.mark.timeout(400)

RAYS_LOG = "/var/lib/rayfwd/ray.log"
OPENED = """
import errno, os
def opened(path):
    try:
        os.close(os.open(path, os.O_RDWR))
        return "opened"
    except OSError as exc:
        return errno.errorcode[exc.errno]
"""

GPU = f"""{OPENED}
import json, subprocess, ray
ray.init(address="auto", logging_level="error", log_to_driver=False)

@ray.remote(num_gpus=1, num_cpus=0)
def look():
    subprocess.run(["nvidia-modprobe", "-m", "666", "/dev/nvidia-uvm", "c", "1", "3"])
    devices = [opened("/dev/nvidia" + name) for name in ("0", "-uvm", "ctl")]
    return ray.util.get_node_ip_address(), os.environ["CUDA_VISIBLE_DEVICES"], devices

print("done", json.dumps(ray.get(look.remote(), timeout=60)))
"""
"""A task of one GPU opens what CUDA opens, and has made what is made at the first use."""


@dataclass
class Stages:
    """The worker's unit as it was on the way."""

    without_head: dict[str, str]
    ready: dict[str, str]


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages({}, {})


@pytest.fixture(scope="module")
def cluster(lab: Lab, stages: Stages) -> Cluster:
    """Set up, started and ready; there is no GPU, but its devices. The worker is started first, the
    head when the worker waits for it."""
    cluster = Cluster(lab, further='auth = "token"\n')
    cluster.set_up()
    config = cluster.worker.host_path(cluster.config)
    config.write_text(config.read_text() + "num_gpus = 1\n")
    devices = cluster.worker
    # Numbers of /dev/null, which can be opened, and a GPU's own, behind which there is nothing.
    devices.run(["mknod", "-m", "666", "/dev/nvidia0", "c", "1", "3"])
    devices.run(["mknod", "-m", "666", "/dev/nvidiactl", "c", "195", "255"])
    # It is a setuid program that makes /dev/nvidia-uvm when a user's program first needs it.
    devices.run(["install", "-m", "4755", "/usr/bin/mknod", "/usr/local/bin/nvidia-modprobe"])
    cluster.worker.systemctl("enable", "--now", "--no-block", "rayfwd")
    stages.without_head = cluster.worker.wait_for_status("waiting: on the head: ")
    cluster.start()
    cluster.wait_ready()
    stages.ready = cluster.worker.show()
    return cluster


@pytest.fixture(scope="module")
def worker(cluster: Cluster) -> Machine:
    return cluster.worker


def test_ready_means_that_tasks_run_on_every_node(cluster: Cluster) -> None:
    for machine in cluster.lab.machines:
        shown = machine.show()
        assert (shown["ActiveState"], shown["NRestarts"]) == ("active", "0")
        assert shown["StatusText"].startswith("ready")
    assert cluster.addresses_that_work() == BOTH


def test_a_task_with_a_gpu_reaches_its_devices(cluster: Cluster) -> None:
    said = cluster.head.run([str(PYTHON), "-c", GPU], user="ray", timeout=120).stdout
    (done,) = [line for line in said.splitlines() if line.startswith("done ")]
    address, visible, devices = json.loads(done.removeprefix("done "))
    assert (address, visible) == ("127.77.0.2", "0")
    # As in a login, where no unit forbids anything: there is no driver to answer (ENXIO).
    login = f"{OPENED}print(opened('/dev/nvidiactl'))"
    driver = cluster.worker.run(["python3", "-c", login], user="ray").stdout.strip()
    assert devices == ["opened", "opened", driver]


def test_what_ray_may_and_what_rayfwd_may(cluster: Cluster) -> None:
    """Ray what a login may; the part that talks to the network has no devices."""
    worker = cluster.worker
    ray = worker.show("rayfwd-ray")
    assert (ray["DevicePolicy"], ray.get("DeviceAllow", ""), ray["PrivateDevices"]) == (
        "auto",
        "",
        "no",
    )
    assert no_new_privileges(worker, raylet(worker)) == "0"
    daemon = worker.show()["MainPID"]
    assert no_new_privileges(worker, daemon) == "1"
    seen = worker.run(["ls", f"/proc/{daemon}/root/dev"]).stdout.split()
    assert "null" in seen
    assert [name for name in seen if name.startswith("nvidia")] == []


def no_new_privileges(machine: Machine, pid: str | int) -> str:
    lines = machine.read(f"/proc/{pid}/status").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)["NoNewPrivs"]


# -- as systemd and the journal see it: ready, status, lost links, what is logged


def test_ready_only_when_the_job_is_being_done(cluster: Cluster, stages: Stages) -> None:
    before, ready = stages.without_head, stages.ready
    assert (before["ActiveState"], before["SubState"]) == ("activating", "start")
    assert (ready["ActiveState"], ready["SubState"]) == ("active", "running")
    assert ready["NRestarts"] == "0"
    (said,) = cluster.worker.events("rayfwd_ready")
    (up,) = cluster.worker.events("ray_started")
    assert int(said["__MONOTONIC_TIMESTAMP"]) >= int(up["__MONOTONIC_TIMESTAMP"])


def test_status_in_plain_words(stages: Stages, worker: Machine) -> None:
    without_head = stages.without_head["StatusText"]
    assert without_head.startswith("waiting: on the head: no hub answers on /run/rayfwd/hub.sock")
    assert stages.ready["StatusText"].startswith("ready: 2 nodes in the plan")
    assert 'Status: "ready' in worker.systemctl("status", "rayfwd")


def test_a_lost_link_alone_restarts_nothing(cluster: Cluster, worker: Machine) -> None:
    lab, before = cluster.lab, worker.show()
    parked = len(worker.events("link_parked"))
    lab.cut(worker)
    until(lambda: len(worker.events("link_parked")) > parked, 60, lambda: "the link is parked")
    away = worker.wait_for_status("waiting: ")
    lab.heal(worker)
    after = worker.wait_for_status("ready")
    for state in (away, after):
        assert state["ActiveState"] == "active"
        for key in ("MainPID", "NRestarts", "InvocationID", "ActiveEnterTimestampMonotonic"):
            assert state[key] == before[key]
    assert worker.events("link_resumed")


def test_fields_are_fields(worker: Machine) -> None:
    lanes = worker.journal("LANE=interactive")
    assert {entry["EVENT"] for entry in lanes} >= {"lane_up", "lane_lost"}
    (plan,) = {entry["ADDRESS"] for entry in worker.events("plan_received")}
    assert plan == "127.77.0.2"
    for entry in worker.events():
        assert entry["_SYSTEMD_UNIT"] == "rayfwd.service"
        assert entry["SYSLOG_IDENTIFIER"] == "rayfwd"
        assert entry["MESSAGE"].startswith(entry["EVENT"])


def test_severities(cluster: Cluster, worker: Machine) -> None:
    """What `journalctl -p warning` shows is what somebody has to look at."""
    bad = {entry["EVENT"] for entry in worker.journal("--priority", "warning") if "EVENT" in entry}
    assert "link_parked" in bad
    assert not bad & {"rayfwd_starting", "lane_up", "ray_output", "rayfwd_ready"}
    assert {entry["PRIORITY"] for entry in worker.events()} <= {"3", "4", "6"}


@pytest.mark.runs(
    "journalctl -u rayfwd",
    "journalctl -u rayfwd -f",
    "journalctl -u rayfwd -o json",
    "journalctl -u rayfwd -p warning",
)
def test_the_documents_ways_to_read_it(worker: Machine) -> None:
    asked = ["journalctl", "--no-pager", "-u", "rayfwd"]

    def said(*words: str) -> str:
        return worker.run([*asked, *words]).stdout

    assert "plan_received" in said()
    follows = worker.popen([*asked, "-f", "-n", "all"])
    until(lambda: "plan_received" in follows.log.read_text(), 30, follows.log.read_text)
    follows.signal(signal.SIGTERM)
    follows.wait(20)
    events = {json.loads(line).get("EVENT") for line in said("-o", "json").splitlines()}
    assert "plan_received" in events
    assert "plan_received" not in said("-p", "warning")


@pytest.mark.runs(
    "journalctl -u rayfwd EVENT=lane_lost NODE=*",
    "journalctl -u rayfwd-ray",
    "journalctl -u rayfwd-net",
    "systemctl status rayfwd-ray",
    "systemctl start rayfwd-ray",
    "systemctl start rayfwd",
    "systemctl reload ssh",
    "systemctl enable --now ssh",
)
def test_the_units_that_remedies_name(cluster: Cluster, worker: Machine) -> None:
    """Each is there under that name. What runs goes on: to start it again changes nothing."""
    head = cluster.head
    lost = ["journalctl", "--no-pager", "-u", "rayfwd", "EVENT=lane_lost", "NODE=worker"]
    assert "lane_lost" in head.run(lost).stdout
    for unit in ("rayfwd-ray", "rayfwd-net"):
        said = worker.run(["journalctl", "--no-pager", "-u", unit]).stdout
        assert f"{unit}.service" in said
    assert "Active: active" in worker.systemctl("status", "rayfwd-ray")
    before = {unit: worker.show(unit)["InvocationID"] for unit in ("rayfwd", "rayfwd-ray")}
    for unit in before:
        worker.systemctl("start", unit)
    assert {unit: worker.show(unit)["InvocationID"] for unit in before} == before
    head.systemctl("reload", "ssh")
    head.systemctl("enable", "--now", "ssh")
    head.wait_for("ssh", ActiveState="active")
    assert worker.show()["ActiveState"] == "active"


def test_what_ray_writes_is_tamed(worker: Machine) -> None:
    """Colours, a line of 300 kB, and more lines than anybody reads."""
    line = {name: f"{name}-marker" for name in ("coloured", "long", "many")}
    text = f"\x1b[31m{line['coloured']}\x1b[0m\n{line['long']} {'x' * 300_000}\n"
    text += "".join(f"{line['many']} {k}\n" for k in range(6 * REPEAT_LIMIT))
    worker.run(["sh", "-c", f"cat >>{RAYS_LOG}"], user="ray", input=text)

    def of(name: str) -> list[str]:
        return [e["MESSAGE"] for e in worker.events("ray_output") if line[name] in e["MESSAGE"]]

    until(lambda: worker.events("events_suppressed"), 30, lambda: "the flood is bounded")
    # Of one name so many are written in half a minute: the flood may come at the turn of two.
    assert 0 < len(of("many")) <= 2 * REPEAT_LIMIT
    (coloured,) = of("coloured")
    assert "\x1b" not in coloured
    (long,) = of("long")
    assert len(long.encode()) <= 4096


def test_every_entry_can_be_shown(cluster: Cluster) -> None:
    """As text: no control character, nothing that journalctl leaves out, no line over its limit."""
    for machine in cluster.lab.machines:
        for entry in machine.journal():
            message = entry["MESSAGE"]
            assert isinstance(message, str), entry
            assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", message) is None, entry
            assert len(message.encode()) <= 4096
            assert all(value is not None for value in entry.values())


@pytest.fixture(scope="module")
def secrets(worker: Machine) -> tuple[str, str, str]:
    """Ray's token, the worker's claim to its name, and of its SSH key a line that is its own."""
    token = worker.read("/home/ray/.ray/auth_token").strip()
    claim = worker.read("/var/lib/rayfwd/node.key").strip()
    key = worker.read("/etc/rayfwd/id_ed25519").splitlines()[3]  # the first is every key's
    assert len(token) > 20
    assert len(claim) > 20
    return token, claim, key


def test_no_secret(cluster: Cluster, secrets: tuple[str, str, str]) -> None:
    """In no entry of either."""
    for machine in cluster.lab.machines:
        everything = json.dumps(machine.journal(unit=None))
        assert [secret for secret in secrets if secret in everything] == []


def test_a_report(worker: Machine, secrets: tuple[str, str, str]) -> None:
    """The doctor's, of a service: both units' entries, and no secret, though a log has them."""
    said = f"said: {secrets[0]} {secrets[1]}\n{worker.read('/etc/rayfwd/id_ed25519')}"
    worker.run(["sh", "-c", f"cat >>{RAYS_LOG}"], user="ray", input=said)
    assert (
        worker.run(["rayfwd", "doctor", "--report", "/root/report", "--with-logs"]).returncode == 0
    )
    assert worker.run(["stat", "-c", "%a %U", "/root/report"]).stdout == "600 root\n"
    report = worker.read("/root/report")
    journal = report.partition("\n== journal\n")[2].partition("\n== ")[0]
    for event in ("lane_up", "rayfwd_ready", "keeper_listening"):
        assert event in journal
    assert "said: " in report
    assert [secret for secret in secrets if secret in report] == []


# -- restarts and an upgrade

UPGRADE = "/opt/rayfwd/bin/pip install --upgrade --force-reinstall --no-deps /wheels/rayfwd-*.whl"
"""As docs/operations.md has it, each file of rayfwd replaced under its keeper."""


@pytest.fixture(scope="module")
def job(cluster: Cluster) -> Job:
    return cluster.job()


@pytest.mark.parametrize("name", ["worker", "head"])
def test_a_restart_costs_no_call(cluster: Cluster, job: Job, name: str) -> None:
    taken = cluster.restart(cluster.lab.machine(name))
    assert taken["RESET"] == "0"
    assert int(taken["STREAMS"]) > 5
    cluster.goes_on(job)
    job.check()


@pytest.mark.runs("/opt/rayfwd/bin/pip install --upgrade *")
def test_nor_does_an_upgrade(cluster: Cluster, job: Job) -> None:
    for machine in cluster.lab.machines:
        machine.run(["sh", "-c", UPGRADE], timeout=120)
        assert cluster.restart(machine)["RESET"] == "0"
    cluster.goes_on(job)
    job.finish()
    job.check()


def test_nothing_stays_with_the_service_manager(cluster: Cluster) -> None:
    """But the listeners' sockets, as one descriptor, while it runs."""
    for machine in cluster.lab.machines:
        assert machine.show()["NFileDescriptorStore"] == "1"
        assert not machine.events("handover_failed")
        assert not machine.events("handover_refused")


# -- boots


def system_state(machine: Machine) -> str:
    """What a user sees who asks how the boot went."""
    return machine.systemctl("is-system-running", check=False).strip()


def test_head_reboots(cluster: Cluster) -> None:
    """Its Ray is another one afterwards: the worker's joins that."""
    cluster.head.reboot()
    cluster.wait_ready()
    assert cluster.addresses_that_work() == BOTH
    assert not cluster.head.events("stop_or_restart_unknown"), "D-Bus ends after it"


@pytest.mark.thorough  # as the next one, with the head there; lab/test_losses.py does that too
def test_worker_reboots(cluster: Cluster) -> None:
    before = cluster.worker.status()["node"]
    cluster.worker.reboot()
    cluster.wait_ready()
    assert cluster.addresses_that_work() == BOTH
    assert cluster.worker.status()["node"] == before, "its address and its ports are its own"


@pytest.mark.runs("systemctl is-system-running")
def test_worker_is_up_before_the_head(cluster: Cluster) -> None:
    """And says what it waits for; systemd has it as starting, and does not give it up."""
    before = cluster.worker.status()["node"]
    for machine in (cluster.worker, cluster.head):
        machine.poweroff()
    cluster.worker.boot()
    shown = cluster.worker.wait_for_status("waiting: ")
    assert (shown["ActiveState"], shown["SubState"]) == ("activating", "start")
    assert "head" in shown["StatusText"]
    # Nothing else of the boot waits for the head.
    for unit in ("multi-user.target", "getty.target", "systemd-user-sessions"):
        cluster.worker.wait_for(unit, ActiveState="active")

    def jobs() -> list[str]:
        listed = cluster.worker.systemctl("list-jobs", "--no-legend")
        return [line.split()[1] for line in listed.splitlines()]

    until(lambda: jobs() == ["rayfwd.service"], 30, lambda: f"jobs: {jobs()}")
    assert system_state(cluster.worker) == "starting", "as docs/operations.md says"
    cluster.head.boot()
    cluster.wait_ready()
    until(lambda: system_state(cluster.worker) == "running", 20, lambda: "the boot is finished")
    assert cluster.addresses_that_work() == BOTH
    assert cluster.worker.status()["node"] == before, "its address and its ports are its own"


def test_both_reboot_at_once_and_the_network_is_late(cluster: Cluster) -> None:
    """Later than network-online.target: systemd stops waiting for a cable at some time."""
    wait = "/lib/systemd/systemd-networkd-wait-online"
    text = f"[Service]\nExecStart=\nExecStart={wait} --timeout=2\n"
    for machine in cluster.lab.machines:
        drop_in = "/etc/systemd/system/systemd-networkd-wait-online.service.d"
        machine.run(["mkdir", "-p", drop_in])
        machine.write(f"{drop_in}/short.conf", text)
        cluster.lab.unplug(machine)
    for machine in cluster.lab.machines:
        machine.reboot()
    cluster.head.wait_for(ActiveState="active")  # it needs nobody
    shown = cluster.worker.wait_for_status("waiting: ")
    assert shown["ActiveState"] == "activating"
    assert cluster.worker.show("network-online.target")["ActiveState"] == "active"
    for machine in cluster.lab.machines:
        cluster.lab.plug(machine)
    cluster.wait_ready()
    assert cluster.addresses_that_work() == BOTH
    for machine in cluster.lab.machines:
        assert machine.show()["NRestarts"] == "0", "it waited; it did not fail and begin again"
