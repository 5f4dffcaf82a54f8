"""Children as another user: who they are, what they have, and what ends them."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.system import asuser
from rayfwd.system.asuser import (
    ChildError,
    SystemUser,
    account_named,
    call,
    environment,
    own_account,
    run,
    whose,
)

NOBODY = account_named("nobody")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


def shell(account: SystemUser, script: str, **options: Any) -> asuser.Finished:
    return run(account, ["/bin/sh", "-c", script], **{"timeout": 20.0, **options})


@needs_root
def test_a_child_has_that_users_ids_and_groups_only() -> None:
    done = shell(NOBODY, "grep -E '^(Uid|Gid|Groups)' /proc/self/status; umask")
    uids, gids, groups, umask = done.output.decode().splitlines()
    assert uids.split()[1:] == [str(NOBODY.uid)] * 4
    assert gids.split()[1:] == [str(NOBODY.gid)] * 4
    assert groups.split()[1:] == [str(gid) for gid in NOBODY.groups]
    assert int(umask, 8) == 0o077


@needs_root
def test_a_child_has_nothing_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/x")
    monkeypatch.setenv("PYTHONPATH", "/x")
    secret = os.open(tmp_path / "secret", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(secret, True)
    try:
        done = shell(NOBODY, "env; pwd; ls /proc/$$/fd; ps -o tty= $$", env={"MORE": "1"})
    finally:
        os.close(secret)
    *env, where, zero, one, two, tty = done.output.decode().splitlines()
    wanted = {"HOME", "USER", "LOGNAME", "PATH", "LC_ALL", "MORE", "PWD"}
    assert {line.partition("=")[0] for line in env} - {"_", "SHLVL", "OLDPWD"} == wanted
    assert (where, zero, one, two, tty.strip()) == ("/", "0", "1", "2", "?")


@needs_root
def test_another_users_interpreter_imports_nothing_from_where_it_is_told() -> None:
    """By the command line, as a checkout may be closed to that user."""
    seen = {}

    def fake(account: SystemUser, argv: list[str], **_: Any) -> asuser.Finished:
        seen[account.name] = argv[1]
        return asuser.Finished(1, b"", b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asuser, "run", fake)
        for account in (NOBODY, own_account()):
            with pytest.raises(ProblemError):
                call(account, whose, {}, timeout=1.0)
    assert seen == {NOBODY.name: "-I", own_account().name: "-P"}


def test_a_child_of_ones_own_keeps_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/agent")
    monkeypatch.setenv("PATH", "/mine")
    env = environment(own_account())
    assert (env["SSH_AUTH_SOCK"], env["PATH"]) == ("/agent", "/mine")


def test_input_output_and_code() -> None:
    done = shell(own_account(), "cat; echo one >&2; echo two >&2; exit 7", data=b"x" * 200_000)
    assert done == asuser.Finished(7, b"x" * 200_000, b"one\ntwo\n")
    assert done.last_words == "two"


def test_one_that_does_not_end_is_killed_with_all_its_group(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    began = time.monotonic()
    with pytest.raises(ChildError, match="not done in 1 s"):
        shell(own_account(), f"sleep 600 & echo $! $$ > {pids}; wait", timeout=1.0)
    assert time.monotonic() - began < 10
    for pid in map(int, pids.read_text().split()):
        assert ends(pid)


def ends(pid: int) -> bool:
    """Wait for the end of a process that was killed: the kernel takes a moment over it, and it may
    stay a zombie. False: it runs on."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 10.0)[0])
    finally:
        os.close(descriptor)


def test_one_whose_child_keeps_its_output_open_does_not_hold_us() -> None:
    with pytest.raises(ChildError, match="not done in 1 s"):
        shell(own_account(), "setsid sleep 5 & exit 0", timeout=1.0)


@pytest.mark.parametrize("where", ["", " >&2"])
def test_one_that_writes_without_end_is_killed(where: str) -> None:
    with pytest.raises(ChildError, match="wrote more than 16777216 bytes"):
        shell(own_account(), f"exec cat /dev/zero{where}")


def test_what_cannot_be_started() -> None:
    with pytest.raises(ChildError, match="No such file"):
        run(own_account(), ["/none"], timeout=5.0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may")
def test_only_root_becomes_another() -> None:
    with pytest.raises(ChildError, match="not permitted"):
        shell(NOBODY, "true")


@needs_root
def test_an_owner_that_no_database_knows(tmp_path: Path) -> None:
    os.chown(tmp_path, 54321, 54322)
    assert whose(tmp_path) == SystemUser("54321", 54321, 54322, (54322,), Path("/"))


# Functions that are called in the child, which imports this module.


def give_back(**arguments: Any) -> dict[str, Any]:
    print("this is no answer")
    return arguments


async def emit_each(count: int, emit: Callable[[Any], None]) -> str:
    for number in range(count):
        emit(number)
    return "done"


def fail_by_name() -> None:
    raise ProblemError(codes.RAY_NOT_UP.problem("cause", "remedy"))


def fail_unknown() -> None:
    raise RuntimeError("broken")


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    made = asuser.environment
    monkeypatch.setattr(
        asuser, "environment", lambda account: made(account) | {"PYTHONPATH": os.getcwd()}
    )


@pytest.mark.usefixtures("_importable")
def test_a_function_is_called() -> None:
    asked = {"a": 1, "b": ["x", None]}
    assert call(own_account(), give_back, asked, timeout=30.0) == asked


@pytest.mark.usefixtures("_importable")
def test_what_it_emits_comes_in_order() -> None:
    seen: list[Any] = []
    assert call(own_account(), emit_each, {"count": 3}, timeout=30.0, emit=seen.append) == "done"
    assert seen == [0, 1, 2]


@pytest.mark.usefixtures("_importable")
def test_its_problem_is_raised_here() -> None:
    with pytest.raises(ProblemError) as raised:
        call(own_account(), fail_by_name, {}, timeout=30.0)
    assert raised.value.problem == codes.RAY_NOT_UP.problem("cause", "remedy")


@pytest.mark.usefixtures("_importable")
def test_its_fault_is_a_problem_with_its_last_words() -> None:
    with pytest.raises(ProblemError) as raised:
        call(own_account(), fail_unknown, {}, timeout=30.0)
    assert raised.value.problem.code is codes.RAYFWD_NOT_EXECUTABLE
    assert raised.value.problem.cause.endswith("RuntimeError: broken")


@pytest.mark.parametrize(
    "answer",
    [
        b"junk\n",
        b"[1]\n",
        b'{"problem": 5}\n',
        b'{"problem": {"code": [], "cause": "", "remedy": ""}}\n',
        b'{"emit": 1}\n',
        b"[" * 100_000 + b"\n",
        b"",
        b'{"result": 1}',
    ],
)
def test_answers_that_are_none(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever the child is may have written anything."""

    def fake(*_: Any, on_output: Callable[[bytes], None], **__: Any) -> asuser.Finished:
        on_output(answer)
        return asuser.Finished(0, b"", b"")

    monkeypatch.setattr(asuser, "run", fake)
    with pytest.raises(ProblemError) as raised:
        call(own_account(), give_back, {}, timeout=30.0)
    assert raised.value.problem.code is codes.RAYFWD_NOT_EXECUTABLE
    assert sys.executable in raised.value.problem.cause


def test_an_answer_in_pieces() -> None:
    seen: list[Any] = []
    answers = asuser.ChildOutput(seen.append)
    for byte in json.dumps({"emit": [1, 2]}).encode() + b'\n{"result": null}\n':
        answers.feed(bytes([byte]))
    assert (seen, answers.returned, answers.result) == ([[1, 2]], True, None)
