"""The real Ray under the supervisor, each test in a private namespace (see `inside.py`).

There its ports, processes and temporary files meet nobody else's, and all of it is gone with it.
Needs unshare(1), mount(8) and ip(8); root, or user namespaces for ordinary users.
RAYFWD_RAY_ENVS is the directory that holds the environments `ray-VERSION`.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.namespaces import COMMAND
from tests.need import CHECKOUT, need, no_ray

HERE = Path(__file__).parent
TESTS = [
    "test_start_and_stop[2.9.3]",
    "test_start_and_stop[2.40.0]",
    "test_start_and_stop[2.60.0]",
    "test_a_life_of_a_head",
    "test_port_in_use_and_stop_while_starting",
    "test_started_by_hand",
]
THOROUGH = {
    "test_start_and_stop[2.9.3]",  # lab/test_versions.py
    "test_start_and_stop[2.40.0]",
    "test_started_by_hand",  # lab/test_by_hand.py
}
"""What the lab does with these as well."""


def place() -> list[str]:
    flags = ["--net", "--pid", "--mount", "--ipc", "--fork", "--mount-proc", "--kill-child"]
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    keep = [str(CHECKOUT), sys.prefix, sys.base_prefix, os.environ.get("RAYFWD_RAY_ENVS", "")]
    keep = [k for k in keep if k]
    return ["unshare", *user, *flags, *COMMAND, "tests.ray.init", ":".join(keep)]


@cache
def why_not() -> str | None:
    try:
        tried = subprocess.run(
            [*place(), "true"], cwd=CHECKOUT, capture_output=True, text=True, timeout=30
        )
    except OSError as exc:
        return f"no private namespace: {exc}"
    if tried.returncode != 0:
        return f"no private namespace: {tried.stderr.strip()[-300:]}"
    return None


@pytest.mark.ray
@pytest.mark.parametrize(
    "name",
    [pytest.param(t, marks=[pytest.mark.thorough] if t in THOROUGH else []) for t in TESTS],
)
def test_inside(name: str) -> None:
    need(why_not())
    version = name.partition("[")[2].rstrip("]") or "2.60.0"
    need(no_ray(version))
    source = os.pathsep.join([str(CHECKOUT / "src"), str(CHECKOUT)])
    ran = subprocess.run(
        [
            *place(),
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            f"{HERE / 'inside.py'}::{name}",
        ],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": source, "RAYFWD_INSIDE": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert ran.returncode == 0, f"{ran.stdout[-20000:]}\n{ran.stderr[-4000:]}"
    assert "1 passed" in ran.stdout


def test_no_test_inside_is_forgotten() -> None:
    tree = ast.parse((HERE / "inside.py").read_text())
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f for f in functions if f.startswith("test_")} == {t.partition("[")[0] for t in TESTS}
