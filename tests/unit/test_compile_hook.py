"""The hook that compiles, where something fails midway: `tools/compiled.py`. No compiler runs."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tomllib
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rayfwd
from rayfwd.system import build
from tests.need import CHECKOUT

OPTIONS = ["--no-index", "--find-links=a", "--index-url=b", "--extra-index-url=c", "--cert=d"]


class Interface:
    """hatchling's, which is in the environment of a build only."""

    def __init__(self, root: str, config: dict[str, Any]) -> None:
        self.root, self.config = root, config


def load() -> Any:
    plugin = ModuleType("hatchling.builders.hooks.plugin.interface")
    plugin.__dict__["BuildHookInterface"] = Interface
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, plugin.__name__, plugin)
        for above in accumulate(plugin.__name__.split(".")[:-1], lambda a, b: f"{a}.{b}"):
            patch.setitem(sys.modules, above, ModuleType(above))
        return importlib.import_module("tools.compiled")


compiled = load()


def hook() -> Any:
    return compiled.CompiledModules(str(CHECKOUT), {"modules": ["rayfwd/session/frames.py"]})


@pytest.fixture(autouse=True)
def fails_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a compiler and mypy, and the compiler gives up."""

    def fail(*_: object) -> None:
        raise SystemExit("command 'cc' failed with exit code 1\nand more")

    monkeypatch.setattr(compiled.CompiledModules, "_missing", lambda _: None)
    monkeypatch.setattr(compiled, "mypy_missing", lambda: None)
    monkeypatch.setattr(compiled, "compile_modules", fail)


def test_by_default_the_wheel_is_pure_then_and_has_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAYFWD_COMPILE", raising=False)
    data: dict[str, Any] = {"pure_python": True, "force_include": {}}
    made = hook()
    made.initialize("standard", data)
    ((source, place),) = data["force_include"].items()
    assert Path(source).read_text() == "command 'cc' failed with exit code 1\n"
    assert place == "rayfwd/not_compiled"
    assert data["pure_python"] is True
    assert "will be pure Python, not compiled: command 'cc' failed" in capsys.readouterr().err
    made.finalize()
    assert not Path(source).exists()


def test_where_it_was_asked_for_the_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFWD_COMPILE", "1")
    made = hook()
    with pytest.raises(SystemExit, match="command 'cc' failed"):
        made.initialize("standard", {"force_include": {}})
    made.finalize()


def test_mypy_is_asked_for_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYFWD_COMPILE", raising=False)
    assert hook().dependencies() == [compiled.NEEDED]
    monkeypatch.setattr(compiled, "mypy_missing", lambda: "no")
    assert hook().dependencies() == []
    monkeypatch.setenv("RAYFWD_COMPILE", "1")
    assert hook().dependencies() == [compiled.NEEDED]
    monkeypatch.setenv("RAYFWD_COMPILE", "0")
    assert hook().dependencies() == []


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["pip", "install", *OPTIONS, "."], {*OPTIONS}),
        (["pip", "install", "-f", "x", "-i", "y", "-r", "z"], {"--find-links=x", "--index-url=y"}),
        (["pip", "install", "."], set()),
        (["uv", "pip", "--index-url"], set()),
    ],
)
def test_where_pip_looks_is_where_mypy_is_looked_for(words: list[str], options: set[str]) -> None:
    assert set(compiled.index_options(words)) == options


def test_the_command_says_why_it_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "not_compiled").write_text("there is no compiler (cc)\n")
    monkeypatch.setattr(build, "files", lambda _: tmp_path)
    monkeypatch.setattr(build, "code", lambda: build.PURE)
    assert build.lines()[0] == "code: pure Python (there is no compiler (cc))"
    monkeypatch.setattr(build, "code", lambda: build.COMPILED)
    assert build.lines()[0] == "code: compiled"


def classes(module: str) -> list[type]:
    """Those that it defines; none where it is a driver's, for which Ray is missing here."""
    try:
        found = vars(importlib.import_module(module)).values()
    except ModuleNotFoundError as exc:
        if exc.name != "ray":
            raise
        return []
    return [value for value in found if isinstance(value, type) and value.__module__ == module]


def test_no_class_that_stays_interpreted_inherits_from_a_compiled_one() -> None:
    """Compiled, its first object would raise TypeError."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    hooks = project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]
    files = hooks["custom"]["modules"]
    modules = {file.removesuffix(".py").replace("/", ".") for file in files}
    names = {found.name for found in pkgutil.walk_packages(rayfwd.__path__, "rayfwd.")}
    seen = {cls for name in names - {"rayfwd.__main__"} for cls in classes(name)}
    assert {cls.__module__ for cls in seen} >= modules - {"rayfwd.transport.writev"}
    assert not [
        f"{cls.__module__}.{cls.__qualname__} inherits from {base.__qualname__}"
        for cls in seen
        for base in cls.__mro__[1:]
        if cls.__module__ not in modules and base.__module__ in modules
    ]
