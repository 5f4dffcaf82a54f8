"""Who has a say about a path, and who listens on a socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import rayfwd
from rayfwd.daemon.resources import lock, make_directory
from rayfwd.problems import ProblemError
from rayfwd.system.asuser import whose
from rayfwd.system.control import ask
from rayfwd.system.ownership import check_listener, is_ours, stranger_in
from rayfwd.system.paths import find_socket

OTHER, THIRD = 4242, 4343
SOURCE = str(Path(rayfwd.__file__).parents[1])
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user may look into, as pytest's own may not."""
    path = Path(tempfile.mkdtemp(prefix="rayfwd-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def listening(path: Path, uid: int, answer: bytes = b"{}") -> Iterator[None]:
    """Another user's process, which says `answer` to everybody."""
    ready, tell = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            _listen(path, uid, tell, answer)
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"!"
        yield
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _listen(path: Path, uid: int, tell: int, answer: bytes) -> None:
    os.closerange(0, tell)
    os.closerange(tell + 1, 1024)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        os.write(tell, b"!")
        while True:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                client.recv(4096)
                client.send(answer + b"\n")


def test_what_is_ours(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "not" / "there", Path("/usr/bin"), Path("/")):
        assert stranger_in(path, (0, os.geteuid())) is None
    (tmp_path / "link").symlink_to("../" + tmp_path.name)
    assert is_ours(tmp_path / "link" / "link" / "x")
    (tmp_path / "loop").symlink_to("loop")
    assert not is_ours(tmp_path / "loop" / "x")
    (tmp_path / "file").touch()
    assert not is_ours(tmp_path / "file" / "x")


@pytest.mark.parametrize(("mode", "ours"), [(0o777, False), (0o702, False), (0o1777, True)])
def test_what_anybody_may_write(tmp_path: Path, mode: int, ours: bool) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    directory.chmod(mode)
    (directory / "in").mkdir()
    assert is_ours(directory / "in") is ours
    assert is_ours(directory / "not" / "there") is ours


@NEEDS_ROOT
def test_what_is_anothers(open_dir: Path) -> None:
    theirs = open_dir / "theirs"
    theirs.mkdir()
    (theirs / "ours").mkdir()
    os.chown(theirs, OTHER, OTHER)
    found = stranger_in(theirs / "ours", (0,))
    assert str(found) == f"{theirs} belongs to user id {OTHER}"
    assert stranger_in(theirs / "ours", (0, OTHER)) is None
    # The link is root's; what it leads through is not.
    (open_dir / "link").symlink_to("theirs/ours")
    assert stranger_in(open_dir / "link", (0,)) == found
    account = whose(open_dir / "link" / "x")
    assert account is not None
    assert account.uid == OTHER
    assert whose(open_dir / "not" / "there") is None
    # Where everybody may make names, nobody but us and root is believed, whoever is expected.
    open_dir.chmod(0o1777)
    assert stranger_in(theirs, (0, OTHER)) is not None
    open_dir.chmod(0o777)
    with pytest.raises(ProblemError) as caught:
        whose(theirs)
    assert caught.value.problem.code.name == "directory_unusable"


SAYS = """
import os, sys
from pathlib import Path
from rayfwd.system.ownership import is_ours
print(*(is_ours(Path(path)) for path in sys.argv[1:]))
"""


@NEEDS_ROOT
def test_where_root_has_no_id(open_dir: Path) -> None:
    """A user namespace that knows this user only, as Apptainer makes it."""
    os.chown(open_dir, OTHER, OTHER)  # it is in /tmp, where only what is one's own is believed
    home, team, anybodys, theirs = (open_dir / name for name in ("home", "team", "any", "any/it"))
    for path, mode in ((home, 0o755), (team, 0o775), (anybodys, 0o1777), (theirs, 0o755)):
        path.mkdir()
        path.chmod(mode)
    os.chown(team, 0, THIRD)
    os.chown(theirs, THIRD, THIRD)
    mine = [home / "mine", team / "mine", anybodys / "mine"]
    for path in mine:
        path.mkdir()
        os.chown(path, OTHER, OTHER)
    code = [sys.executable, "-c", SAYS, *map(str, (*mine, theirs))]
    user = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups"]
    alone = ["unshare", "--user", "--map-current-user"]
    for place in (user, [*user, *alone], [*user, "unshare", "--user", "--map-root-user"]):
        ran = subprocess.run(
            [*place, *code],
            env={"PYTHONPATH": SOURCE, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.split() == ["True", "False", "True", "False"], place


@NEEDS_ROOT
def test_a_daemon_uses_no_directory_of_another(open_dir: Path) -> None:
    theirs = open_dir / "rayfwd-0"
    theirs.mkdir(mode=0o777)
    theirs.chmod(0o777)
    os.chown(theirs, OTHER, OTHER)
    for path in (theirs, theirs / "new"):
        with pytest.raises(ProblemError) as caught:
            make_directory(path, 0o700)
        assert caught.value.problem.code.name == "directory_unusable"
    assert not (theirs / "new").exists()
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o777
    (open_dir / "lock").symlink_to("elsewhere")
    with pytest.raises(ProblemError) as caught, lock(open_dir / "lock", open_dir):
        pass
    assert caught.value.problem.code.name == "directory_unusable"
    assert not (open_dir / "elsewhere").exists()


@NEEDS_ROOT
def test_who_listens_is_checked(open_dir: Path) -> None:
    service = open_dir / "run"
    service.mkdir()
    os.chown(service, OTHER, OTHER)
    with listening(service / "hub.sock", OTHER):
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(str(service / "hub.sock"))
            check_listener(ours, service / "hub.sock")  # root gave them this directory
        assert ask(service / "hub.sock", "status") == {}
    (service / "hub.sock").unlink()
    with listening(service / "hub.sock", OTHER):
        open_dir.chmod(0o1777)
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(str(service / "hub.sock"))
            with pytest.raises(PermissionError, match=f"user id {OTHER} listens on"):
                check_listener(ours, service / "hub.sock")
        with pytest.raises(ProblemError) as caught:
            ask(service / "hub.sock", "status")
        assert caught.value.problem.code.name == "daemon_not_permitted"
        assert f"user id {OTHER} listens on" in caught.value.problem.cause


@NEEDS_ROOT
def test_a_socket_in_anothers_directory_is_not_found(
    open_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = open_dir / "service"
    monkeypatch.setattr("rayfwd.system.paths.SERVICE_RUNTIME_DIR", service)
    theirs = open_dir / "theirs"
    theirs.mkdir()
    (theirs / "hub.sock").touch()
    os.chown(theirs, OTHER, OTHER)
    assert find_socket(theirs, "hub.sock") == service / "hub.sock"
