"""The service as systemd and the journal see it: ready, status, lost links, what is logged."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest

from rayfwd.system.logs import REPEAT_LIMIT
from tests.lab.process import until
from tests.systemd.cluster import Cluster
from tests.systemd.machines import Lab, Machine

RAYS_LOG = "/var/lib/rayfwd/ray.log"


@dataclass
class Stages:
    """A cluster, and the worker's unit as it was on the way."""

    cluster: Cluster
    without_head: dict[str, str]
    ready: dict[str, str]


@pytest.fixture(scope="module")
def stages(lab: Lab) -> Stages:
    """The worker is started first, the head when the worker waits for it."""
    cluster = Cluster(lab, further='auth = "token"\n')
    cluster.set_up()
    cluster.worker.systemctl("enable", "--now", "--no-block", "rayfwd")
    without_head = cluster.worker.wait_for_status("waiting: on the head: ")
    cluster.start()
    cluster.wait_ready()
    return Stages(cluster, without_head, cluster.worker.show())


@pytest.fixture(scope="module")
def worker(stages: Stages) -> Machine:
    return stages.cluster.worker


def test_ready_only_when_the_job_is_being_done(stages: Stages) -> None:
    before, ready = stages.without_head, stages.ready
    assert (before["ActiveState"], before["SubState"]) == ("activating", "start")
    assert (ready["ActiveState"], ready["SubState"]) == ("active", "running")
    assert ready["NRestarts"] == "0"
    (said,) = stages.cluster.worker.events("rayfwd_ready")
    (up,) = stages.cluster.worker.events("ray_started")
    assert int(said["__MONOTONIC_TIMESTAMP"]) >= int(up["__MONOTONIC_TIMESTAMP"])
    assert stages.cluster.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]


def test_status_in_plain_words(stages: Stages, worker: Machine) -> None:
    without_head = stages.without_head["StatusText"]
    assert without_head.startswith("waiting: on the head: no hub answers on /run/rayfwd/hub.sock")
    assert stages.ready["StatusText"].startswith("ready: 2 nodes in the plan")
    assert 'Status: "ready' in worker.systemctl("status", "rayfwd")


def test_a_lost_link_alone_restarts_nothing(stages: Stages, worker: Machine) -> None:
    lab, before = stages.cluster.lab, worker.show()
    parked = len(worker.events("link_parked"))
    lab.cut(worker)
    until(lambda: len(worker.events("link_parked")) > parked, 60, lambda: "the link is parked")
    away = worker.wait_for_status("waiting: ")
    lab.heal(worker)
    after = worker.wait_for_status("ready")
    for shown in (away, after):
        assert shown["ActiveState"] == "active"
        for key in ("MainPID", "NRestarts", "InvocationID", "ActiveEnterTimestampMonotonic"):
            assert shown[key] == before[key]
    assert worker.events("link_resumed")
    assert stages.cluster.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]


def test_fields_are_fields(worker: Machine) -> None:
    lanes = worker.journal("LANE=interactive")
    assert {entry["EVENT"] for entry in lanes} >= {"lane_up", "lane_lost"}
    (plan,) = {entry["ADDRESS"] for entry in worker.events("plan_received")}
    assert plan == "127.77.0.2"
    for entry in worker.events():
        assert entry["_SYSTEMD_UNIT"] == "rayfwd.service"
        assert entry["SYSLOG_IDENTIFIER"] == "rayfwd"
        assert entry["MESSAGE"].startswith(entry["EVENT"])


def test_severities(stages: Stages, worker: Machine) -> None:
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
    def said(*words: str) -> str:
        """Ended after two seconds where it goes on by itself."""
        asked = ["timeout", "2", "journalctl", "--no-pager", "-u", "rayfwd", *words]
        return worker.run(asked, check=False).stdout

    assert "plan_received" in said()
    assert "plan_received" in said("-f", "-n", "all")
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
def test_the_units_that_remedies_name(stages: Stages, worker: Machine) -> None:
    """Each is there under that name. What runs goes on: to start it again changes nothing."""
    head = stages.cluster.head
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


def test_every_entry_can_be_shown(stages: Stages) -> None:
    """As text: no control character, nothing that journalctl leaves out, no line over its limit."""
    for machine in stages.cluster.lab.machines:
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


def test_no_secret(stages: Stages, secrets: tuple[str, str, str]) -> None:
    """In no entry of either."""
    for machine in stages.cluster.lab.machines:
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
