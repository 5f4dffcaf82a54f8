"""What a test needs of this machine: where it is missing the test is skipped, or fails.

Skipped with one reason; a failure where RAYFWD_REQUIRE=all, so that nothing is left out unseen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest

from tests import setup_envs, setup_firewalls, setup_roots

CHECKOUT = Path(__file__).resolve().parents[1]


def need(missing: str | None) -> None:
    """Skip or fail the running test when something is missing; None: nothing is."""
    if missing is not None and os.environ.get("RAYFWD_REQUIRE") == "all":
        pytest.fail(f"RAYFWD_REQUIRE=all, but {missing}", pytrace=False)
    if missing is not None:
        pytest.skip(missing)


def tool(name: str) -> str:
    """Path of a command, also of those that an ordinary PATH leaves out."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    return shutil.which(name, path=path) or name


def ray_envs() -> Path:
    """The directory with the environments `ray-VERSION` (RAYFWD_RAY_ENVS, else in the checkout)."""
    given = os.environ.get("RAYFWD_RAY_ENVS")
    return Path(given).absolute() if given else CHECKOUT / ".cache" / "ray-envs"


def no_ray(version: str) -> str | None:
    """Why there is no Ray of that version; None: there is."""
    command = ray_envs() / f"ray-{version}" / "bin" / "ray"
    if command.exists():
        return None
    return f"there is no {command}: run tests/setup_envs.py {version} (see RAYFWD_RAY_ENVS)"


def need_libraries(*modules: str) -> None:
    """Skip where a library cannot be had for the environment that has them, even if all is
    required; where one is missing that could be had, as `need`."""
    need(no_ray(setup_envs.LIBRARIES))
    env = ray_envs() / f"ray-{setup_envs.LIBRARIES}"
    for module in modules:
        if (reason := setup_envs.missing(ray_envs(), module)) is not None:
            pytest.skip(reason)
        folder = module.replace(".", "/")
        if not any(env.glob(f"lib/python3*/site-packages/{folder}")):
            need(f"{env} has no {module}: remove it, and run tests/setup_envs.py")


def no_compiler() -> str | None:
    """Why this Python cannot have the compiled wheel here; None: it can."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if not os.path.isabs(tool(compiler)):
        return f"the compiled wheel needs a compiler, {compiler} (Debian package gcc)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"the compiled wheel needs {header} (python3-dev)"


@cache
def no_machines() -> str | None:
    """Why no machine can be booted here (tests/systemd/); None: they can."""
    if (lab := no_lab()) is not None:
        return lab
    for name, package in (("systemd-nspawn", "systemd-container"), ("debootstrap", "debootstrap")):
        if not os.path.isabs(tool(name)):
            return f"the machines that are booted need {name} (Debian package {package})"
    roots = map(setup_roots.missing, setup_roots.SUITES)
    return next(filter(None, [*roots, setup_firewalls.missing()]), None)


@cache
def no_lab() -> str | None:
    """Why the lab's machines cannot be made here; None: they can."""
    if os.geteuid() != 0:
        return "the lab needs root"
    for name, package in (
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("tc", "iproute2"),
        ("conntrack", "conntrack"),
        ("sshd", "openssh-server"),
        ("ssh-keygen", "openssh-client"),
        ("nsenter", "util-linux"),
        ("setpriv", "util-linux"),
    ):
        if not os.path.isabs(tool(name)):
            return f"the lab needs {name} (Debian package {package})"
    unshare = [tool("unshare"), "--net", "--pid", "--mount", "--uts", "--ipc", "--fork"]
    firewall = [tool("nft"), "add table inet rayfwd_lab"]
    for what, argv in (("namespaces", ["true"]), ("nftables", firewall)):
        tried = subprocess.run([*unshare, *argv], capture_output=True, text=True, timeout=30)
        if tried.returncode != 0:
            return f"the lab needs {what}: {tried.stderr.strip()[-300:]}"
    return None
