"""Makes the environments with the real Ray that the tests and the demo use, where they are missing.

Usage: python tests/setup_envs.py [--root DIRECTORY] [VERSION...]

Each is DIRECTORY/ray-VERSION, a virtual environment made by the Python that runs this; pip takes
Ray from wherever it is set up to take packages from. `2.60.0-libraries` has PyTorch besides, its
build without CUDA: where pip does not find that, it is said and left out. One that was made by hand
is used as it is, if it has that Ray. A stamp file marks those that are complete, so that an
interrupted run is made good by the next.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

LIBRARIES = "2.60.0-libraries"
VERSIONS = ("2.60.0", "2.40.0", "2.9.3", LIBRARIES)

PINS = {
    # It imports pkg_resources, which new setuptools no longer have, and does not ask for it.
    "2.9.3": ["setuptools<80"],
    # The build for CPUs alone: the usual one fetches some GB of CUDA.
    LIBRARIES: ["torch==2.13.0+cpu", "numpy"],
}
"""What a version needs besides `ray[default,client]`."""

CHECKOUT = Path(__file__).resolve().parents[1]


def default_root() -> Path:
    given = os.environ.get("RAYFWD_RAY_ENVS")
    return Path(given).absolute() if given else CHECKOUT / ".cache" / "ray-envs"


def requirements(version: str) -> list[str]:
    return [f"ray[default,client]=={ray_version(version)}", *PINS.get(version, [])]


def ray_version(version: str) -> str:
    """Of an environment that may have more than Ray."""
    return version.partition("-")[0]


def left_out(root: Path, version: str) -> Path:
    """Is there where an environment cannot be had, and says why."""
    return root / f".ray-{version}.left-out"


def obtainable(env: Path, version: str) -> bool:
    """Whether pip finds what `version` needs. Only of the libraries is it no fault if not."""
    if version != LIBRARIES:
        return True
    reason = left_out(env.parent, version)
    reason.unlink(missing_ok=True)
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    with tempfile.TemporaryDirectory() as folder:
        asked = subprocess.run(
            [sys.executable, *words, folder, PINS[LIBRARIES][0]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    if asked.returncode != 0:
        reason.write_text(f"pip finds no {PINS[LIBRARIES][0]} here, PyTorch's build without CUDA")
        print(f"Ray {version}: left out, {reason.read_text()}", flush=True)
    return asked.returncode == 0


def stamps(env: Path) -> tuple[Path, Path]:
    """Beside an environment: that it is being made by this script, and that it is complete."""
    return env.with_name(f".{env.name}.building"), env.with_name(f".{env.name}.complete")


def ray_of(env: Path) -> str | None:
    """The version of Ray in an environment; None: none that can be asked."""
    ask = "import importlib.metadata as m; print(m.version('ray'))"
    try:
        asked = subprocess.run(
            [env / "bin" / "python", "-c", ask], capture_output=True, text=True, timeout=120
        )
    except OSError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def ready(env: Path, version: str) -> bool:
    """Whether `env` can be used as it is. Raises SystemExit when it is not ours to replace."""
    building, complete = stamps(env)
    if not env.exists() or building.exists():
        return False
    found = ray_of(env)
    if complete.exists():
        return found == ray_version(version) and complete.read_text() == "\n".join(
            requirements(version)
        )
    if found == ray_version(version):
        return True
    has = f"Ray {found}" if found else "no Ray"
    raise SystemExit(
        f"{env}: exists, was not made by this script, and has {has} instead of Ray {version}: "
        "move it away, or set RAYFWD_RAY_ENVS to another directory"
    )


def make(env: Path, version: str) -> None:
    began = time.monotonic()
    print(f"Ray {version}: making {env} (some 100 MB to fetch, some minutes) …", flush=True)
    building, complete = stamps(env)
    building.touch()
    complete.unlink(missing_ok=True)
    venv.create(env, clear=True, symlinks=True, with_pip=True)
    wanted = requirements(version)
    pip = [
        str(env / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--quiet",
    ]
    # Wheels alone: what would have to be compiled has no wheel for this Python.
    installed = subprocess.run(
        [*pip, "--only-binary=ray,grpcio", *wanted], stdin=subprocess.DEVNULL
    )
    if installed.returncode != 0:
        python = ".".join(map(str, sys.version_info[:2]))
        raise SystemExit(
            f"Ray {version}: pip could not install {' '.join(wanted)} (see above). If it found no "
            f"matching version, there may be no Ray {version} for this Python {python}: use 3.11"
        )
    if (found := ray_of(env)) != ray_version(version):
        raise SystemExit(f"{env}: has Ray {found} after the installation of {version}")
    complete.write_text("\n".join(wanted))
    building.unlink()
    print(f"Ray {version}: done in {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default: {VERSIONS}")
    parser.add_argument("--root", type=Path, default=default_root(), metavar="DIRECTORY")
    args = parser.parse_args()
    os.umask(0o022)  # the lab's ordinary user is to run it
    root = args.root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second finds all made
        for version in args.versions or VERSIONS:
            env = root / f"ray-{version}"
            if ready(env, version):
                print(f"Ray {version}: {env} is there", flush=True)
            elif obtainable(env, version):
                make(env, version)


if __name__ == "__main__":
    main()
