"""A cluster set up by the README's commands on two bare machines; to Ray, the worker has a GPU."""

from __future__ import annotations

import json

import pytest

from tests.systemd.cluster import PYTHON, Cluster
from tests.systemd.machines import Lab, Machine

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


@pytest.fixture(scope="module")
def cluster(lab: Lab) -> Cluster:
    """Set up, started and ready; there is no GPU, but its devices."""
    cluster = Cluster(lab)
    cluster.set_up()
    config = cluster.worker.host_path(cluster.config)
    config.write_text(config.read_text() + "num_gpus = 1\n")
    devices = cluster.worker
    # Numbers of /dev/null, which can be opened, and a GPU's own, behind which there is nothing.
    devices.run(["mknod", "-m", "666", "/dev/nvidia0", "c", "1", "3"])
    devices.run(["mknod", "-m", "666", "/dev/nvidiactl", "c", "195", "255"])
    # It is a setuid program that makes /dev/nvidia-uvm when a user's program first needs it.
    devices.run(["install", "-m", "4755", "/usr/bin/mknod", "/usr/local/bin/nvidia-modprobe"])
    cluster.start()
    cluster.wait_ready()
    return cluster


def test_ready_means_that_tasks_run_on_every_node(cluster: Cluster) -> None:
    for machine in cluster.lab.machines:
        shown = machine.show()
        assert (shown["ActiveState"], shown["NRestarts"]) == ("active", "0")
        assert shown["StatusText"].startswith("ready")
    assert cluster.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]


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
    assert no_new_privileges(worker, worker.run(["pgrep", "-x", "raylet"]).stdout.strip()) == "0"
    daemon = worker.show()["MainPID"]
    assert no_new_privileges(worker, daemon) == "1"
    seen = worker.run(["ls", f"/proc/{daemon}/root/dev"]).stdout.split()
    assert "null" in seen
    assert [name for name in seen if name.startswith("nvidia")] == []


def no_new_privileges(machine: Machine, pid: str) -> str:
    lines = machine.read(f"/proc/{pid}/status").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)["NoNewPrivs"]
