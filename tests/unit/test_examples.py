"""What is in examples/: rayfwd's words there are its own, and the job's script does as it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from rayfwd.cli import _parser
from tests.need import need, tool

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPOSE = (EXAMPLES / "compose" / "compose.yaml").read_text()


def test_the_containers_join_as_the_command_line_understands() -> None:
    commands = re.findall(r"command: (\[.*\])", COMPOSE)
    assert len(commands) == 2
    for command in commands:
        words = json.loads(command.replace("${HEAD:?user@host of the head}", "ray@head"))
        args = _parser().parse_args(words)
        assert (args.verb, args.head) == ("join", "ray@head")
    assert re.search(r"shm_size: (\d)gb", COMPOSE)
    container = (EXAMPLES / "compose" / "Containerfile").read_text()
    assert 'ENTRYPOINT ["rayfwd"]' in container
    assert "USER ray" in container


def test_an_image_has_what_the_wheel_is_made_of_and_no_key() -> None:
    """./ssh, which has one, lies in the checkout that the image is made from."""
    container = (EXAMPLES / "compose" / "Containerfile").read_text()
    checkout = EXAMPLES.parent
    copied = [
        name for line in re.findall(r"(?m)^COPY (.*) \S+$", container) for name in line.split()
    ]
    for name in copied:
        assert (checkout / name).exists()
        assert (checkout / name).resolve() not in EXAMPLES.parents
        assert not name.startswith("examples")
    build = tomllib.loads((checkout / "pyproject.toml").read_text())
    wheel = build["tool"]["hatch"]["build"]["targets"]["wheel"]
    wanted = [*wheel["packages"], *wheel["force-include"], *wheel["shared-data"]]
    wanted += [wheel["hooks"]["custom"]["path"], "pyproject.toml", build["project"]["readme"]]
    for name in [*wanted, *build["project"]["license-files"]]:
        assert any(name == given or name.startswith(f"{given}/") for given in copied), name


RECORDER = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $1" in
    "scontrol show") printf 'n1\\nn2\\n' ;;
    scancel*) kill -TERM $(cat "$CALLS.pids") ;;
    "rayfwd head"|"rayfwd join") [ "$1" != "${ENDS:-}" ] || exit 5
        echo $$ >> "$CALLS.pids"
        trap 'echo "ended $1 $*" >> "$CALLS"; exit 0' TERM
        while :; do sleep 0.1; done ;;
    "rayfwd status") [ -z "${ENDS:-}" ] || exit 1
        test -e "$CALLS.up" || { touch "$CALLS.up"; exit 3; } ;;
    "rayfwd exec") exit 7 ;;
    srun*) while [[ "$1" == --* ]]; do shift; done; exec "$@" ;;
esac
"""


def run_script(tmp_path: Path, *names: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Slurm's commands and rayfwd are stood in for: which commands there are, and the exit code."""
    for name in ("srun", "scontrol", "scancel", *names):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "TMPDIR": str(tmp_path),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "4",
        "USER": "ann",
        **more,
    }
    words = ["bash", str(EXAMPLES / "slurm" / "cluster.sh"), "python", "train.py"]
    return subprocess.run(words, env=env, timeout=60, capture_output=True, text=True)


def test_a_job_that_lacks_a_program_ends_and_says_where(tmp_path: Path) -> None:
    ran = run_script(tmp_path, "ray")
    assert ran.returncode != 0
    assert ran.stderr.endswith(": rayfwd is not on the PATH\n")
    assert "rayfwd head" not in (tmp_path / "calls").read_text()


def test_a_job_whose_head_has_ended_does_not_wait_for_it(tmp_path: Path) -> None:
    ran = run_script(tmp_path, "rayfwd", "ray", ENDS="head")
    assert ran.returncode == 5
    assert "rayfwd on n1 has ended, and so does the job" in ran.stderr


def test_the_jobs_script_starts_a_head_and_workers_and_ends_them(tmp_path: Path) -> None:
    ran, calls = run_script(tmp_path, "rayfwd", "ray"), tmp_path / "calls"
    assert ran.returncode == 7, ran.stderr
    said = calls.read_text().splitlines()
    rayfwd = [line.removeprefix("rayfwd ") for line in said if line.startswith("rayfwd ")]
    assert "head --num-cpus 4" in rayfwd
    hub = f"{tmp_path}/rayfwd-42/run/clusters/job-42/hub.sock"
    assert f"join ann@n1 --name n2 --socket {hub} --ephemeral --num-cpus 4" in rayfwd
    assert "exec -- python train.py" in rayfwd
    assert "scancel --signal=TERM 42" in said
    assert {line.split()[1] for line in said if line.startswith("ended")} == {"head", "join"}
    for line in rayfwd:
        _parser().parse_args(line.split())


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_one(script: Path) -> None:
    need(None)
    subprocess.run([tool("bash"), "-n", str(script)], check=True)
