"""A healthy cluster under load, its links cut again and again: what rayfwd says of it meanwhile.

    RAYFWD_RAY_ENVS=… python -m tests.lab.false_alarms --minutes 20

Needs root, as the lab does. The counted job runs, canaries fly, and every cut is shorter than
`ride_through`, so nothing is wrong but the links for a while: an error would be a false alarm.
Prints what was said, by code, and ends with 1 where an error was, or where the job lost anything.
docs/faults.md has a run's outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.lab import package
from tests.lab.cluster import Cluster
from tests.lab.daemon import Daemon, Event
from tests.lab.faults import Faults, schedule, strict_firewalls
from tests.lab.loadgen import Echoes, Job
from tests.lab.machines import Lab
from tests.lab.mix import DRIVER, WAYS, mix, numbers, over_rayfwd
from tests.lab.named import rows, said_at

CANARY = {"canary": {"enabled": True, "interval": 60, "timeout": 60}}


def errors(daemons: Iterable[Daemon], since: float = 0.0) -> list[Event]:
    """Every event of level error, with who logged it; tracebacks too, whenever they were.

    `since` is in seconds since the epoch.
    """
    return [
        {"daemon": daemon.machine.name, **event}
        for daemon in daemons
        for event in daemon.events()
        if event.get("level", "error") == "error"
        and ("timestamp" not in event or said_at(event) >= since)
    ]


def warnings(daemons: Iterable[Daemon], since: float) -> dict[str, int]:
    """How often each warning was logged since then, by its name."""
    names = (
        event["event"]
        for daemon in daemons
        for event in daemon.events()
        if event.get("level") == "warning" and said_at(event) >= since
    )
    return dict(sorted(Counter(names).items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--cuts", type=int, default=40)
    parser.add_argument("--logs", type=Path, help="where logs are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayfwd-healthy-", dir="/tmp") as folder:
        where = Path(folder)
        package.current() or package.install(where / "package")
        with Lab(args.logs or where / "lab") as lab:
            strict_firewalls(lab)
            with over_rayfwd(lab, **CANARY) as cluster:
                return run(cluster, args)


def run(cluster: Cluster, args: argparse.Namespace) -> int:
    faults = Faults(cluster.lab)
    driver = cluster.lab.machine(DRIVER)
    job, echoes = Job(driver, driver.ray_python()), Echoes(cluster.lab, WAYS)
    echoes.beats()
    began, wall = time.monotonic(), time.time()
    cuts = schedule(args.seed, args.cuts, ["w1", "w2"])
    shown: Counter[tuple[str, str]] = Counter()
    for cut, at in mix(faults, cuts, 60 * args.minutes / args.cuts, args.seed):
        bad = {(row["code"], row["severity"]) for d in cluster.daemons for row in rows(d.status())}
        shown.update(bad)
        print(f"{at - began:6.1f} s  {cut.name} {cut.worker} {cut.seconds}  {sorted(bad)}")
        sys.stdout.flush()
    job.finish(120)
    daemons = cluster.daemons
    cried = errors(daemons, wall)
    severe = sorted(code for code, severity in shown if severity == "error")
    result: dict[str, Any] = {
        "cuts": len(cuts),
        "errors": cried,
        "shown as errors": severe,
        "warnings logged": warnings(daemons, wall),
        "shown after cuts": {f"{code} ({severity})": n for (code, severity), n in shown.items()},
        **numbers(job, echoes, began),
    }
    print(json.dumps(result, indent=1), flush=True)
    lost = bool(job.bad() or job.dead or echoes.failed())
    return 1 if cried or severe or lost else 0


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    sys.exit(main())
