"""Makes the Debian roots that tests/systemd/ boots, where they are missing.

Usage: python tests/setup_roots.py [--root DIRECTORY] [SUITE...]

Each is DIRECTORY/SUITE-KEY/tree: a Debian by debootstrap with sshd, a firewall, a user `ray` and
that user's Ray, for which Debian's own Python was used. Beside it lies what rayfwd needs, for `pip
install` without a network: DIRECTORY/SUITE-KEY/wheels-KEY. Each KEY is made of all that goes in.
Packages come from where this machine's apt and pip are set up to take them from, and nothing of
that is left in the tree.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
RAY = "ray[default,client]==2.60.0"
UID = 1000

TOOLS = ("pytest>=8.2", "pytest-timeout>=2.3", "hypothesis>=6.100", "pip", "setuptools", "wheel")
"""What tests there need besides; the last three are what pipx wants to renew."""

# Debian's name, and what is unpacked there. The whole of systemd with a user's manager
# (libpam-systemd), a firewall, and Python as Debian has it.
PACKAGES = (
    "systemd-sysv,dbus,libpam-systemd,openssh-server,nftables,iproute2,iputils-ping,procps,"
    "python3,python3-venv"
)
SUITES = {"bookworm": f"{PACKAGES},pipx", "trixie": PACKAGES}

# What every machine of the lab has: its network by systemd-networkd, its firewall by nftables.
UNITS = ("systemd-networkd.service", "systemd-networkd-wait-online.service", "nftables.service")
NOT_WANTED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
)

ENTER = r"""
set -eu
tree=$1 space=$2; shift 2
mount -t tmpfs tmpfs "$space"
mkdir "$space/upper" "$space/work" "$space/root"
mount -t overlay -o "lowerdir=$tree,upperdir=$space/upper,workdir=$space/work" overlay "$space/root"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$space/root$1"
    else mkdir -p "$space/root${1%/*}"; rm -f "$space/root$1"; touch "$space/root$1"; fi
    mount --rbind "$1" "$space/root$1"; shift
done
shift
mount -t proc proc "$space/root/proc"
mount --rbind /dev "$space/root/dev"
exec chroot "$space/root" "$@"
"""
"""Runs a command in a copy of a tree that is gone afterwards, with these paths of this machine."""


def default_root() -> Path:
    given = os.environ.get("RAYFWD_ROOTS")
    return Path(given).absolute() if given else CHECKOUT / ".cache" / "roots"


def key(inputs: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:12]


def place(suite: str, root: Path | None = None) -> Path:
    """The directory of a suite, there or not."""
    inputs = [Path(__file__).read_text(), suite, SUITES[suite]]
    return (root or default_root()) / f"{suite}-{key(inputs)}"


def wheels(suite: str, root: Path | None = None) -> Path:
    """The directory of what rayfwd needs there, there or not."""
    return place(suite, root) / f"wheels-{key(requirements())}"


def missing(suite: str) -> str | None:
    """Why a suite cannot be booted; None: it can."""
    for path in (place(suite), wheels(suite)):
        if not complete(path).exists():
            return f"there is no {path}: run tests/setup_roots.py {suite} (see RAYFWD_ROOTS)"
    return None


def complete(path: Path) -> Path:
    """Its mark that a directory is whole, so that an interrupted run is made good by the next."""
    return path / ".complete"


def requirements() -> list[str]:
    """What rayfwd's wheel asks for, and the tests."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    return [*project["project"]["dependencies"], *TOOLS]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"default: {', '.join(SUITES)}")
    parser.add_argument("--root", type=Path, default=default_root(), metavar="DIRECTORY")
    args = parser.parse_args()
    os.umask(0o022)
    root = args.root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second finds all made
        wanted = args.suites or list(SUITES)
        with ThreadPoolExecutor(len(wanted)) as side_by_side:
            for _ in side_by_side.map(lambda suite: provide(suite, root), wanted):
                pass


def provide(suite: str, root: Path) -> None:
    began = time.monotonic()
    goal, beside = place(suite, root), wheels(suite, root)
    log = root / f"{suite}.log"
    with log.open("w") as out:
        run = Runner(out.fileno())
        try:
            if not complete(goal).exists():
                print(f"{suite}: making {goal} (some 200 MB to fetch, some minutes) …", flush=True)
                for old in root.glob(f"{suite}-*"):
                    shutil.rmtree(old)
                make(suite, goal, run)
                complete(goal).touch()
            if not complete(beside).exists():
                for old in goal.glob("wheels-*"):
                    shutil.rmtree(old)
                fetch(goal / "tree", requirements(), beside, run)
                complete(beside).touch()
        except (subprocess.CalledProcessError, OSError) as exc:
            tail = log.read_text(errors="replace")[-3000:]
            raise SystemExit(f"{suite}: {exc}\n{tail}") from None
    print(f"{suite}: {goal} is there, after {time.monotonic() - began:.0f} s", flush=True)


class Runner:
    """Runs commands, their output in a log."""

    def __init__(self, log: int) -> None:
        self._log = log

    def __call__(self, *argv: str | Path, **env: str) -> None:
        subprocess.run(
            [str(arg) for arg in argv],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **env},
            cwd="/",
        )


def make(suite: str, goal: Path, run: Runner) -> None:
    tree, ray_wheels = goal / "tree", goal / "ray-wheels"
    goal.mkdir()
    debootstrap(suite, tree, run)
    furnish(tree, run)
    fetch(tree, [RAY], ray_wheels, run)
    # Installed without what was there to fetch it.
    ray = "/home/ray/venv"
    install = (
        f"python3 -m venv {ray} && "
        f"exec {ray}/bin/pip install --quiet --no-index --find-links /wheels '{RAY}'"
    )
    (tree / "wheels").mkdir()
    bound = f'mount --bind "{ray_wheels}" "{tree}/wheels" && exec chroot "{tree}" "$@"'
    clean = ["env", "-i", "HOME=/home/ray", "PATH=/usr/bin:/bin", "LANG=C.UTF-8"]
    as_ray = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--"]
    inside = [*as_ray, *clean, "sh", "-c", install]
    run("unshare", "--mount", "sh", "-c", bound, "install", *inside)
    (tree / "wheels").rmdir()
    shutil.rmtree(ray_wheels)


def fetch(tree: Path, wanted: Sequence[str], into: Path, run: Runner) -> None:
    """Wheels of all that is wanted, as the tree's own Python needs them.

    In a copy of the tree that sees this machine's pip, its index, and the network.
    """
    into.mkdir()
    space = into.with_name(f"{into.name}-space")
    space.mkdir()
    quoted = " ".join(f"'{one}'" for one in wanted)
    command = f"python3 -m venv /venv && exec /venv/bin/pip wheel --quiet -w {into} {quoted}"
    given = dict.fromkeys([str(into), *pip_paths()])
    inside = ["sh", "-c", command]
    run("unshare", "--mount", "sh", "-c", ENTER, "enter", tree, space, *given, "--", *inside)
    space.rmdir()


def debootstrap(suite: str, tree: Path, run: Runner) -> None:
    words = ["--variant=minbase", f"--include={SUITES[suite]}"]
    # What is written is needed by nobody after a power cut.
    env = {"DPKG_FORCE": "unsafe-io", "DEBIAN_FRONTEND": "noninteractive"}
    run("debootstrap", *words, suite, tree, mirror(), **env, **proxies())
    for lists in (tree / "var/lib/apt/lists", tree / "var/cache/apt/archives"):
        shutil.rmtree(lists)
        lists.mkdir()
    (tree / "etc/apt/sources.list").write_text("")


def mirror() -> str:
    """Where this machine's apt has Debian's main archive."""
    release = Path("/etc/os-release").read_text()
    codename = re.search(r"(?m)^VERSION_CODENAME=\"?(\w+)", release)
    form = "$(RELEASE) $(COMPONENT) $(SITE)"
    asked = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    lines = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    for line in lines:
        suite, component, site = line.split()
        if codename is not None and suite == codename[1] and component == "main":
            return site
    raise SystemExit(f"apt has no archive of this machine's own Debian: {lines}")


def proxies() -> dict[str, str]:
    """As apt has them, for debootstrap."""
    found = {}
    for kind in ("http", "https"):
        dump = ["apt-config", "dump", "--format", "%v", f"Acquire::{kind}::Proxy"]
        said = subprocess.run(dump, check=True, capture_output=True, text=True).stdout.strip()
        if said and said != "DIRECT":
            found[f"{kind}_proxy"] = said
    return found


def pip_paths() -> Iterator[str]:
    """Files and directories of this machine that pip needs to reach its packages, here as there.

    Its configuration files, each path that is named in them or in the environment, its cache.
    """
    asked = [sys.executable, "-m", "pip", "config", "debug"]
    debug = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    files = [Path(path) for path in re.findall(r"(?m)^\s+(/\S+), exists: True", debug)]
    texts = [path.read_text() for path in files]
    texts += [v for k, v in os.environ.items() if k.startswith("PIP_") or "CERT" in k]
    named = [Path(found) for text in texts for found in re.findall(r"(?<![\w:/])/[\w./+-]+", text)]
    named += [Path(found) for text in texts for found in re.findall(r"file://(/[\w./+-]+)", text)]
    asked = [sys.executable, "-m", "pip", "cache", "dir"]
    cache = subprocess.run(asked, check=False, capture_output=True, text=True).stdout.strip()
    named += [Path(cache), Path("/etc/resolv.conf"), Path("/etc/hosts")] if cache else []
    whole = [Path(os.path.normpath(path)) for path in [*files, *named]]
    for path in dict.fromkeys(whole):
        # A file:// index is often a directory whose files lie beside it.
        if path.exists() and path != Path("/"):
            yield str(path.parent if path.is_dir() and path.name == "simple" else path)


def furnish(tree: Path, run: Runner) -> None:
    """What a machine of the lab has before anybody installs rayfwd."""
    run(
        "chroot", tree, "useradd", "--uid", str(UID), "--create-home", "--shell", "/bin/bash", "ray"
    )
    (tree / "home/ray").chmod(0o755)
    run("chroot", tree, "systemctl", "enable", *UNITS)
    run("chroot", tree, "systemctl", "mask", "--quiet", *NOT_WANTED)
    for host_key in (tree / "etc/ssh").glob("ssh_host_*"):
        host_key.unlink()  # each machine has its own
    for name in ("machine-id", "hostname", "resolv.conf"):
        (tree / "etc" / name).unlink(missing_ok=True)
    journal = tree / "etc/systemd/journald.conf.d/lab.conf"
    journal.parent.mkdir()
    journal.write_text("[Journal]\nStorage=persistent\n")
    (tree / "var/log/journal").mkdir(exist_ok=True)


if __name__ == "__main__":
    main()
