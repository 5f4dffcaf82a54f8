"""`rayfwd add --ray`: the head's Ray and Python on machines that have no Ray and no package index.

One installs by venv and pip, one by uv. A third one has the system's Python only: where the head's
Ray has another, it is told so. What the head sends is its own Ray as wheels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME
from tests.lab.test_join import SETS, InFront, task
from tests.need import ray_envs

pytestmark = [pytest.mark.ray, pytest.mark.thorough, pytest.mark.timeout(900)]

BY_PIP, BY_UV, WITHOUT = "w1", "w2", "w3"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, uv: Path) -> Iterator[InFront]:
    """Ready; from the others nothing of its Ray is seen."""
    with Lab(tmp_path_factory.mktemp("lab"), names=("head", BY_PIP, BY_UV, WITHOUT)) as lab:
        head, *others = lab.machines
        head.start_sshd()
        for machine in others:
            machine.authorize(head.public_key)
            machine.firewall([22])
            machine.start_sshd()
            machine.run(["mount", "-t", "tmpfs", "none", str(ray_envs())], user="root")
        head.know(*(f"{machine.address} {machine.host_key}" for machine in others))
        python = Path(str(head.ray_python())).resolve().parent
        for name in (BY_PIP, BY_UV):  # the Python of the head's Ray, as its users have it there
            lab.machine(name).write(f"{HOME}/.bashrc", f"PATH={python}:$PATH\n")
        lab.machine(BY_UV).write(f"{HOME}/.local/bin/uv", "")
        place = lab.machine(BY_UV).host_path(f"{HOME}/.local/bin/uv")
        shutil.copyfile(uv, place)
        place.chmod(0o755)
        found = InFront(head, ["head"])
        found.wait_ready()
        yield found
        found.stop(30)


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, as pip installs it."""
    folder = tmp_path_factory.mktemp("uv")
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "uv"]
    subprocess.run(argv, check=True, timeout=300)
    return folder / "bin" / "uv"


def add(head: InFront, *words: str) -> subprocess.CompletedProcess[str]:
    began = time.monotonic()
    argv = [str(head.machine.lab.rayfwd), "add", *words, "--ray", *SETS]
    ran = head.machine.run(argv, timeout=800, check=False)
    print(ran.stdout, ran.stderr, f"{time.monotonic() - began:.1f} s")
    return ran


def python_of(machine: Machine, python: str) -> str:
    ask = "import platform; print(platform.python_version())"
    return machine.run([python, "-c", ask]).stdout.strip()


def reached(machine: Machine) -> str:
    return f"ray@{machine.address}"


def test_the_heads_ray_is_brought_by_pip_and_by_uv(head: InFront) -> None:
    lab = head.machine.lab
    names = (BY_PIP, BY_UV, WITHOUT)
    ran = add(head, *(reached(lab.machine(name)) for name in names))
    lines = ran.stdout.splitlines()
    wanted = python_of(head.machine, str(head.machine.ray_python()))
    has_it = python_of(lab.machine(WITHOUT), "/usr/bin/python3") == wanted
    if has_it:
        assert lines[-1] == "3 of 3 in the cluster"
    else:
        assert lines[-1] == f"2 of 3 in the cluster; 1 failed: {WITHOUT}"
        (failed,) = [line for line in lines if line.startswith(f"{WITHOUT}  FAILED")]
        assert re.search(
            r"at `Ray`: add_no_python: it has no Python 3\.\d+\.\d+ \(it has 3\.", failed
        )
    for name in (BY_PIP, BY_UV):
        place = f"{HOME}/.local/share/rayfwd-ray"
        assert f"{name}  Ray       Ray 2.60.0 in {place}" in lines
        started = lab.machine(name).run(["pgrep", "-fa", "raylet/raylet"]).stdout
        assert f" {place}/lib/" in started
    assert lab.machine(BY_UV).host_path(f"{HOME}/.cache/uv").exists(), "uv was at work"
    assert not lab.machine(BY_PIP).host_path(f"{HOME}/.cache/uv").exists()
    assert len(task(head.machine)) == (4 if has_it else 3)


def test_what_is_there_is_not_brought_again(head: InFront) -> None:
    lab = head.machine.lab
    ran = add(head, *(reached(lab.machine(name)) for name in (BY_PIP, BY_UV)))
    assert ran.stdout.splitlines()[-1] == "2 of 2 in the cluster; 2 unchanged"
    assert ran.stdout.count("rayfwd-ray, as it is here") == 2


def test_it_goes_with_what_was_added(head: InFront) -> None:
    lab = head.machine.lab
    argv = [str(lab.rayfwd), "remove", BY_PIP, BY_UV]
    ran = head.machine.run(argv, timeout=300)
    assert ran.stdout.splitlines()[-1] == "2 of 2 removed"
    for name in (BY_PIP, BY_UV):
        # What uv has kept for itself is uv's.
        ours = [
            "find",
            HOME,
            "-path",
            f"{HOME}/.cache/uv",
            "-prune",
            "-o",
            "-name",
            "*rayfwd*",
            "-print",
        ]
        assert not lab.machine(name).run(ours).stdout
