"""rayfwd's output where nobody reads it: closed, a pipe whose reader has gone, a full disk.

Each is started by a shell, as people do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

RAYFWD = f"{sys.executable} -m rayfwd"


def shell(line: str, home: Path, under: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*under, "bash", "-c", line],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
    )


@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        (">&-", 0),
        (">&- 2>&- <&-", 0),
        ("| true; exit ${PIPESTATUS[0]}", 141),
        (">/dev/full", 1),
    ],
)
def test_a_verb_ends_with_a_code_and_no_traceback(
    tmp_path: Path, redirected: str, code: int
) -> None:
    pause = "" if "true" not in redirected else "sleep 0.5; "
    ended = shell(f"({pause}exec {RAYFWD} explain ssh_lost) {redirected}", tmp_path)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    told = "rayfwd: the output cannot be written: No space left on device\n"
    assert ended.stderr == told * (code == 1)


@pytest.mark.parametrize(
    "redirected",
    [
        "2>&- >{}/out",
        "2>&- >&- <&-",
        "2>{}/log | true; exit ${{PIPESTATUS[0]}}",
        ">/dev/full 2>{}/log",
    ],
)
def test_a_node_stays_whatever_becomes_of_its_output(tmp_path: Path, redirected: str) -> None:
    """What it prints when it is ready, and its log. Ray, if it were started, would have none of its
    sockets as its output."""
    words = (
        f"{RAYFWD} head --no-start --stop-after 1 --state-dir {tmp_path}/s --runtime-dir "
        f"{tmp_path}/r --set network.level=listeners --set page.listen=off"
    )
    ended = shell(f"{words} {redirected.format(tmp_path)}", tmp_path)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr
    written = tmp_path / "out"
    if written.exists() and "true" not in redirected:
        assert written.read_text().startswith("To add a machine, run there: rayfwd join ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a full disk")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "head --state-dir {}/full/s --runtime-dir {}/r",
            "/full/s/chosen.json cannot be written",
        ),
        (
            "head --state-dir {}/s --runtime-dir {}/full/s",
            "/full/s/rayfwd.toml cannot be written",
        ),
        ("join ray@127.0.0.1:9 --state-dir {}/full/s --runtime-dir {}/r", "/full/s/node.key: "),
    ],
)
def test_a_full_disk_is_named(tmp_path: Path, words: str, said: str) -> None:
    full = tmp_path / "full"
    full.mkdir()
    told = f"{RAYFWD} {words.format(*2 * [tmp_path])} --no-start --stop-after 3"
    ended = shell(
        f"mount -t tmpfs -o size=16k,mode=700 full {full} && mkdir -m 700 {full}/s && "
        f"{{ dd if=/dev/zero of={full}/all bs=4k count=16 2>/dev/null; "
        f"exec {told} --set network.level=listeners; }}",
        tmp_path,
        ["unshare", "--mount"],
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert f"{tmp_path}{said}" in ended.stderr
    assert "No space left on device" in ended.stderr
    assert "disk is not full" in ended.stderr
