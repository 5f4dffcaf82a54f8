"""Records `ray status` of real clusters for tests/fixtures/ray_status.

    RAYFWD_RAY_ENVS=… python -m tests.ray.record 2.60.0 v2 idle busy failures

As root or where user namespaces are allowed; each run has a namespace of its own, as the tests
beside it have (`init.py`). `v1` and `v2` are Ray's two autoscalers; the time zone is UTC.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from rayfwd.config import RayConfig
from rayfwd.ray import procfs
from rayfwd.ray.commandline import RayPlan, by_hand
from tests.need import CHECKOUT
from tests.ray.machines import HEAD, NETWORK, WORKER, ray_command
from tests.ray.test_ray import place

FOLDER = CHECKOUT / "tests" / "fixtures" / "ray_status"
GCS = "127.77.0.1:6379"

BUSY = """
import time, ray
ray.init(address="127.77.0.1:6379", logging_level="ERROR")
kept = ray.put(bytes(20_000_000))

@ray.remote
def hold():
    time.sleep(600)

held = hold.options(num_cpus=1, resources={"r_w1": 0.5}).remote()
waits = hold.options(num_cpus=3).remote()
print("asked", flush=True)
time.sleep(600)
"""


def main() -> None:
    version, autoscaler, *names = sys.argv[1:]
    if os.environ.get("RAYFWD_INSIDE") != "1":
        source = os.pathsep.join([str(CHECKOUT / "src"), str(CHECKOUT)])
        env = {**os.environ, "PYTHONPATH": source, "RAYFWD_INSIDE": "1", "TZ": "UTC"}
        again = [*place(), sys.executable, "-m", "tests.ray.record", *sys.argv[1:]]
        raise SystemExit(subprocess.run(again, cwd=CHECKOUT, env=env).returncode)
    os.environ["RAY_enable_autoscaler_v2"] = "1" if autoscaler == "v2" else "0"  # noqa: SIM112
    record(version, autoscaler, names)


def record(version: str, autoscaler: str, names: list[str]) -> None:
    ray = str(ray_command(version))

    def status() -> str:
        argv = [ray, "status", f"--address={GCS}"]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    def keep(name: str, good: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + 180
        while not good(text := status()):
            assert time.monotonic() < deadline, f"{name}: {text}"
            time.sleep(1)
        if name not in names:
            return
        mark = "" if autoscaler == "v1" else f"{autoscaler}-"
        (FOLDER / f"{version}-{mark}{name}.txt").write_text(text)
        print(f"-- {name}\n{text}", flush=True)

    for plan, resource in ((HEAD, "r_h"), (WORKER, "r_w1")):
        config = RayConfig(
            command=ray, num_cpus=1, resources={resource: 2}, object_store_memory=100_000_000
        )
        line = by_hand(RayPlan(plan, HEAD, config, 120.0, NETWORK))
        subprocess.run(line, shell=True, check=True, stdout=subprocess.DEVNULL)
    keep("idle", lambda text: "/2.0 r_w1" in text and "/2.0 r_h" in text)
    python = str(ray_command(version).with_name("python"))
    driver = subprocess.Popen([python, "-c", BUSY])
    keep("busy", lambda text: "0.5/2.0 r_w1" in text and "19.07MiB" in text and "'CPU': 3" in text)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    os.kill(raylet_of(WORKER.address), signal.SIGKILL)
    # Ray's first autoscaler lists failures only of nodes that it has launched itself.
    listed = autoscaler == "v2"
    keep("failures", lambda t: "r_w1" not in t and ("(no failures)" not in t or not listed))


def raylet_of(address: str) -> int:
    found = procfs.with_argument("raylet", f"--node_ip_address={address}")
    assert len(found) == 1, (address, found)
    return found[0].pid


if __name__ == "__main__":
    main()
