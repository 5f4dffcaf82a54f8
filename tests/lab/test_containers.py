"""examples/compose under Podman: a head on a machine, two workers in containers of another one.

The image of the Containerfile begins with a Debian of ours, which has Python and Ray, since none
can be fetched. Of the rest nothing is stood in for: podman-compose builds the image of this
checkout and starts it, and rayfwd is process 1 in a network and a user of its own.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import setup_roots
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, entering, environment, until
from tests.lab.test_join import TASK, InFront
from tests.need import CHECKOUT, need, no_machines, tool

pytestmark = [pytest.mark.ray, pytest.mark.thorough, pytest.mark.timeout(900)]

BASE = "docker.io/library/python:3.11-slim"
VENV = "/home/ray/venv"
"""Where the Debian's Ray is, which the head has at the same place."""
PLACE = "/run/checkout"
WORKERS = ("worker-1", "worker-2")
WITHIN = 8.5

PREPARE = """
set -e
userdel ray
cp -r "$1" /wheels
exec tar --create --one-file-system --directory / .
"""
CONF = """
[containers]
cgroups = "disabled"
default_ulimits = [{limits}]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
"""No more than a machine of the lab may: it makes no control groups, and raises no limit."""


def no_podman() -> str | None:
    if not os.path.isabs(tool("podman")):
        return "containers need podman (Debian packages podman and netavark)"
    return no_machines()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    need(no_podman())
    with Lab(tmp_path_factory.mktemp("lab"), names=("head", "box")) as made:
        yield made


@pytest.fixture(scope="module")
def head(lab: Lab) -> Iterator[InFront]:
    """With the containers' Ray, and `rayfwd` where a command over SSH finds it."""
    machine = lab.machine("head")
    machine.host_path(VENV).mkdir()
    tree = (setup_roots.place("bookworm") / "tree").resolve()  # as the machine sees it
    machine.run(["mount", "--bind", f"{tree}{VENV}", VENV], user="root")
    assert lab.rayfwd is not None
    machine.write(f"{HOME}/.bashrc", f"PATH={lab.rayfwd.parent}:$PATH\n")
    machine.start_sshd()
    head = InFront(machine, ["head"], ray=f"{VENV}/bin/ray")
    head.wait_ready()
    yield head
    head.stop(30)


@pytest.fixture(scope="module")
def box(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine with Podman, the checkout, and what the image begins with."""
    box = lab.machine("box")
    box.run(["mkdir", "-p", "/var/lib/containers"], user="root")
    box.run(["mount", "-t", "tmpfs", "none", "/var/lib/containers"], user="root")
    # One version of control groups, as crun wants it.
    box.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], user="root")
    box.host_path("/run/containers.conf").write_text(CONF.format(limits=", ".join(limits())))
    tools, wheels = (tmp_path_factory.mktemp(name) for name in ("compose", "wheels"))
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", "--target", str(tools), "podman-compose"], check=True)
    subprocess.run([*pip, "wheel", "--wheel-dir", str(wheels), "hatchling"], check=True)
    for wheel in setup_roots.wheels("bookworm").glob("*.whl"):
        shutil.copy(wheel, wheels)
    shutil.copytree(tools, box.host_path("/run") / "compose")
    check_out(box)
    bring_base(box, wheels, tmp_path_factory.mktemp("space"))
    return box


def limits() -> Iterator[str]:
    """The most that a process here may have."""
    for name in ("memlock", "nofile", "nproc"):
        most = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        yield f'"{name}={most}:{most}"'


def check_out(box: Machine) -> None:
    """What git has of this checkout, and the key beside the compose file."""
    place = box.host_path("/run") / "checkout"
    listed = subprocess.run(
        ["git", "-C", str(CHECKOUT), "ls-files"], check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, place / name)
    ssh = place / "examples/compose/ssh"
    ssh.mkdir(mode=0o700)
    head = box.lab.machine("head")
    (ssh / "id_ed25519").write_text((box.lab.folder / "box-user").read_text())
    (ssh / "id_ed25519").chmod(0o600)
    (ssh / "known_hosts").write_text(f"{head.address} {head.host_key}\n")
    for path in (ssh, *ssh.iterdir()):
        os.chown(path, setup_roots.UID, setup_roots.UID)


def bring_base(box: Machine, wheels: Path, space: Path) -> None:
    """The Debian as an image: Python with Ray on the PATH, and packages for pip."""
    tree = setup_roots.place("bookworm") / "tree"
    enter = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        setup_roots.ENTER,
        "enter",
        tree,
        space,
        wheels,
        "--",
    ]
    inside = ["sh", "-c", PREPARE, "prepare", wheels]
    path = f"PATH={VENV}/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    given = [f"ENV {path}", "ENV PIP_NO_INDEX=1", "ENV PIP_FIND_LINKS=/wheels"]
    words = ["podman", "import", *(f"--change={one}" for one in given), "-", BASE]
    with subprocess.Popen([str(word) for word in [*enter, *inside]], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            entering(box._init.pid, words, "root", "/"),
            stdin=tar.stdout,
            env=environment("root", CONTAINERS),
            check=True,
            timeout=300,
        )
    assert tar.returncode == 0


CONTAINERS = {"CONTAINERS_CONF": "/run/containers.conf", "BUILDAH_ISOLATION": "chroot"}


def podman(box: Machine, *words: str, timeout: float = 60) -> str:
    env = {**CONTAINERS, "HEAD": f"ray@{box.lab.machine('head').address}"}
    return box.run(["podman", *words], user="root", env=env, timeout=timeout).stdout


def compose(box: Machine, *words: str, timeout: float = 60) -> str:
    """As the compose file has it at its top, in the checkout."""
    env = {**CONTAINERS, "HEAD": f"ray@{box.lab.machine('head').address}"}
    env["PYTHONPATH"] = "/run/compose"
    line = ["python3", "-m", "podman_compose", "-f", "examples/compose/compose.yaml", *words]
    argv = ["env", f"--chdir={PLACE}", *line]
    ran = box.run(argv, user="root", env=env, timeout=timeout)
    print(ran.stdout[-2000:], ran.stderr[-2000:])
    return ran.stdout


def up(head: InFront) -> set[str]:
    return {w["name"] for w in head.status()["workers"] if w["state"] == "up" and not w["left"]}


def names(box: Machine) -> list[str]:
    found = podman(box, "ps", "--all", "--format", "{{.Names}}").split()
    return sorted(name for name in found if "worker" in name)


def test_two_workers_in_containers(head: InFront, box: Machine) -> None:
    began = time.monotonic()
    compose(box, "build", timeout=600)
    print(f"built in {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    compose(box, "up", "-d", timeout=300)

    def ready() -> bool:
        workers = head.status()["workers"]
        return {w["name"] for w in workers if (w["ray"] or {}).get("state") == "up"} == set(WORKERS)

    until(ready, 120, lambda: json.dumps(head.status()["workers"]))
    argv = [str(head.machine.lab.rayfwd), "exec", "--", f"{VENV}/bin/python", "-c", TASK]
    ran = head.machine.run(argv, timeout=120).stdout.splitlines()[-1]
    assert len(json.loads(ran)) == 3
    print(f"from `up` to tasks on both: {time.monotonic() - began:.1f} s")


def test_64_mb_are_named_before_ray_is_started(head: InFront, box: Machine) -> None:
    """Docker's default, and a user id that the image does not know, without a home."""
    image = podman(box, "inspect", "--format", "{{.Image}}", names(box)[0]).strip()
    words = ["run", "--detach", "--name", "bare", "--shm-size=64m", "--hostname=bare"]
    words += ["--user=4242:4242", "--passwd=false", "--volume=/run/keys:/keys:ro", image]
    keys = box.host_path("/run/keys")
    shutil.copytree(box.host_path(f"{PLACE}/examples/compose/ssh"), keys)
    for path in (keys, *keys.iterdir()):
        os.chown(path, 4242, 4242)
    to = f"ray@{head.machine.address}"
    words += ["join", to, "-i", "/keys/id_ed25519", "--known-hosts", "/keys/known_hosts"]
    words += ["--state-dir=/tmp/rayfwd", "--runtime-dir=/tmp/rayfwd/run", "--ephemeral"]
    podman(box, *words)
    until(lambda: "bare" in up(head), 60, lambda: logs(box, "bare"))
    until(lambda: "ray_started" in logs(box, "bare"), 60, lambda: logs(box, "bare"))
    said = logs(box, "bare")
    assert "docker run --shm-size=" in said
    assert said.index("shared_memory_small") < said.index('"ray_starting"')
    stops(head, box, "bare", "bare")


def test_each_leaves_in_time_and_the_cluster_is_told_at_once(head: InFront, box: Machine) -> None:
    for container, name in zip(names(box), WORKERS, strict=True):
        stops(head, box, container, name)
    assert not up(head)
    assert [row["name"] for row in head.status()["roster"]] == ["head"]
    compose(box, "down")


def stops(head: InFront, box: Machine, container: str, name: str) -> None:
    """`podman stop`, which kills after 10 s."""
    began = time.monotonic()
    podman(box, "stop", container)
    took = time.monotonic() - began
    print(f"podman stop {container}: {took:.1f} s")
    assert took < WITHIN, logs(box, container)
    head.wait_event("node_leaving", 1, {"node": name})
    head.wait_event("node_given_back", 5, {"node": name})
    assert podman(box, "inspect", "--format", "{{.State.ExitCode}}", container).strip() == "0"


def logs(box: Machine, container: str) -> str:
    ran = box.run(["podman", "logs", container], user="root", env=CONTAINERS)
    return ran.stdout + ran.stderr
