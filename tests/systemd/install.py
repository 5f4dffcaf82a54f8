"""rayfwd installed on a Debian root as the README says, from a wheel of this checkout.

What the installation writes is kept as a layer above the root, named after the wheel and the root:
it is made once for each state of the sources.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import shutil
import stat
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from tests import setup_firewalls, setup_roots, setup_wheel

README = (
    "python3 -m venv /opt/rayfwd && /opt/rayfwd/bin/pip install {wheel}"
    " && ln -s /opt/rayfwd/bin/rayfwd /usr/local/bin/"
)
"""The README's commands, with the wheel in place of the checkout that it is made of."""

INSTALL = r"""
set -eu
tree=$1 layer=$2 wheels=$3 command=$4
mount -t tmpfs tmpfs /mnt
mkdir /mnt/root
mount -t overlay -o "lowerdir=$tree,upperdir=$layer/upper,workdir=$layer/work" overlay /mnt/root
mkdir /mnt/root/wheels
mount --bind "$wheels" /mnt/root/wheels
mount -t proc proc /mnt/root/proc
chroot /mnt/root env -i PATH=/usr/bin:/bin LANG=C.UTF-8 PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels \
    PIP_ROOT_USER_ACTION=ignore sh -c "umask 022; $command"
umount /mnt/root/proc /mnt/root/wheels
rmdir /mnt/root/wheels
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """A root with rayfwd on it."""

    suite: str
    lower: tuple[Path, ...]
    """Directories for an overlay, the uppermost first."""
    wheels: Path
    """rayfwd's wheel and those of all that it needs."""


def installed(suite: str) -> Installed:
    """Install rayfwd on that root, where that has not been done. Raises RuntimeError."""
    root = setup_roots.place(suite)
    layers = setup_roots.default_root() / "rayfwd"
    layers.mkdir(exist_ok=True)
    with (layers / f".{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wheel = setup_wheel.make(pure=True)
        names = "\0".join([root.name, setup_roots.wheels(suite).name, README, INSTALL])
        inputs = wheel.read_bytes() + names.encode()
        layer = layers / f"{suite}-{hashlib.sha256(inputs).hexdigest()[:12]}"
        if not layer.exists():
            fresh = layers / f"{suite}-new"
            shutil.rmtree(fresh, ignore_errors=True)
            _install(suite, fresh, wheel)
            fresh.rename(layer)
        # Those of other states, a run of which may still be under way: not the last few.
        old = sorted(layers.glob(f"{suite}-*"), key=lambda path: path.stat().st_mtime)
        for path in old[:-4]:
            shutil.rmtree(path)
    return Installed(suite, (layer / "upper", root / "tree"), layer / "wheels")


def with_ray_of(suite: str, of: str) -> Installed:
    """Like `installed`, but with another suite's Ray and the Python that it needs.

    Ray wants the same Python on all nodes, which two Debians do not bring; what rayfwd runs with
    stays the suite's own. Hard links, and made once for each pair of roots.
    """
    made = installed(suite)
    source = setup_roots.place(of) / "tree"
    layers = setup_roots.default_root() / "rayfwd"
    names = "\0".join([source.parent.name, inspect.getsource(_link_ray)])
    layer = layers / f"ray-of-{of}-{hashlib.sha256(names.encode()).hexdigest()[:12]}"
    with (layers / f".{layer.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not layer.exists():
            fresh = layers / f"{layer.name}-new"
            shutil.rmtree(fresh, ignore_errors=True)
            _link_ray(source, fresh)
            fresh.rename(layer)
    upper, *below = made.lower
    return replace(made, lower=(upper, layer, *below))


def with_firewalls() -> Installed:
    """Like `installed`, with Debian's ufw, firewalld and iptables, all of them switched off."""
    made = installed(setup_firewalls.SUITE)
    upper, *below = made.lower
    return replace(made, lower=(upper, setup_firewalls.place() / "upper", *below))


def _link_ray(source: Path, layer: Path) -> None:
    (python,) = (source / "usr/bin").glob("python3.??")
    for path in (Path("usr/lib") / python.name, Path("home/ray/venv")):
        shutil.copytree(source / path, layer / path, symlinks=True, copy_function=os.link)
    (layer / "usr/bin").mkdir()
    os.link(python, layer / "usr/bin" / python.name)
    own = layer / "home/ray/venv/bin/python3"  # /usr/bin/python3 is another one there
    own.unlink()
    own.symlink_to(f"/usr/bin/{python.name}")
    # Directories that are in several layers have the owner and the mode of the uppermost.
    for folder, _, _ in os.walk(layer):
        seen = (source / Path(folder).relative_to(layer)).stat()
        os.chown(folder, seen.st_uid, seen.st_gid)
        os.chmod(folder, stat.S_IMODE(seen.st_mode))


def _install(suite: str, fresh: Path, wheel: Path) -> None:
    for path in (fresh / "upper", fresh / "work", fresh / "wheels"):
        path.mkdir(parents=True)
    shutil.copy(wheel, fresh / "wheels")
    for path in setup_roots.wheels(suite).glob("*.whl"):
        os.link(path, fresh / "wheels" / path.name)
    command = README.format(wheel=f"/wheels/{wheel.name}")
    words = [str(setup_roots.place(suite) / "tree"), str(fresh), str(fresh / "wheels"), command]
    ran = subprocess.run(
        ["unshare", "--mount", "sh", "-c", INSTALL, "install", *words],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=300,
    )
    if ran.returncode != 0:
        raise RuntimeError(f"{command}: {ran.stdout[-4000:]}\n{ran.stderr[-4000:]}")
    shutil.rmtree(fresh / "work")
