"""Makes the wheel as a user with a compiler gets it, where it is missing: compiled for this Python.

Usage: python -m tests.setup_wheel

It is in .cache/wheels/KEY; KEY is made of all that goes in, so that it is compiled once a change.
Where there is no compiler it is pure Python. Beside it, in KEY-pure, is the one without a compiler,
which is made when a test first asks for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
WHEELS = CHECKOUT / ".cache" / "wheels"
KEPT = 16
"""Wheels of earlier states of the sources, and of other checkouts that share the cache."""

MADE_FROM = ("src", "systemd", "share", "docs/conditions.md", "tools/compiled.py", "pyproject.toml")


def made(pure: bool = False) -> Path | None:
    """The wheel of this checkout as it is now; None: it was not made."""
    return next(_place(pure).glob("*.whl"), None)


def make(pure: bool = False) -> Path:
    """The same, made if need be. Raises CalledProcessError where pip cannot."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    with (WHEELS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once: the second finds it made
        if (built := made(pure)) is not None:
            return built
        for old in sorted(WHEELS.glob("*/"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        # What a compiler needs, pip fetches; a pure one is made with what is here, if it is.
        here = ["--no-build-isolation"] if pure and importlib.util.find_spec("hatchling") else []
        build = ["wheel", "--no-deps", *here, f"--wheel-dir={_place(pure)}", str(CHECKOUT)]
        env = {**os.environ, "RAYFWD_COMPILE": "0" if pure else "auto"}
        subprocess.run([*pip, *build], env=env, cwd="/", stdin=subprocess.DEVNULL, check=True)
    built = made(pure)
    assert built is not None, "the sources were changed meanwhile"
    return built


def _place(pure: bool) -> Path:
    return WHEELS / (f"{_key()}-pure" if pure else _key())


def _key() -> str:
    """Of all that the wheel is made from, and of the Python that makes it."""
    key = hashlib.sha256(sys.version.encode())
    for part in MADE_FROM:
        top = CHECKOUT / part
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and path.suffix not in {".pyc", ".so"}:
                key.update(f"{path.relative_to(CHECKOUT)}\0".encode() + path.read_bytes())
    return key.hexdigest()[:12]


def main() -> None:
    if made() is None:
        print("the wheel: compiling (some 50 s of a processor) …", flush=True)
    began = time.monotonic()
    print(f"the wheel: {make()}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
