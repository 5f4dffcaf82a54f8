"""examples/slurm/cluster.sh as a job of a real Slurm, from `sbatch` to the result of its tasks.

Two nodes, each with Debian's slurmd, munged and sshd; the first has slurmctld. They have Ray and
rayfwd on the PATH, no home in common, and no root is needed but for Slurm itself.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator

import pytest

from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, UID, CommandFailed, until
from tests.need import CHECKOUT, need, tool

pytestmark = pytest.mark.ray

NODES = ("head", "w1")
OTHER = ("ann", 1001, "/home/ann")
"""A second user of the same Slurm: name, id and home."""

SCRIPT = CHECKOUT / "examples" / "slurm" / "cluster.sh"

CONF = "/run/slurm/slurm.conf"

SLURM = """\
ClusterName=lab
SlurmctldHost=head(198.51.100.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
NodeName=head NodeAddr=198.51.100.1 CPUs=4
NodeName=w1 NodeAddr=198.51.100.2 CPUs=4
PartitionName=all Nodes=head,w1 Default=YES MaxTime=INFINITE State=UP
"""

TRAIN = """
import json, os, ray, time
ray.init(log_to_driver=False)
wanted = int(os.environ["SLURM_JOB_NUM_NODES"])
while len([n for n in ray.nodes() if n["Alive"]]) < wanted:
    time.sleep(0.2)

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def where():
    time.sleep(0.5)
    return ray.util.get_node_ip_address()

# A node that has just come still starts its first worker process, while the other does all tasks.
seen, end = set(), time.monotonic() + 60
while len(seen) < wanted and time.monotonic() < end:
    seen |= set(ray.get([where.remote() for _ in range(4 * wanted)]))
print("ran on", json.dumps(sorted(seen)), flush=True)
"""


def no_slurm() -> str | None:
    for name, package in (
        ("slurmctld", "slurmctld"),
        ("slurmd", "slurmd"),
        ("sbatch", "slurm-client"),
        ("munged", "munge"),
    ):
        if not os.path.isabs(tool(name)):
            return f"a job of Slurm needs {name} (Debian package {package})"
    return None


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes that are idle."""
    need(no_slurm())
    with Lab(tmp_path_factory.mktemp("lab"), names=NODES) as lab:
        key = secrets.token_bytes(128)
        for machine in lab.machines:
            prepare(machine, lab, key)
        head = lab.machine("head")
        start(head, [tool("slurmctld"), "-D", "-f", CONF])
        for machine in lab.machines:
            start(machine, [tool("slurmd"), "-D", "-f", CONF, "-N", machine.name])
        until(lambda: states(head) == {"idle"}, 60, lambda: f"idle nodes: {states(head)}")
        yield lab


def prepare(machine: Machine, lab: Lab, key: bytes) -> None:
    """Names, users, SSH between the nodes, and munge: what a site has before it has Slurm."""
    machine.nft("delete table inet firewall\n")  # nodes of a Slurm share a network
    machine.host_path("/etc/hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{m.address} {m.name}\n" for m in lab.machines)
    )
    name, uid, home = OTHER
    with machine.host_path("/etc/passwd").open("a") as users:
        users.write(f"{name}:x:{uid}:{UID}:{name}:{home}:/bin/bash\n")
    machine.host_path(home).mkdir()
    os.chown(machine.host_path(home), uid, UID)
    machine.authorize(*(m.public_key for m in lab.machines))
    machine.know(*(f"{m.name} {m.host_key}" for m in lab.machines))
    machine.start_sshd()
    for folder in ("/run/slurm", "/run/slurm/state", "/run/slurm/spool", "/run/munge"):
        machine.host_path(folder).mkdir(mode=0o755)
    machine.host_path(CONF).write_text(SLURM)
    secret = machine.host_path("/run/munge/key")
    secret.touch(mode=0o600)
    secret.write_bytes(key)
    munge = [f"--{what}-file=/run/munge/{what}" for what in ("key", "pid", "log", "seed")]
    socket = "/run/munge/munge.socket.2"
    start(machine, [tool("munged"), "--foreground", f"--socket={socket}", *munge])
    until(machine.host_path(socket).exists, 20, lambda: f"munged on {machine.name}")


def start(machine: Machine, argv: list[str]) -> None:
    machine.popen(argv, user="root", env={"SLURM_CONF": CONF})


def states(head: Machine) -> set[str]:
    asked = [tool("sinfo"), "--noheader", "--Node", "--format=%t"]
    return set(head.run(asked, env={"SLURM_CONF": CONF}, check=False).stdout.split())


def login(lab: Lab) -> dict[str, str]:
    """What a user's shell has there."""
    assert lab.rayfwd is not None
    paths = [lab.machine("head").ray().parent, lab.rayfwd.parent, "/usr/local/bin:/usr/bin:/bin"]
    return {"PATH": ":".join(map(str, paths)), "SLURM_CONF": CONF}


def sbatch(lab: Lab, *options: str, log: str = "job.out") -> list[str]:
    """The command of docs/join.md, from the user's copy of the checkout; the addresses at which
    its tasks ran."""
    head = lab.machine("head")
    head.write(f"{HOME}/train.py", TRAIN)
    head.write(f"{HOME}/examples/slurm/cluster.sh", SCRIPT.read_text())
    words = ["sbatch", "--wait", f"--output={log}", "--cpus-per-task=1", *options]
    began = time.monotonic()
    try:
        head.run(
            [*words, "examples/slurm/cluster.sh", "python", "train.py"], env=login(lab), timeout=240
        )
    except CommandFailed as exc:
        raise AssertionError(f"{exc}\n{head.host_path(f'{HOME}/{log}').read_text()}") from None
    print(f"from sbatch to the end of the job: {time.monotonic() - began:.1f} s")
    said = head.host_path(f"{HOME}/{log}").read_text()
    (ran,) = [line for line in said.splitlines() if line.startswith("ran on ")]
    found: list[str] = json.loads(ran.removeprefix("ran on "))
    return found


@pytest.mark.runs("sbatch examples/slurm/cluster.sh python train.py")
def test_a_job_has_a_cluster_of_its_nodes(slurm: Lab) -> None:
    """And leaves nothing: no process, no node that is drained, no state outside of its own."""
    assert sbatch(slurm) == ["127.77.0.1", "127.77.0.2"]
    head = slurm.machine("head")
    until(lambda: states(head) == {"idle"}, 30, lambda: f"idle nodes: {states(head)}")
    for machine in slurm.machines:
        until(lambda m=machine: not running(m), 10, lambda m=machine: running(m))  # type: ignore[misc]
        assert not machine.host_path(f"{HOME}/.local").exists()


@pytest.mark.thorough
def test_jobs_of_two_users_that_begin_together_on_one_node(slurm: Lab) -> None:
    """Each has a cluster of its own, and the result of its own tasks."""
    head = slurm.machine("head")
    name, uid, home = OTHER
    jobs = {}
    for user, number, where in (("ray", UID, HOME), (name, uid, home)):
        for path, text in (("train.py", TRAIN), ("cluster.sh", SCRIPT.read_text())):
            head.write(f"{where}/{path}", text, 0o644)
        become = ["setpriv", f"--reuid={number}", f"--regid={UID}", "--clear-groups", "--"]
        words = ["sbatch", "--wait", "--nodes=1", "--nodelist=head", "--cpus-per-task=1"]
        words += [f"--output={where}/job.out", f"--chdir={where}", f"{where}/cluster.sh"]
        env = {**login(slurm), "HOME": where, "USER": user, "LOGNAME": user}
        argv = [*become, *words, "python", f"{where}/train.py"]
        jobs[where] = head.popen(argv, user="root", env=env)
    seen = []
    for where, job in jobs.items():
        code = job.wait(240)
        said = head.host_path(f"{where}/job.out").read_text()
        assert code == 0, said
        seen += [line for line in said.splitlines() if line.startswith("ran on ")]
    assert len(set(seen)) == len(seen) == 2, seen


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.runs("scontrol requeue")
def test_a_job_that_is_requeued_leaves_in_order_and_begins_again(slurm: Lab) -> None:
    """Under its number, and so with the directories of its first run. Slurm starts it again after
    two minutes, when what it gave the first run no longer holds."""
    head = slurm.machine("head")
    head.write(f"{HOME}/twice.py", TRAIN + STAYS)
    head.write(f"{HOME}/cluster.sh", SCRIPT.read_text())
    words = ["sbatch", "--parsable", "--requeue", "--output=twice.out", "--open-mode=append"]
    words += ["--cpus-per-task=1", "cluster.sh", "python", "twice.py"]
    job = head.run(words, env=login(slurm)).stdout.strip()

    def said() -> str:
        written = head.host_path(f"{HOME}/twice.out")
        return written.read_text() if written.exists() else ""

    until(lambda: said().count("ran on") == 1, 120, said)
    began = time.monotonic()
    head.run(["scontrol", "requeue", job], env=login(slurm))
    until(lambda: not any(map(running, slurm.machines)), 25, lambda: f"all have ended: {said()}")
    print(f"left {time.monotonic() - began:.1f} s after `scontrol requeue`")
    shown = ["scontrol", "show", "job", job]

    def ended() -> bool:
        return "JobState=COMPLETED" in head.run(shown, env=login(slurm)).stdout

    until(ended, 300, lambda: head.run(shown, env=login(slurm)).stdout + said())
    first, second = (line for line in said().splitlines() if line.startswith("ran on "))
    assert first == second


STAYS = """
if not os.environ.get("SLURM_RESTART_COUNT"):
    time.sleep(600)
"""


def running(machine: Machine) -> str:
    """Processes of the job's cluster."""
    argv = ["pgrep", "-u", "ray", "-f", "rayfwd|raylet|gcs_server"]
    return machine.run(argv, check=False).stdout
