"""Makes the layer with firewalls that tests/systemd/test_overlay.py puts above a Debian root.

Usage: python -m tests.setup_firewalls [--root DIRECTORY]

DIRECTORY/firewalls-KEY/upper has Debian's ufw, firewalld and iptables, all of them switched off.
KEY is made of all that goes in. The packages come from where this machine's apt takes them from.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests import setup_roots
from tests.setup_roots import Runner, complete, key, mirror

SUITE = "bookworm"
PACKAGES = ("ufw", "firewalld", "iptables")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

INSTALL = r"""
set -eu
tree=$1 layer=$2 debs=$3
mount -t tmpfs tmpfs /mnt
mkdir /mnt/root
mount -t overlay -o "lowerdir=$tree,upperdir=$layer/upper,workdir=$layer/work" overlay /mnt/root
mkdir /mnt/root/debs
mount --bind "$debs" /mnt/root/debs
mount -t proc proc /mnt/root/proc
mount --rbind /dev /mnt/root/dev
chroot /mnt/root env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DPKG_FORCE=unsafe-io \
    DEBIAN_FRONTEND=noninteractive sh -c \
    'dpkg --install /debs/*.deb && systemctl disable ufw.service firewalld.service'
umount -l /mnt/root/dev
umount /mnt/root/proc /mnt/root/debs
rmdir /mnt/root/debs
umount /mnt/root
"""


def place(root: Path | None = None) -> Path:
    """The directory of the layer, there or not."""
    inputs = [Path(__file__).read_text(), setup_roots.place(SUITE, root).name]
    return (root or setup_roots.default_root()) / f"firewalls-{key(inputs)}"


def missing() -> str | None:
    """Why there are no machines with these firewalls; None: there are."""
    if complete(place()).exists():
        return None
    return f"there is no {place()}: run tests/setup_firewalls.py (see RAYFWD_ROOTS)"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--root", type=Path, default=setup_roots.default_root(), metavar="DIRECTORY"
    )
    root = parser.parse_args().root.absolute()
    os.umask(0o022)
    with (root / ".firewalls.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        began, goal = time.monotonic(), place(root)
        if not complete(goal).exists():
            for old in root.glob("firewalls-*"):
                shutil.rmtree(old)
            log = root / ".firewalls.log"
            with log.open("w") as out:
                try:
                    make(goal, setup_roots.place(SUITE, root) / "tree", Runner(out.fileno()))
                except (subprocess.CalledProcessError, OSError) as exc:
                    tail = log.read_text(errors="replace")[-3000:]
                    raise SystemExit(f"firewalls: {exc}\n{tail}") from None
            complete(goal).touch()
    print(f"firewalls: {goal} is there, after {time.monotonic() - began:.0f} s", flush=True)


def make(goal: Path, tree: Path, run: Runner) -> None:
    """Fetch what the tree does not have, and install it above."""
    goal.mkdir()
    apt, debs = goal / "apt", goal / "apt/cache/archives"
    for needed in (apt / "state/lists/partial", debs / "partial", goal / "upper", goal / "work"):
        needed.mkdir(parents=True)
    sources = apt / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {mirror()} {SUITE} main\n")
    options = {
        "APT::Sandbox::User": "root",
        "Dir::State": f"{apt}/state",
        "Dir::State::status": f"{tree}/var/lib/dpkg/status",
        "Dir::Cache": f"{apt}/cache",
        "Dir::Etc::sourcelist": str(sources),
        "Dir::Etc::sourceparts": "-",
    }
    get = ["apt-get", "-q", "-y", *(f"-o{name}={value}" for name, value in options.items())]
    run(*get, "update")
    run(*get, "--no-install-recommends", "--download-only", "install", *PACKAGES)
    run("unshare", "--mount", "sh", "-c", INSTALL, "install", tree, goal, debs)
    shutil.rmtree(goal / "work")
    shutil.rmtree(apt)


if __name__ == "__main__":
    main()
