"""rayfwd as a user installs it: a wheel of this checkout, in an environment of its own.

With RAYFWD_COMPILE=1 it is compiled as for a user with a compiler, else pure Python as for one
without: what is edited is run some seconds later.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from tests import setup_wheel

PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")

_installed: Path | None = None


def install(folder: Path) -> Path:
    """Install the wheel below `folder`, where it is not there yet; what `current` answers from then
    on. Several processes may share a folder.

    Its dependencies come from the package index that pip is set up for, or from pip's cache.
    """
    global _installed  # noqa: PLW0603  # one a test run
    env, complete = folder / "rayfwd", folder / "complete"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            _install(folder, env)
            complete.touch()
    _installed = env / "bin" / "rayfwd"
    return _installed


def _install(folder: Path, env: Path) -> None:
    old = os.umask(0o022)  # the machines' ordinary user is to run it
    try:
        built = setup_wheel.make(pure=os.environ.get("RAYFWD_COMPILE") != "1")
        _run([sys.executable, "-m", "venv", str(env)])
        _run([str(env / "bin" / "python"), *PIP, "install", str(built)])
    finally:
        os.umask(old)


def current() -> Path | None:
    """The installed command `rayfwd`, or what RAYFWD_LAB_RAYFWD names; None: there is none."""
    given = os.environ.get("RAYFWD_LAB_RAYFWD")
    return Path(given) if given else _installed


def _run(argv: list[str]) -> None:
    ran = subprocess.run(argv, cwd="/", capture_output=True, text=True, timeout=600)
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {ran.stdout[-4000:]}\n{ran.stderr[-4000:]}")


def trees(env: Path) -> list[str]:
    """The directories that a virtual environment needs: its own and its Python's.

    bin/python may be a link to a link; the directory above each one's bin/ is where Python looks
    for its library, or for the next step.
    """
    found = [env]
    link = env / "bin" / "python"
    for _ in range(10):
        if not link.is_symlink():
            break
        link = Path(os.path.normpath(link.parent / link.readlink()))
        if link.parent.name == "bin" and link.parents[1] not in found:
            found.append(link.parents[1])
    found.append(Path(os.path.realpath(env / "bin" / "python")).parents[1])
    for line in (env / "pyvenv.cfg").read_text().splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "home":
            found.append(Path(value.strip()).parent)
    return [str(tree) for tree in dict.fromkeys(found) if str(tree) not in {"/", "/usr"}]
