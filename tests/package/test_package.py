"""Wheel and sdist as users get them: built, checked, installed in fresh environments, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import rayfwd
from tests.need import CHECKOUT

RAY = "ray[default]==2.60.0"
SHARED = (
    "man/man1/rayfwd.1",
    "man/man5/rayfwd.toml.5",
    "bash-completion/completions/rayfwd",
    "zsh/site-functions/_rayfwd",
    "fish/vendor_completions.d/rayfwd.fish",
)


PLAIN = {"RAYFWD_COMPILE": "0", "PIP_NO_COMPILE": "1"}
"""Pure Python, whose bytecode is made as it is run: that of all packages takes pip ten seconds."""


def run(*argv: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """What it says. Raises with all of it where it fails.

    Whatever it builds is pure Python: test_compiled.py is about the compiled wheel.
    """
    done = subprocess.run(
        [str(arg) for arg in argv],
        cwd=cwd,
        env={**os.environ, **PLAIN, **(env or {})},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{argv}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is made of it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, CHECKOUT, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.mark.runs(".venv/bin/python -m build")
def test_both_are_in_order(built: dict[str, Path], tmp_path: Path) -> None:
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built.values(), cwd=tmp_path)
    assert said.count("PASSED") == 2


def test_the_version_is_of_one_place(built: dict[str, Path]) -> None:
    assert {path.name.split("-")[1].removesuffix(".tar.gz") for path in built.values()} == {
        rayfwd.__version__
    }
    text = (CHECKOUT / "pyproject.toml").read_text()
    assert not re.search(r"(?m)^version = ", text)


def test_the_wheel_has_what_is_not_python(built: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    data = f"rayfwd-{rayfwd.__version__}.data/data/share/"
    assert {data + name for name in SHARED} <= names
    assert {"rayfwd/conditions.md", "rayfwd/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "bench/"))]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("sdist", marks=pytest.mark.runs("pip install .")),
        pytest.param("wheel", marks=pytest.mark.thorough),
    ],
)
def test_it_is_installed_and_runs(built: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """The sdist as a checkout, by the README's command."""
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", env, cwd=tmp_path)
    what, where = built[kind], tmp_path
    if kind == "sdist":
        shutil.unpack_archive(what, tmp_path)
        what, (where,) = Path("."), tmp_path.glob("rayfwd-*")
    run(env / "bin/pip", "install", "--quiet", what, cwd=where)
    command = env / "bin/rayfwd"
    assert run(command, "--version", cwd=tmp_path) == f"rayfwd {rayfwd.__version__}\n"
    file = tmp_path / "rayfwd.toml"
    file.write_text('role = "head"\nname = "h"\n')
    assert f"{file}: valid" in run(command, "check", "--config", file, cwd=tmp_path)
    for name in SHARED:
        assert (env / "share" / name).is_file()
    run(env / "bin/python", "-m", "pip", "check", cwd=tmp_path)


@pytest.mark.thorough  # systemd/test_install.py installs it there: nothing of Ray's is exchanged
@pytest.mark.runs("pip install ray*")
def test_it_goes_beside_ray(built: dict[str, Path], tmp_path: Path) -> None:
    """pip finds a set of packages that suits both; nothing is installed."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed")
    run(*pip, RAY, built["wheel"], cwd=tmp_path)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `uv` and `pipx` are."""
    folder = tmp_path_factory.mktemp("tools")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "env/bin/python", "install", "--quiet")
    run(*pip, "uv", "pipx", cwd=folder)
    return folder / "env/bin"


@pytest.mark.runs("uv tool install *", "uv venv --seed *")
def test_uv_installs_it(built: dict[str, Path], tools: Path, tmp_path: Path) -> None:
    """With its own resolver; what it needs was fetched as pip is set up to. The first Python of the
    PATH is too old, as Ubuntu 22.04's, where there is such a one: uv passes it over by itself."""
    wheels = tmp_path / "wheels"
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "-w", wheels, built["wheel"], cwd=tmp_path)
    places = {name: str(tmp_path / name) for name in ("UV_TOOL_DIR", "UV_TOOL_BIN_DIR")}
    offline = ("--no-index", "--find-links", wheels)
    words = (tools / "uv", "tool", "install", "--no-config", *offline, built["wheel"])
    run(*words, cwd=tmp_path, env={**places, "PATH": ":".join(map(str, pythons()))})
    said = run(tmp_path / "UV_TOOL_BIN_DIR" / "rayfwd", "--version", cwd=tmp_path)
    assert said == f"rayfwd {rayfwd.__version__}\n"
    seeds = ("pip", "setuptools", "wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "-w", wheels, *seeds, cwd=tmp_path)
    place = tmp_path / "seeded"
    python = ("--python", sys.executable)
    run(tools / "uv", "venv", "--no-config", "--seed", *offline, *python, place, cwd=tmp_path)
    assert run(place / "bin/pip", "--version", cwd=tmp_path).startswith("pip ")


def pythons() -> list[Path]:
    """Where Pythons are: one that is too old, if there is any here, and the one that runs this."""
    base = Path(sys.base_prefix)
    beside = [place / "bin" for place in base.parent.glob("3.10.*")]
    found = shutil.which("python3.10")
    too_old = [Path(found).parent] if found else [p for p in beside if (p / "python3").exists()]
    return [*too_old[:1], base / "bin", Path("/usr/bin"), Path("/bin")]


def test_pipx_installs_it(built: dict[str, Path], tools: Path, tmp_path: Path) -> None:
    """With its man pages, in places of this test's own."""
    places = {name: str(tmp_path / name) for name in ("PIPX_HOME", "PIPX_BIN_DIR", "PIPX_MAN_DIR")}
    run(tools / "pipx", "install", built["wheel"], cwd=tmp_path, env=places)
    said = run(tmp_path / "PIPX_BIN_DIR" / "rayfwd", "--version", cwd=tmp_path)
    assert said == f"rayfwd {rayfwd.__version__}\n"
    assert (tmp_path / "PIPX_MAN_DIR/man1/rayfwd.1").is_file()
