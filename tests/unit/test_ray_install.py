"""Finding Ray: on stand-in environments made of this test's own Python."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from rayfwd.problems import ProblemError
from rayfwd.ray.install import RayInstall, Versions, find, script_interpreter, version_key


@pytest.mark.parametrize(
    ("text", "interpreter"),
    [
        ("#!/env/bin/python3\nimport ray\n", "/env/bin/python3"),
        ("#!/env/bin/python3 -sE\n", "/env/bin/python3"),
        ("#!/usr/bin/env python\n", "python"),
        ("#!/usr/bin/env -S python3.11 -u\n", "python3.11"),
        ("#!/usr/bin/env\n", None),
        (
            "#!/bin/sh\n'''exec' \"/long path/bin/python3\" \"$0\" \"$@\"\n' '''\nimport re\n",
            "/long path/bin/python3",
        ),
        ("#!/bin/sh\n'''exec' /long/bin/python3 \"$0\" \"$@\"\n' '''\n", "/long/bin/python3"),
        ("#!/bin/sh\nexec something\n", None),
        ("#!/bin/bash 'unclosed\n", None),
        ("\x7fELF", None),
        ("", None),
    ],
)
def test_interpreter_of_a_script(text: str, interpreter: str | None) -> None:
    assert script_interpreter(text) == interpreter


@pytest.mark.parametrize(
    ("version", "key"),
    [("2.60.0", (2, 60, 0)), ("2.41.0rc1", (2, 41, 0)), ("3.0.0.dev0", (3, 0, 0)), ("", ())],
)
def test_version_key(version: str, key: tuple[int, ...]) -> None:
    assert version_key(version) == key


def environment(folder: Path, version: str | None, first_line: str) -> Path:
    """A directory with a `ray` script, and a package ray of that version for its Python."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    if version is not None:
        info = packages / f"ray-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ray\nVersion: {version}\n")
        scripts = packages / "ray" / "scripts"
        scripts.mkdir(parents=True)
        (scripts / "scripts.py").write_text('@click.option("--dashboard-grpc-port")\n')
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    script = folder / "ray"
    script.write_text(f"{first_line.format(python=python)}\nimport sys\n")
    script.chmod(0o755)
    return script


def look(command: str, env: dict[str, str] | None = None) -> RayInstall:
    return asyncio.run(find(command, env or {"PATH": os.defpath}))


def code_of(command: str, env: dict[str, str] | None = None) -> tuple[str, str]:
    with pytest.raises(ProblemError) as caught:
        look(command, env)
    assert caught.value.problem.remedy
    return caught.value.problem.code.name, caught.value.problem.cause


TRAMPOLINE = "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''"


@pytest.mark.parametrize("first_line", ["#!{python}", TRAMPOLINE, "#!/usr/bin/env python"])
def test_find(tmp_path: Path, first_line: str) -> None:
    script = environment(tmp_path, "2.40.0", first_line)
    expected = RayInstall(
        str(script),
        str(tmp_path / "python"),
        Versions("2.40.0", sys.version.split(maxsplit=1)[0]),
        frozenset({"--dashboard-grpc-port"}),
    )
    env = {"PATH": f"{tmp_path}:{os.defpath}", "HOME": str(tmp_path)}
    assert look(str(script), env) == expected
    assert look("ray", env) == expected
    assert look("~/ray", env) == expected


@pytest.mark.parametrize("version", ["1.13.0", "2.8.1", "3.0.0"])
def test_unsupported_version(tmp_path: Path, version: str) -> None:
    code, cause = code_of(str(environment(tmp_path, version, "#!{python}")))
    assert code == "ray_version_unsupported"
    assert version in cause


def test_not_found(tmp_path: Path) -> None:
    code, cause = code_of("ray", {"PATH": str(tmp_path)})
    assert code == "ray_not_found"
    assert str(tmp_path) in cause
    assert code_of(str(tmp_path / "ray"))[0] == "ray_not_found"
    (tmp_path / "ray").write_text("#!/bin/true\n")
    assert "this user may not execute the file" in code_of(str(tmp_path / "ray"))[1]


def test_not_usable(tmp_path: Path) -> None:
    without_ray = environment(tmp_path / "a", None, "#!{python}")
    code, cause = code_of(str(without_ray))
    assert code == "ray_not_usable"
    assert "does not find the package ray" in cause
    no_python = environment(tmp_path / "b", "2.40.0", "#!/nowhere/python")
    assert code_of(str(no_python))[0] == "ray_not_usable"
    assert "/nowhere/python" in code_of(str(no_python))[1]
    assert code_of("/bin/true")[0] == "ray_not_usable"
