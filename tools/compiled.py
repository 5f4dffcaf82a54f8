"""Compiles the modules that every message passes, when a wheel is built: a hook of hatchling's.

RAYFWD_COMPILE says whether: `auto` (the default) compiles where there is a compiler and pip finds
mypy, and gives pure Python where it cannot or where it fails, with a line that says why, which
`rayfwd --version --verbose` repeats; `0` never compiles; `1` fails where it cannot. An editable
installation is compiled for `1` only, beside the sources: who edits one of these modules wants to
run what was written. pyproject.toml lists the modules.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CHOICES = ("auto", "0", "1")
NEEDED = "mypy[mypyc]>=2.4,<3"
WHY_NOT = "rayfwd/not_compiled"
"""In a wheel that was to be compiled and is not: why."""
OF_THE_INDEX: tuple[tuple[str, ...], ...] = (
    ("-i", "--index-url"),
    ("--extra-index-url",),
    ("-f", "--find-links"),
    ("--trusted-host",),
    ("--proxy",),
    ("--cert",),
)
"""pip's options that say where packages are, each with a value."""
LONGEST_REASON = 300
"""Letters of that."""
INDEX_SECONDS = 10
"""Seconds that an index may take to answer whether it has mypy."""
SHARED = "rayfwd"
"""Its name begins that of the one library that has the code of all the modules."""


class CompiledModules(BuildHookInterface):  # type: ignore[misc]  # hatchling has no types here
    """Has the wheel contain the compiled modules, beside their sources."""

    def dependencies(self) -> list[str]:
        """What building takes besides: nothing where nothing is compiled.

        A build whose requirements cannot be had fails before it begins, so of `auto` none is said
        that pip does not find.
        """
        choice = self._choice()
        if choice == "0" or self._missing() or (choice == "auto" and mypy_missing()):
            return []
        return [NEEDED]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what the wheel is then. Raises where RAYFWD_COMPILE=1 cannot be."""
        choice = self._choice()
        if choice == "0" or (version == "editable" and choice == "auto"):
            return
        self._work = tempfile.TemporaryDirectory(prefix="rayfwd-compiled-")
        try:
            if missing := self._missing() or mypy_missing():
                raise FileNotFoundError(missing)
            built = compile_modules(Path(self.root), self.config["modules"], Path(self._work.name))
        except (Exception, SystemExit) as exc:  # mypyc and setuptools end so
            if choice == "1":
                raise
            why = (str(exc).strip().splitlines() or [type(exc).__name__])[0][:LONGEST_REASON]
            print(f"rayfwd will be pure Python, not compiled: {why}", file=sys.stderr)
            said = Path(self._work.name, "why")
            said.write_text(f"{why}\n")
            build_data["force_include"][str(said)] = WHY_NOT
            return
        if version == "editable":
            for name, path in built.items():
                shutil.copy(path, Path(self.root, "src", name))
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"].update({str(path): name for name, path in built.items()})

    def finalize(self, *_: Any) -> None:
        """The wheel is written: what was compiled for it may go."""
        if hasattr(self, "_work"):
            self._work.cleanup()

    def _choice(self) -> str:
        choice = os.environ.get("RAYFWD_COMPILE") or "auto"
        if choice not in CHOICES:
            raise ValueError(f"RAYFWD_COMPILE is {choice}, and can be {', '.join(CHOICES)}")
        return choice

    def _missing(self) -> str | None:
        """What compiling lacks on this machine; None: nothing that shows beforehand."""
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        if shutil.which(compiler[0]) is None:
            return f"there is no compiler ({compiler[0]})"
        flags = [f"-I{sysconfig.get_path('include')}", "-fsyntax-only", "-x", "c", "-"]
        tried = subprocess.run(
            [*compiler, *flags],
            check=False,
            input="#include <Python.h>\n",
            capture_output=True,
            text=True,
        )
        if tried.returncode != 0:
            said = tried.stderr.strip() or "it says nothing"
            return f"{shlex.join(compiler)} takes no Python.h (python3-dev): {said}"
        return None


def mypy_missing() -> str | None:
    """Why mypy is not there and cannot be had; None: it is there, or pip finds it.

    Where there is no pip (uv) it is taken for granted.
    """
    if importlib.util.find_spec("mypyc") is not None:
        return None
    # Isolated from what pip hides from the builds that it runs, itself among it.
    pip = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "install", "--dry-run"]
    # What this Python has besides is hidden from the build as well.
    options = ["--quiet", "--ignore-installed", "--no-deps"]
    options += [f"--timeout={INDEX_SECONDS}", "--retries=0"]
    asked = subprocess.run(
        [*pip, *options, *index_options(parent()), NEEDED],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if asked.returncode == 0 or asked.stderr.rstrip().endswith("No module named pip"):
        return None
    last = (asked.stderr.strip().splitlines() or ["it says nothing"])[-1]
    return f"pip finds no {NEEDED}: {last}"


def parent() -> list[str]:
    """The words of the command that has started this build; nothing where that is not told."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")
    except (OSError, UnicodeDecodeError):
        return []


def index_options(words: list[str]) -> list[str]:
    """Those of pip's options that say where packages are: pip tells no build of them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--no-index", action="store_true")
    for names in OF_THE_INDEX:
        parser.add_argument(*names, action="append", default=[])
    try:
        said, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:
        return []
    found = ["--no-index"] if said.no_index else []
    for names in OF_THE_INDEX:
        values = vars(said)[names[-1].lstrip("-").replace("-", "_")]
        found += [f"{names[-1]}={value}" for value in values]
    return found


def compile_modules(root: Path, modules: list[str], work: Path) -> dict[str, Path]:
    """Compile in `work`, of the checkout `root`; the libraries, by their place in the wheel.

    `modules` are paths from `src/`. Raises what mypyc and setuptools raise, SystemExit too.
    """
    from mypyc.build import mypycify  # noqa: PLC0415  # it is there only where it was asked for
    from setuptools import Distribution  # noqa: PLC0415

    out = work / "out"
    # The types are checked strictly by `make types`. Here whatever is imported may be absent.
    options = ["--config-file=", "--ignore-missing-imports"]
    with chdir(root):
        extensions = mypycify(
            [*options, *(f"src/{module}" for module in modules)],
            group_name=SHARED,
            target_dir=str(work / "c"),
            debug_level="0",
        )
        command = Distribution({"name": "rayfwd", "ext_modules": extensions}).get_command_obj(
            "build_ext"
        )
        command.build_lib, command.build_temp = str(out), str(work / "objects")
        command.ensure_finalized()
        command.run()
    return {str(path.relative_to(out)): path for path in sorted(out.rglob("*.*")) if path.is_file()}
