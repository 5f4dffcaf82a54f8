"""A training job under mixed faults, over rayfwd's overlay or over autossh: does it lose a step?

    RAYFWD_RAY_ENVS=… python -m tests.lab.training --over rayfwd --seed 1 --minutes 2

Needs root, as the lab does, and for `--over autossh` the Debian package autossh, which is helped
with what it cannot carry by itself: torch and gloo listen on ports that the kernel chooses, so each
machine chooses from few of its own, and all of these are forwarded; an interface has the plan's
address.
Prints a line a fault, and the numbers at the end. docs/faults.md has them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab import package
from tests.lab.cluster import Cluster
from tests.lab.faults import Cut, Faults, schedule, strict_firewalls
from tests.lab.loadgen import Lines
from tests.lab.machines import Lab
from tests.lab.mix import RIDE_THROUGH, SSHD_FOR_AUTOSSH, mix, over_autossh
from tests.lab.process import HOME, until
from tests.setup_envs import LIBRARIES

JOB = Path(__file__).with_name("ddp_job.py")
NOTICED = 8.0
"""Seconds that a fault which lasts no time may cost: a silent peer is noticed in 6, and 2 later
data flows again."""
CHOSEN = {
    "head": range(44000, 44400),
    "w1": range(44400, 44800),
    "w2": range(44800, 45200),
}
"""The ports that the kernel chooses from under autossh. Where ssh or sshd listens on a port for
another machine, the kernel has it for no connection of this one, so these are no two machines'."""

Rank = dict[str, Any]


class Training:
    """DDP from a driver on one machine, for so many seconds; all ranks train once it is made, and
    `rest` for so many seconds after each step."""

    def __init__(self, lab: Lab, where: str, seconds: float, rest: float = 0.0) -> None:
        machine = lab.machine(where)
        script = f"{HOME}/{JOB.name}"
        machine.write(script, JOB.read_text())
        argv = [str(machine.ray_python(LIBRARIES)), script, str(seconds), str(rest)]
        address = {"RAY_ADDRESS": "127.77.0.1:6379"}
        self.lines = Lines(machine.popen(argv, env=address))
        until(self._begun, 150, lambda: f"the training does not begin{lab.tails()}")

    def _begun(self) -> bool:
        process = self.lines.process
        assert process.poll() is None, process.log.read_text()[-4000:]
        return self.lines.last("training") == {"training": 3}

    def end(self, timeout: float) -> list[Rank]:
        """Tell it to end now; what `finish` returns."""
        process = self.lines.process
        assert process.poll() is None, f"it has ended: {process.log.read_text()[-4000:]}"
        process.signal(signal.SIGTERM)
        return self.finish(timeout)

    def finish(self, timeout: float) -> list[Rank]:
        """What the ranks say, which have done the same steps with the same outcome."""
        process = self.lines.process
        assert process.wait(timeout) == 0, process.log.read_text()[-4000:]
        last = self.lines.last("ranks")
        assert last is not None
        ranks: list[Rank] = last["ranks"]
        assert {rank["host"] for rank in ranks} == {"head", "w1", "w2"}
        for same in ("steps", "loss", "parameters"):
            assert len({rank[same] for rank in ranks}) == 1, f"{same}: {ranks}"
        return ranks


def longest_silence(cuts: Sequence[Cut]) -> float:
    """Seconds that these faults may stall a step."""
    return max(NOTICED, *(cut.seconds for cut in cuts))


@contextmanager
def over_rayfwd(lab: Lab) -> Iterator[Cluster]:
    """A cluster whose nodes all have the overlay, as containers with NET_ADMIN."""
    cluster = Cluster(lab, LIBRARIES, ride_through=RIDE_THROUGH)
    lab.machine("head").start_sshd()
    for name in cluster.names:
        cluster.start_node(name, net_admin=True)
    cluster.wait_ready(240)
    yield cluster
    cluster.stop()


@contextmanager
def over_autossh_with_help(lab: Lab) -> Iterator[None]:
    """autossh with the ports that torch and gloo will listen on."""
    for number, machine in enumerate(lab.machines, 1):
        chosen = CHOSEN[machine.name]
        few = f"net.ipv4.ip_local_port_range={chosen[0]} {chosen[-1]}"
        pair = "ip link add rayfwd0 type veth peer name rayfwd0-p && ip link set rayfwd0-p up"
        own = f"ip addr add 127.77.0.{number}/32 dev rayfwd0 && ip link set rayfwd0 up"
        machine.run(["sh", "-c", f"{pair} && {own} && sysctl -qw '{few}'"], user="root")
    with over_autossh(lab, LIBRARIES, CHOSEN, {"GLOO_SOCKET_IFNAME": "rayfwd0"}):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--over", choices=("rayfwd", "autossh"), default="rayfwd")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--cuts", type=int, default=12)
    parser.add_argument("--logs", type=Path, help="where logs are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayfwd-training-", dir="/tmp") as folder:
        where = Path(folder)
        package.current() or package.install(where / "package")
        with Lab(args.logs or where / "lab") as lab:
            strict_firewalls(lab)
            link: Any = over_rayfwd if args.over == "rayfwd" else over_autossh_with_help
            with link(lab):
                result = run(lab, args)
    print(json.dumps({"over": args.over, "seed": args.seed, **result}, indent=1), flush=True)
    return 0


def run(lab: Lab, args: argparse.Namespace) -> dict[str, Any]:
    """One job, all faults, and the numbers."""
    faults = Faults(lab, SSHD_FOR_AUTOSSH if args.over == "autossh" else ())
    training = Training(lab, "w1", 60 * args.minutes + 600)
    process = training.lines.process
    began = time.monotonic()
    cuts = schedule(args.seed, args.cuts, ["w1", "w2"])
    done = []
    for cut, at in mix(faults, cuts, 60 * args.minutes / args.cuts, args.seed):
        print(f"{at - began:6.1f} s  {cut.name} {cut.worker} {cut.seconds}", flush=True)
        done.append(cut)
        if process.poll() is not None:
            break
    took = round(time.monotonic() - began)
    numbers = {"faults": len(done), "seconds": took, "silence": longest_silence(done)}
    if process.poll() is not None:
        return {**numbers, "ended": process.log.read_text()[-1500:]}
    return {**numbers, "ranks": training.end(120)}


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    sys.exit(main())
