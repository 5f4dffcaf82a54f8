"""Makes the environments with the real Ray that the tests and the demo use, where they are missing.

Usage: python tests/setup_envs.py [--root DIRECTORY] [VERSION...]

Each is DIRECTORY/ray-VERSION, a virtual environment made by the Python that runs this; pip takes
Ray from wherever it is set up to take packages from. `2.60.0-libraries` has besides what people run
on Ray (`EXTRAS`, for CPUs): what pip does not find is said and left out. It begins as a copy of
`2.60.0` by hard links, which pip, where it exchanges a package, replaces. One that was made by hand
is used as it is, if it has that Ray. A stamp file marks those that are complete, so that an
interrupted run is made good by the next.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = "2.60.0-libraries"
VERSIONS = ("2.60.0", "2.40.0", "2.9.3", LIBRARIES)

PINS = {
    # It imports pkg_resources, which new setuptools no longer have, and does not ask for it.
    "2.9.3": ["setuptools<80"],
}
"""What a version needs besides `ray[default,client]`."""

EXTRAS = {
    # The build for CPUs alone: the usual one fetches some GB of CUDA. It comes first: all else of
    # Ray Train and its collectives rests on it.
    "torch": ["torch==2.13.0+cpu", "numpy"],
    "ray.train": ["ray[train,tune,data,serve]==2.60.0"],
    "xgboost": ["xgboost-cpu==3.2.0"],
    "lightgbm": ["lightgbm==4.7.0"],
    "jax": ["jax[cpu]==0.10.2"],
    "debugpy": ["debugpy==1.8.22"],
}
"""What `2.60.0-libraries` has, by the module that is imported. Each is left out by itself where pip
has none. All but torch take 20 s and 0.9 GB; torch takes 20 s and 0.9 GB."""

CHECKOUT = Path(__file__).resolve().parents[1]


def default_root() -> Path:
    given = os.environ.get("RAYFWD_RAY_ENVS")
    return Path(given).absolute() if given else CHECKOUT / ".cache" / "ray-envs"


def requirements(version: str) -> list[str]:
    return [f"ray[default,client]=={ray_version(version)}", *PINS.get(version, [])]


def wanted(version: str) -> str:
    """All that an environment is to have, as its stamp says it."""
    further = EXTRAS.values() if version == LIBRARIES else ()
    return "\n".join([*requirements(version), *(pin for pins in further for pin in pins)])


def ray_version(version: str) -> str:
    """Of an environment that may have more than Ray."""
    return version.partition("-")[0]


def left_out(root: Path, version: str = LIBRARIES) -> Path:
    """Says of each library that could not be had why not, a line `MODULE: REASON`."""
    return root / f".ray-{version}.left-out"


def missing(root: Path, module: str) -> str | None:
    """Why a library is not in the environment by this script's own word; None: it is, or is to be.

    To try again, remove the environment.
    """
    try:
        lines = left_out(root).read_text().splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.startswith(f"{module}: ")), None)


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
        return found == ray_version(version) and complete.read_text() == wanted(version)
    if found == ray_version(version):
        return True
    has = f"Ray {found}" if found else "no Ray"
    raise SystemExit(
        f"{env}: exists, was not made by this script, and has {has} instead of Ray {version}: "
        "move it away, or set RAYFWD_RAY_ENVS to another directory"
    )


def pip(env: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """`pip install` in an environment."""
    line = [str(env / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    return subprocess.run(
        [*line, "--quiet", *words], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def add_libraries(env: Path) -> Iterator[str]:
    """Install what people run on Ray; a line for each that pip does not find.

    Raises SystemExit where pip fails for another reason.
    """
    for module, pins in EXTRAS.items():
        installed = pip(env, ["--only-binary=:all:", *pins])
        if installed.returncode == 0:
            continue
        if "No matching distribution" not in installed.stderr:
            raise SystemExit(f"{module}: pip failed: {installed.stderr}")
        line = f"{module}: pip finds no {' '.join(pins)} here"
        print(f"left out, {line}", flush=True)
        yield line


def copy(source: Path, env: Path) -> None:
    """Make `env` an environment with the packages of another one, as the same files."""
    venv.create(env, clear=True, symlinks=True, with_pip=False)
    (packages,) = source.glob("lib/python3*/site-packages")
    within = packages.relative_to(source)
    shutil.copytree(
        packages, env / within, symlinks=True, copy_function=os.link, dirs_exist_ok=True
    )
    for script in (source / "bin").iterdir():
        own = env / "bin" / script.name
        if not (own.exists() or own.is_symlink()):
            # What pip has made names the environment's Python in its first line.
            own.write_bytes(script.read_bytes().replace(bytes(source), bytes(env)))
            own.chmod(script.stat().st_mode)


def make(env: Path, version: str) -> None:
    began = time.monotonic()
    much = "some GB, with libraries" if version == LIBRARIES else "some 100 MB"
    print(f"Ray {version}: making {env} ({much} to fetch, some minutes) …", flush=True)
    building, complete = stamps(env)
    building.touch()
    complete.unlink(missing_ok=True)
    plain = env.with_name(f"ray-{ray_version(version)}")
    if plain != env and stamps(plain)[1].exists():
        copy(plain, env)
    else:
        venv.create(env, clear=True, symlinks=True, with_pip=True)
    pins = requirements(version)
    # Wheels alone: what would have to be compiled has no wheel for this Python.
    installed = pip(env, ["--only-binary=ray,grpcio", *pins])
    if installed.returncode != 0:
        python = ".".join(map(str, sys.version_info[:2]))
        raise SystemExit(
            f"Ray {version}: pip could not install {' '.join(pins)}:\n{installed.stderr}If it "
            f"found no matching version, there may be no Ray {version} for this Python {python}: "
            "use 3.11"
        )
    if version == LIBRARIES:
        left_out(env.parent).write_text("".join(f"{line}\n" for line in add_libraries(env)))
    if (found := ray_of(env)) != ray_version(version):
        raise SystemExit(f"{env}: has Ray {found} after the installation of {version}")
    complete.write_text(wanted(version))
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
            else:
                make(env, version)


if __name__ == "__main__":
    main()
