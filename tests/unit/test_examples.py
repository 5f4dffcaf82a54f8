"""What is in examples/: rayfwd's words there are its own, and the job's script does as it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
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


RECORDER = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $1" in
    "scontrol show") printf 'n1\\nn2\\n' ;;
    scancel*) kill -TERM $(cat "$CALLS.pids") ;;
    "rayfwd head"|"rayfwd join") echo $$ >> "$CALLS.pids"
        trap 'echo "ended $1 $*" >> "$CALLS"; exit 0' TERM
        while :; do sleep 0.1; done ;;
    "rayfwd status") test -e "$CALLS.up" || { touch "$CALLS.up"; exit 3; } ;;
    "rayfwd exec") exit 7 ;;
    srun*) while [[ "$1" == --* ]]; do shift; done; exec "$@" ;;
esac
"""


def test_the_jobs_script_starts_a_head_and_workers_and_ends_them(tmp_path: Path) -> None:
    """Slurm's commands and rayfwd are stood in for: which commands there are, and the exit code."""
    for name in ("srun", "scontrol", "scancel", "rayfwd"):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "TMPDIR": str(tmp_path),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "4",
        "USER": "ann",
    }
    script = EXAMPLES / "slurm" / "cluster.sh"
    ran = subprocess.run(
        ["bash", str(script), "python", "train.py"], env=env, timeout=60, capture_output=True
    )
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
