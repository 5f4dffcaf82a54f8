"""What docs/operations.md says of a cluster that changes: the head moves, keys change, a node goes.

By its commands, in this order, on one cluster. Ray is not started: none of this is its business.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.systemd.cluster import Cluster
from tests.systemd.install import installed
from tests.systemd.machines import RAY, Lab, Machine

ROSTER = "/var/lib/rayfwd/roster.json"
KEYS = "/home/ray/.ssh/authorized_keys"
KEY = "/etc/rayfwd/id_ed25519"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """With a machine that is to be the next head."""
    names = ("head", "worker", "heir")
    with Lab(tmp_path_factory.mktemp("lab"), installed("bookworm"), names) as made:
        made.boot()
        made.machine("heir").firewall(22)
        yield made


@pytest.fixture(scope="module")
def heir(lab: Lab) -> Machine:
    return lab.machine("heir")


@pytest.fixture(scope="module")
def moved(lab: Lab, head: Machine, worker: Machine) -> Cluster:
    """A head and a worker that run."""
    cluster = Cluster(lab)
    cluster.init_head()
    cluster.authorize(cluster.init_worker())
    for machine in (head, worker):
        start(machine)
    return cluster


def start(machine: Machine) -> None:
    config = machine.host_path("/etc/rayfwd.toml")
    config.write_text(config.read_text().replace("[ray]\n", "[ray]\nstart = false\n"))
    machine.systemctl("enable", "--now", "--no-block", "rayfwd")
    machine.wait_for(ActiveState="active")


def nodes(head: Machine) -> list[str]:
    return [entry["name"] for entry in head.status()["roster"]]


@pytest.mark.runs(
    "systemctl disable --now rayfwd",
    "rayfwd init head",
    "install -D -m 0600 roster.json /var/lib/rayfwd/roster.json",
    "rayfwd init worker --head * --fingerprint *",
    "systemctl restart rayfwd",
    "systemctl enable --now --no-block rayfwd",
)
def test_the_head_moves(moved: Cluster, head: Machine, heir: Machine, worker: Machine) -> None:
    before = worker.status()["node"]
    head.systemctl("disable", "--now", "rayfwd")
    heir.run(["rayfwd", "init", "head", "--ray", RAY])
    heir.write("/root/roster.json", head.read(ROSTER))
    heir.run(["sh", "-c", f"cd /root && install -D -m 0600 roster.json {ROSTER}"])
    heir.run(["install", "-d", "-m", "0700", "/home/ray/.ssh"], user="ray")
    heir.write(KEYS, head.read(KEYS), "ray", 0o600)
    start(heir)
    init = ["rayfwd", "init", "worker", "--head", "ray@heir", "--fingerprint", heir.fingerprint]
    said = worker.run(init).stdout
    assert "/etc/rayfwd.toml was left as it is, because it was edited" in said
    config = worker.host_path("/etc/rayfwd.toml")
    config.write_text(config.read_text().replace('ssh = "ray@head"', 'ssh = "ray@heir"'))
    worker.systemctl("restart", "rayfwd")
    worker.wait_for(ActiveState="active")
    assert nodes(heir) == ["heir", "worker"]
    assert worker.status()["node"] == before, "its address and its ports are its own"


@pytest.mark.runs("mv /etc/rayfwd/id_ed25519 /etc/rayfwd/id_ed25519.old")
def test_a_workers_key_is_rotated(moved: Cluster, heir: Machine, worker: Machine) -> None:
    worker.run(["mv", KEY, f"{KEY}.old"])
    said = worker.run(["rayfwd", "init", "worker"]).stdout
    (line,) = [text.strip() for text in said.splitlines() if "restrict,command=" in text]
    assert line not in heir.read(KEYS), "it is another key"
    heir.write(KEYS, f"{line}\n", "ray", 0o600)
    worker.systemctl("restart", "rayfwd")
    worker.wait_for(ActiveState="active")


@pytest.mark.runs("rayfwd uninstall --purge", "rayfwd forget --keep-token *")
def test_a_node_is_removed(moved: Cluster, heir: Machine, worker: Machine) -> None:
    worker.run(["rayfwd", "uninstall", "--purge"], timeout=150)
    heir.run(["rayfwd", "forget", "--keep-token", "worker"])
    assert nodes(heir) == ["heir"]
