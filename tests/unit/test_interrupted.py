"""Ctrl-C at many moments of the start of the real program: it ends, without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
MOMENTS = 8


def installed(loaded: int) -> list[str]:
    """What pip makes of the project's entry, its script, in words for Python. The script writes to
    the descriptor `loaded` once the entry is loaded: before that it is Python that starts."""
    entry = tomllib.loads(PROJECT.read_text())["project"]["scripts"]["rayfwd"]
    module, _, function = entry.partition(":")
    told = f"import os; os.write({loaded}, b'.')"
    return [
        "-c",
        f"import re, sys; from {module} import {function}; {told}; sys.exit({function}())",
    ]


def started(home: Path) -> subprocess.Popen[str]:
    """A head, once the entry is loaded."""
    env = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, *installed(writer), *head(home)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[writer],
        )
    finally:
        os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read(1) == b".", "it has not come as far"
    return process


def head(home: Path) -> list[str]:
    words = ["head", "--name", "h", "--state-dir", str(home / "state")]
    words += ["--runtime-dir", str(home / "run"), "--no-start", "--set", "page.listen=off"]
    return [*words, "--set", "network.level=listeners"]


def test_ctrl_c_while_it_starts(tmp_path: Path) -> None:
    began = time.monotonic()
    process = started(tmp_path)
    assert process.stderr is not None
    while '"rayfwd_starting"' not in (line := process.stderr.readline()):
        assert line, f"it ended with {process.wait()}"
    seconds = time.monotonic() - began
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0, "from then on it is a stop"
    for k in range(MOMENTS):
        process = started(tmp_path)
        time.sleep(seconds * k / MOMENTS)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        after = f"{seconds * k / MOMENTS:.3f} s: {process.returncode}, {err}"
        assert "Traceback" not in err, after
        assert "KeyboardInterrupt" not in err, after
        if "rayfwd_starting" in err and process.returncode != 130:  # it came just before
            assert process.returncode == 0, after
            assert "rayfwd_stopped" in err, after
        else:
            assert process.returncode in {-signal.SIGINT, 130}, after
            assert out == "", after


def test_ctrl_c_is_ignored_where_it_was_ignored_before() -> None:
    """As in a script's background."""
    code = "import signal, sys; from rayfwd.__main__ import main; from rayfwd.cli import explain\n"
    code += "explain.run = lambda _: signal.raise_signal(signal.SIGINT) or 7\n"
    code += "sys.argv = ['rayfwd', 'explain', 'link_down']; sys.exit(main())"
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code]
    ran = subprocess.run(shell, timeout=60, capture_output=True)
    assert (ran.returncode, ran.stderr) == (7, b"")


def test_ctrl_c_while_a_verb_works() -> None:
    """Then there may be something to clean up, and the exit code is told."""
    code = "import signal, sys; from rayfwd.__main__ import main; from rayfwd.cli import explain\n"
    code += "explain.run = lambda _: signal.raise_signal(signal.SIGINT)\n"
    code += "sys.argv = ['rayfwd', 'explain', 'link_down']; sys.exit(main())"
    ran = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True)
    assert (ran.returncode, ran.stderr) == (130, b"")


def test_process_1_ends_at_ctrl_c_while_it_loads() -> None:
    """The kernel spares process 1 a signal that it has no handler for."""
    code = "import os, signal; os.getpid = lambda: 1; import rayfwd.__main__\n"
    code += "signal.raise_signal(signal.SIGINT)"
    ran = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True)
    assert (ran.returncode, ran.stderr) == (130, b"")


def test_the_entry_loads_next_to_nothing_before_ctrl_c_is_quiet() -> None:
    code = "import sys, os, signal; before = set(sys.modules); import rayfwd.__main__\n"
    code += "print(sorted(set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert ran.stdout == "['rayfwd', 'rayfwd.__main__']\n"
