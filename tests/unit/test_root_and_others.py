"""Every verb, said as root, where the service's user is hostile.

That user's directory is full of links to what only root may read, and of pipes; the interpreter of
`ray.command` is that user's too. Nothing of root's may come into that user's reach, nothing of that
user's may run as root, and nothing may hang.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from rayfwd.cli import VERBS
from rayfwd.setup.steps import remove_tree
from tests.unit.other_user import child
from tests.unit.test_ownership import NEEDS_ROOT, OTHER, listening, open_dir

__all__ = ["open_dir"]

ROOT = Path(__file__).parents[2]
SECRET = "root:$6$T0pS3cretH4sh:19000:0:99999:7:::"
BOUND = 60.0
"""Seconds for a verb: each waits a bounded time for what does not answer."""

WORDS = {
    "check": [["check"]],
    "plan": [["plan"]],
    "doctor": [
        ["doctor"],
        ["doctor", "--report", "R", "--with-logs", "--log", "state/log"],
    ],
    "forget": [["forget", "gpu-9"]],
    "add": [["add", "gpu-9@127.0.0.1:1"]],
    "remove": [["remove", "gpu-9"], ["remove", "--gone", "gpu-9"]],
    "status": [["status"]],
    "reload": [["reload"]],
    "canary": [["canary"]],
    "trace": [["trace", "--seconds", "1"]],
    "env": [["env"]],
    "exec": [["exec", "--", "id"]],
    "run": [["run"]],
    "connect": [["connect"]],
    "attach": [["attach"], ["attach", "--client"]],
    "init": [["init", "head", "--dry-run"]],
    "uninstall": [["uninstall", "--purge"]],
    "keeper": [["keeper"]],
}
ELSEWHERE = {
    "explain": "reads the package",
    "demo": "has directories of its own making",
    "overlay": "reads only a file of its own beside the socket that root names, if it is root's",
    "join": "reads no file, and keeps its own where root alone may write",
    "head": "reads no file, and keeps its own where root alone may write",
}


@dataclass
class Trap:
    """What the hostile user has laid."""

    top: Path
    config: Path
    secret: Path

    @property
    def ran_as(self) -> set[str]:
        marks = self.top / "venv" / "ran_as"
        return set(marks.read_text().split()) if marks.exists() else set()

    def readable(self) -> bytes:
        """All that the user can read afterwards."""
        found = subprocess.run(
            ["sh", "-c", "find . -type f -size -1000k -exec cat {} + 2>/dev/null; true"],
            cwd=self.top,
            user=OTHER,
            group=OTHER,
            extra_groups=[],
            capture_output=True,
            check=True,
        )
        return found.stdout


def lay(top: Path, role: str) -> Trap:
    secret = top / "roots" / "secret"
    secret.parent.mkdir(mode=0o700)
    secret.write_text(SECRET * 40)
    secret.chmod(0o600)
    for name in ("venv", "state", "run"):
        (top / name).mkdir()
    python, ray = top / "venv" / "python3", top / "venv" / "ray"
    python.write_text(f"#!/bin/sh\nid -u >>{top}/venv/ran_as\nexit 1\n")
    ray.write_text(f"#!{python}\nimport ray\n")
    state = top / "state"
    for name in ("roster.json", "plan.json", "lock", "ray.log", "log", "ray_token"):
        (state / name).symlink_to(secret)
    (state / "clients").symlink_to(secret.parent)
    for name in ("node.key", "ray.json", "ray_auth.json"):
        os.mkfifo(state / name)
    for path in (python, ray):
        path.chmod(0o755)
    for name in ("venv", "state", "run"):
        for path in (top / name, *(top / name).iterdir()):
            os.chown(path, OTHER, OTHER, follow_symlinks=False)
    more = '[head]\nssh = "ann@127.0.0.1:1"\n' if role == "worker" else ""
    config = top / "rayfwd.toml"
    config.write_text(
        f'role = "{role}"\nname = "h"\nstate_dir = "{state}"\nruntime_dir = "{top}/run"\n'
        f'{more}[ray]\ncommand = "{ray}"\n'
    )
    return Trap(top, config, secret)


def say(trap: Trap, words: list[str], config: Path | None = None) -> str:
    words = [word.replace("state/", f"{trap.top}/state/") for word in words]
    words = [f"{trap.secret.parent}/report" if word == "R" else word for word in words]
    (trap.secret.parent / "report").unlink(missing_ok=True)
    argv = [*a_python(), "-m", "rayfwd", "--config", str(config or trap.config), *words]
    ran = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOUND, text=True, check=False
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stdout + ran.stderr


@functools.cache
def a_python() -> list[str]:
    """One that the other user may run as well, where there is one, so that the verb goes on."""
    packages = sysconfig.get_path("purelib")
    system = "/usr/bin/python3"
    if runs(OTHER, [sys.executable, "-c", "import rayfwd.cli.status"]):
        return [sys.executable]
    argv = ["env", f"PYTHONPATH={ROOT / 'src'}:{packages}", system]
    return argv if runs(OTHER, [*argv, "-c", "import rayfwd.cli.status"]) else [sys.executable]


def runs(uid: int, argv: list[str]) -> bool:
    try:
        ran = subprocess.run(
            argv, user=uid, group=uid, extra_groups=[], capture_output=True, check=False
        )
    except OSError:
        return False
    return ran.returncode == 0


def check_unharmed(trap: Trap, said: str) -> None:
    assert "0" not in trap.ran_as
    assert SECRET[:20] not in said
    assert SECRET[:20].encode() not in trap.readable()
    assert trap.secret.read_text() == SECRET * 40
    assert (trap.secret.stat().st_uid, trap.secret.stat().st_mode & 0o777) == (0, 0o600)
    report = trap.secret.parent / "report"
    assert not report.exists() or SECRET[:20] not in report.read_text()


def test_no_verb_is_left_out() -> None:
    assert set(WORDS) | set(ELSEWHERE) == set(VERBS)


@NEEDS_ROOT
@pytest.mark.parametrize(
    ("verb", "role"), [*((verb, "head") for verb in sorted(WORDS)), ("plan", "worker")]
)
def test_a_verb_as_root(open_dir: Path, verb: str, role: str) -> None:
    trap = lay(open_dir, role)
    for words in WORDS[verb]:
        check_unharmed(trap, say(trap, words))


@NEEDS_ROOT
def test_a_false_daemon_is_asked(open_dir: Path) -> None:
    trap = lay(open_dir, "head")
    with listening(trap.top / "run" / "control.sock", OTHER):
        for verb in ("status", "forget", "canary"):
            for words in WORDS[verb]:
                check_unharmed(trap, say(trap, words))


@NEEDS_ROOT
def test_what_a_false_daemon_says_of_the_environment_is_no_command_of_roots_shell(
    open_dir: Path,
) -> None:
    trap = lay(open_dir, "head")
    mark = trap.secret.parent / "mark"
    told = {
        "RAY_ADDRESS": f"127.77.0.1:6379'; touch {mark}; '$(touch {mark})",
        f"A=1; touch {mark}; B": "1",
        f"x`touch {mark}`": "1",
        "LD_PRELOAD": "/tmp/theirs.so",
        "PATH": "/tmp/theirs",
        "BASH_ENV": "/tmp/theirs.sh",
    }
    with listening(trap.top / "run" / "control.sock", OTHER, json.dumps(told).encode()):
        said = say(trap, ["env"])
        said_as_json = say(trap, ["env", "--json"])
    shell = subprocess.run(
        ["sh", "-c", f'eval "$1"; env; test ! -e {mark}', "sh", said],
        capture_output=True,
        check=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert "RAY_ADDRESS=127.77.0.1:6379'" in shell.stdout
    assert "theirs" not in shell.stdout
    assert set(json.loads(said_as_json)) == {"RAY_ADDRESS"}


SWAPPER = """
import ctypes, os, sys
state, other = sys.argv[1:]
rename, here, exchange = ctypes.CDLL(None).renameat2, -100, 2
run, link = f"{state}/run", f"{state}/other"
while True:
    try:
        os.makedirs(f"{run}/clusters/x", exist_ok=True)
        os.symlink(other, link)
    except OSError:
        pass
    for _ in range(40):
        rename(here, run.encode(), here, link.encode(), exchange)
"""
"""Puts a link in the place of a directory, and the directory back, without end."""


@NEEDS_ROOT
def test_what_root_purges_is_never_what_a_link_leads_to(open_dir: Path) -> None:
    """A directory of the service's user is another whenever that user likes."""
    state, roots = open_dir / "state", open_dir / "roots"
    roots.mkdir()
    for name in ("passwd", "ssh/key", "run/clusters/x/y"):
        (roots / name).parent.mkdir(parents=True, exist_ok=True)
        (roots / name).write_text(SECRET)
    there = sorted(roots.rglob("*"))
    state.mkdir()
    os.chown(state, OTHER, OTHER)
    with child(SWAPPER, state, roots, uid=OTHER) as swapper:
        try:
            end = time.monotonic() + 4
            while time.monotonic() < end:
                with suppress(OSError):
                    remove_tree(state, [state / "run" / "clusters"])
                assert sorted(roots.rglob("*")) == there
        finally:
            os.kill(swapper.pid, signal.SIGKILL)
    remove_tree(state)
    assert not state.exists()
    assert sorted(roots.rglob("*")) == there


@pytest.mark.parametrize("shut", ["state", "state/run"])
def test_what_may_not_be_looked_into_is_not_said_to_be_removed(open_dir: Path, shut: str) -> None:
    state = open_dir / "state"
    (state / "run").mkdir(parents=True)
    (open_dir / shut).chmod(0o300)
    if root := os.geteuid() == 0:
        for path in (state, state / "run"):
            os.chown(path, OTHER, OTHER)
        os.seteuid(OTHER)
    try:
        with pytest.raises(PermissionError):
            remove_tree(state)
    finally:
        if root:
            os.seteuid(0)
    assert state.exists()
    (open_dir / shut).chmod(0o700)


@NEEDS_ROOT
@pytest.mark.parametrize("verb", ["check", "doctor", "run"])
def test_a_configuration_of_theirs(open_dir: Path, verb: str) -> None:
    """A link to root's secret, and one that is theirs to change."""
    trap = lay(open_dir, "head")
    link, own = trap.top / "run" / "link.toml", trap.top / "run" / "own.toml"
    link.symlink_to(trap.secret)
    shutil.copy(trap.config, own)
    for path in (link, own):
        os.chown(path, OTHER, OTHER, follow_symlinks=False)
        check_unharmed(trap, say(trap, WORDS[verb][0], path))


@pytest.mark.parametrize("verb", ["check", "plan"])
@pytest.mark.parametrize("role", ["head", "worker"])
def test_what_a_configuration_says_writes_on_no_terminal(
    tmp_path: Path, verb: str, role: str
) -> None:
    """Whoever runs it may be another than who has written it."""
    config = tmp_path / "theirs.toml"
    evil = "\\u001b]0;owned\\u0007\\u009b2J\\u202e"
    head = f'[head]\nssh = "ann{evil}@127.0.0.1:1"\n' if role == "worker" else ""
    config.write_text(
        f'role = "{role}"\nname = "h"\nstate_dir = "{tmp_path}/s{evil}"\n'
        f'runtime_dir = "{tmp_path}/r{evil}"\n{head}'
        f'[ray]\nstart = false\ncommand = "/x{evil}"\nenv = {{A = "{evil}"}}\n'
    )
    said = say(Trap(tmp_path, config, tmp_path / "roots" / "secret"), [verb])
    assert "state" in said or "Plan" in said or "has no plan yet" in said
    assert [line for line in said.splitlines() if not line.isprintable()] == []


SPAWNERS = {
    "system/asuser.py": "becomes the user first",
    "system/children.py": "for those below, which name it too",
    "ray/install.py": "root runs only what is root's (`check_roots`)",
    "ray/launcher.py": "the daemon's or the keeper's: as the service's user",
    "ray/canary/sender.py": "the daemon's",
    "ray/status_text.py": "the daemon's",
    "system/restart_job.py": "the daemon's, or the overlay's keeper's; systemctl",
    "daemon/handover.py": "the daemon's own program again",
    "doctor/report.py": "commands of the system",
    "doctor/sshd.py": "a command of the system",
    "cli/exec.py": "the user's own command; root becomes the service's user first",
    "network/overlay.py": "commands of the system",
    "network/overlay_client.py": "the daemon's own program, as the daemon's user",
    "setup/apply.py": "commands of the system",
    "setup/steps.py": "commands of the system",
    "setup/remote/shipment.py": "the Python of the head's Ray, as the head's user",
    "setup/remote/there.py": "commands of the system, and its own daemon as its own user",
    "ssh/openssh.py": "the system's ssh, as the service's user or the file's owner",
    "ssh/ssh_process.py": "the same, and the ProxyCommand of its configuration",
    "ssh/own_sshd.py": "the daemon's; a forced command of its own user's authorized_keys",
    "system/first_process.py": "no program: a child that goes on with what was said",
    "demo/machine_init.py": "its own makings",
    "demo/machine.py": "its own makings",
}
"""Modules that start a program, and why root may say what leads there."""
STARTS = {"Popen", "run", "call", "check_call", "check_output", "create_subprocess_exec"} | {
    *("create_subprocess_shell", "posix_spawn", "posix_spawnp", "execve", "execv", "execvp"),
    *("system", "popen", "fork", "forkpty", "execl", "execle", "execlp", "execvpe"),
}
OF_A_LOOP = {"subprocess_exec", "subprocess_shell"}
"""Whatever the loop is called."""
OF = {"subprocess", "os", "asyncio", "children"}


def test_nothing_else_starts_a_program() -> None:
    found = set()
    for path in sorted((ROOT / "src" / "rayfwd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            of = node.value.id if isinstance(node.value, ast.Name) else None
            if node.attr in OF_A_LOOP or (
                of in OF and node.attr in STARTS and (of, node.attr) != ("asyncio", "run")
            ):
                found.add(str(path.relative_to(ROOT / "src" / "rayfwd")))
    assert found == set(SPAWNERS)
