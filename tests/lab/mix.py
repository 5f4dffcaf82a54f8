"""Faults mixed by a seed under a counted Ray job, over rayfwd or over autossh: what each loses.

    RAYFWD_RAY_ENVS=… python -m tests.lab.mix --over rayfwd --seed 1 --minutes 10 --cuts 60

Needs root, as the lab does, and for `--over autossh` the Debian package autossh. Both carry the
same plan: the same addresses and ports, the same Ray flags and time-outs, the same faults at the
same times. autossh has what helps it: keep-alives of 2 s on both sides, no pause before it tries
again, and an sshd that lets it bind the plan's addresses. Prints a line a cut, and the numbers at
the end. docs/faults.md has them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayfwd.cluster.plan import NodePlan, allocate, head_plan
from rayfwd.config import RayConfig
from rayfwd.ray.commandline import RayPlan, by_hand
from tests.lab import package
from tests.lab.cluster import Cluster
from tests.lab.faults import Cut, Faults, provoke, schedule, strict_firewalls
from tests.lab.loadgen import ECHO, LISTENERS, Echoes, Job, listeners
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME
from tests.need import tool

WAYS = ("w1>head", "head>w1", "w1>w2", "w2>head")
LANES = {"w1": 3, "w2": 2}
"""Of each worker's link over rayfwd."""
RIDE_THROUGH = 120.0
NETWORK = "127.77.0.0/16"
DRIVER = "w1"
"""Whose link carries the driver's words to all others."""
KEEP_ALIVE = 2
"""Seconds between keep-alives of ssh and sshd under autossh; two unanswered end a connection."""
NO_FURTHER: Mapping[str, Iterable[int]] = {}
SSHD_FOR_AUTOSSH = (
    *("-o", "GatewayPorts=clientspecified"),
    *("-o", f"ClientAliveInterval={KEEP_ALIVE}", "-o", "ClientAliveCountMax=2"),
)


@contextmanager
def over_rayfwd(lab: Lab, **overrides: Any) -> Iterator[Cluster]:
    """A cluster whose links are rayfwd's, with `LANES`."""
    own: dict[str, Any] = {name: {"forward": listeners(name)} for name in LISTENERS}
    for name, lanes in LANES.items():
        own[name]["head.bulk_lanes"] = lanes - 1
    own["every"] = {"expose": [ECHO], "ride_through": RIDE_THROUGH, **overrides}
    cluster = Cluster(lab, **own)
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")
    cluster.start(["w1", "w2"])
    cluster.wait_ready()
    yield cluster
    cluster.stop()


@contextmanager
def over_autossh(
    lab: Lab,
    version: str = "2.60.0",
    further: Mapping[str, Iterable[int]] = NO_FURTHER,
    env: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """The same plan by `autossh` with `-L` and `-R`, and Ray started by hand.

    `further`: other ports that are forwarded, too, by machine. `env`: more for Ray.
    """
    ports = {"gcs": 6379, "dashboard": 8265, "client": 10001}
    plans = [head_plan("head", NETWORK, 20000, 40, ports)]
    for name in ("w1", "w2"):
        plans.append(allocate(plans, name, NETWORK, 20000, 40, None))
    head = lab.machine("head")
    head.start_sshd(SSHD_FOR_AUTOSSH)
    for plan in plans[1:]:
        machine = lab.machine(plan.name)
        machine.write(f"{HOME}/.ssh/config", ssh_config(plan, plans, head, further))
        machine.popen([tool("autossh"), "-M", "0", "-N", "head"], env={"AUTOSSH_GATETIME": "0"})
    for plan in plans:
        machine = lab.machine(plan.name)
        ray = RayConfig(
            command=str(machine.ray(version)),
            num_cpus=1,
            worker_ports=40,
            object_store_memory=300_000_000,
        )
        line = by_hand(RayPlan(plan, plans[0], ray, RIDE_THROUGH, NETWORK))
        machine.run(["bash", "-c", line], timeout=120, env=env)
    yield


def ssh_config(
    own: NodePlan,
    plans: list[NodePlan],
    head: Machine,
    further: Mapping[str, Iterable[int]] = NO_FURTHER,
) -> str:
    """All forwards of one worker: the others' ports here, and its own on the head."""
    lines = [
        "Host head",
        f"HostName {head.address}",
        "ExitOnForwardFailure yes",
        f"ServerAliveInterval {KEEP_ALIVE}",
        "ServerAliveCountMax 2",
        "ConnectTimeout 5",
    ]
    for plan in plans:
        for port in (*plan.ports, *further.get(plan.name, ())):
            where = f"{plan.address}:{port} {plan.address}:{port}"
            lines.append(f"{'RemoteForward' if plan is own else 'LocalForward'} {where}")
    for name, listener in LISTENERS.items():
        if name == own.name:
            lines.append(f"RemoteForward 127.0.0.1:{listener} 127.0.0.1:{ECHO}")
        else:
            port = ECHO if name == "head" else listener
            lines.append(f"LocalForward 127.0.0.1:{listener} 127.0.0.1:{port}")
    return "".join(f"{line}\n" for line in lines)


def mix(faults: Faults, cuts: list[Cut], slot: float, seed: int) -> Iterator[tuple[Cut, float]]:
    """Do them one after another, one every `slot` seconds at most; each with when it began."""
    chance = random.Random(seed)
    for cut in cuts:
        began = time.monotonic()
        provoke(faults, cut, chance)
        yield cut, began
        time.sleep(max(0.5, began + slot * chance.uniform(0.5, 1.5) - time.monotonic()))


def numbers(job: Job, echoes: Echoes, began: float) -> dict[str, Any]:
    """What the job and the echoes say in the end."""
    counts = job.counts()
    failed = [line for line in echoes.failed() if line["began"] >= began]
    return {
        "seconds": round(time.monotonic() - began),
        **{
            f"{kind}s": {key: count[key] for key in ("done", "failed", "longest")}
            for kind, count in counts.items()
        },
        "ran twice": sum(count["again"] for count in counts.values()),
        "corrupt": sum(count["corrupt"] for count in counts.values()),
        "nodes dead": len(job.dead),
        "connections broken": sum(line["what"] == "echo" for line in failed),
        "new connections failed": sum(line["what"] == "new" for line in failed),
        "longest echo": round(echoes.longest(began), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--over", choices=("rayfwd", "autossh"), default="rayfwd")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cuts", type=int, default=60)
    parser.add_argument("--logs", type=Path, help="where logs are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayfwd-mix-", dir="/tmp") as folder:
        where = Path(folder)
        package.current() or package.install(where / "package")
        with Lab(args.logs or where / "lab") as lab:
            strict_firewalls(lab)
            link = over_rayfwd if args.over == "rayfwd" else over_autossh
            with link(lab):
                result = run(lab, args)
    print(json.dumps({"over": args.over, "seed": args.seed, **result}, indent=1), flush=True)
    return 0


def run(lab: Lab, args: argparse.Namespace) -> dict[str, Any]:
    """One job, all cuts, and the numbers."""
    faults = Faults(lab, SSHD_FOR_AUTOSSH if args.over == "autossh" else ())
    driver = lab.machine(DRIVER)
    job = Job(driver, driver.ray_python())
    echoes = Echoes(lab, WAYS)
    echoes.beats()
    began = time.monotonic()
    cuts = schedule(args.seed, args.cuts, ["w1", "w2"])
    for cut, at in mix(faults, cuts, 60 * args.minutes / args.cuts, args.seed):
        so_far = {kind: count["failed"] for kind, count in job.counts().items()}
        print(f"{at - began:6.1f} s  {cut.name} {cut.worker} {cut.seconds}  failed {so_far}")
        sys.stdout.flush()
        if job.lines.process.poll() is not None:
            print("the driver has ended")
            break
    try:
        job.finish(120)
    except (TimeoutError, AssertionError) as exc:
        print(f"the job did not end in order: {str(exc)[:500]}")
    return numbers(job, echoes, began) | {"cuts": len(cuts)}


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    sys.exit(main())
