"""Compiles the modules that every message passes, when a wheel is built: a hook of hatchling's.

RAYFWD_COMPILE says whether: `auto` (the default) compiles where there is a compiler, and gives pure
Python where there is none or where it fails, with a line that says why; `0` never compiles; `1`
fails where it cannot. An editable installation is compiled for `1` only, beside the sources: who
edits one of these modules wants to run what was written. pyproject.toml lists the modules.
"""

from __future__ import annotations

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
SHARED = "rayfwd"
"""Its name begins that of the one library that has the code of all the modules."""


class CompiledModules(BuildHookInterface):  # type: ignore[misc]  # hatchling has no types here
    """Has the wheel contain the compiled modules, beside their sources."""

    def dependencies(self) -> list[str]:
        """What building takes besides: nothing where nothing is compiled."""
        return [] if self._choice() == "0" or self._missing() else [NEEDED]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what the wheel is then. Raises where RAYFWD_COMPILE=1 cannot be."""
        choice = self._choice()
        if choice == "0" or (version == "editable" and choice == "auto"):
            return
        self._work = tempfile.TemporaryDirectory(prefix="rayfwd-compiled-")
        try:
            if missing := self._missing():
                raise FileNotFoundError(missing)
            built = compile_modules(Path(self.root), self.config["modules"], Path(self._work.name))
        except (Exception, SystemExit) as exc:  # mypyc and setuptools end so
            if choice == "1":
                raise
            print(f"rayfwd will be pure Python, not compiled: {exc}", file=sys.stderr)
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
            return f"{shlex.join(compiler)} takes no Python.h (python3-dev): {tried.stderr[:300]}"
        return None


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
