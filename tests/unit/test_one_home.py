"""Where a machine has its state if others have the same home (`system/paths.py`)."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayfwd.setup.apply import take_away
from rayfwd.setup.manifest import Manifest
from rayfwd.setup.remote import there
from rayfwd.setup.request import Layout, user_layout
from rayfwd.setup.steps import Directory, Verdict
from rayfwd.system import files, paths
from rayfwd.system.paths import is_on_a_network, of_this_machine, own_place, usual_config

US = "gpu-1"


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, US)


def be(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(nodename=name))


@contextmanager
def held(directory: Path, by: str) -> Iterator[None]:
    """As a daemon of that machine has it."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / "lock"
    lock.write_text(by)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *lines: str) -> None:
    """The kernel's table of mounts, with these."""
    table = tmp_path / "mountinfo"
    rows = ["21 1 8:1 / / rw - ext4 /dev/sda1 rw", *lines]
    table.write_text("".join(f"{row}\n" for row in rows))
    monkeypatch.setattr(paths, "_MOUNTS", str(table))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"home of all", b"home\\040of\\040all"),
        ("für alle".encode(), "für\\040alle".encode()),
        (b"no \xff text", b"no\\040\xff\\040text"),
        (b"a\\040b", b"a\\134040b"),
    ],
)
def test_a_disk_of_the_network_is_known_whatever_its_place_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, shown: bytes
) -> None:
    """Its place stands in the kernel's table as bytes, with few of them escaped."""
    mounted(monkeypatch, tmp_path)
    with (tmp_path / "mountinfo").open("ab") as table:
        table.write(b"22 21 0:40 / /somewhere/\xfe rw - tmpfs none rw\n")
        table.write(b"23 21 0:41 / /mnt/" + shown + b" rw - nfs4 server:/home rw\n")
    assert is_on_a_network(Path(os.fsdecode(b"/mnt/" + name)) / "rayfwd")
    assert not is_on_a_network(tmp_path)


def test_the_usual_directory_is_a_machines_that_is_alone(tmp_path: Path) -> None:
    """Also one whose host name has changed, as a container's that was made anew."""
    assert of_this_machine(tmp_path) == tmp_path
    (tmp_path / "lock").write_text(US)
    assert of_this_machine(tmp_path) == tmp_path
    (tmp_path / "lock").write_text("another")
    assert of_this_machine(tmp_path) == tmp_path
    with held(tmp_path, US):
        assert of_this_machine(tmp_path) == tmp_path
    with held(tmp_path, ""):
        assert of_this_machine(tmp_path) == tmp_path, "an earlier version did not say"


@pytest.mark.parametrize("cluster", [".", "clusters/blue"])
def test_who_comes_second_has_a_place_of_its_own_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str
) -> None:
    with held(tmp_path / cluster, "gpu-2"):
        assert of_this_machine(tmp_path) == tmp_path / "machines/gpu-1"
    (tmp_path / "machines/gpu-1").mkdir(parents=True)
    assert of_this_machine(tmp_path) == tmp_path / "machines/gpu-1", "gpu-2 is off"
    be(monkeypatch, "gpu-2")
    assert of_this_machine(tmp_path) == tmp_path
    be(monkeypatch, "gpu-3")
    assert of_this_machine(tmp_path) == tmp_path / "machines/gpu-3", "it is gpu-2's, who is off"


@pytest.mark.parametrize(
    ("row", "apart"),
    [
        ("30 21 0:40 / {} rw shared:5 - nfs4 server:/home rw", True),
        ("30 21 0:40 / {} rw - lustre mds@tcp:/fs rw", True),
        ("30 21 0:40 / {} rw - fuse.sshfs ray@server: rw", True),
        ("30 21 0:40 / {} rw - tmpfs tmpfs rw", False),
        ("30 21 0:40 / {}-other rw - nfs4 server:/home rw", False),
        ("30 21 0:40 / / rw - nfs4 server:/root rw", True),
    ],
)
def test_on_a_disk_of_the_network_each_machine_has_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, apart: bool
) -> None:
    """Who comes first then does not matter, and NFS may not tell of the locks of others."""
    home = tmp_path / "my home"
    escaped = str(home).replace(" ", "\\040")
    mounted(monkeypatch, tmp_path, row.format(escaped))
    state = home / ".local/state/rayfwd"
    own = state / "machines" / US
    assert of_this_machine(state) == (own if apart else state)
    state.mkdir(parents=True)
    (state / "lock").write_text(US)
    assert of_this_machine(state) == state, "it had this one before"


def test_one_locks_a_directory_against_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS does not tell them of a directory's lock. Nothing is left."""
    mounted(monkeypatch, tmp_path, f"30 21 0:40 / {tmp_path} rw - nfs4 server:/home rw")
    below = tmp_path / "keys"
    below.mkdir()
    with files.locked(below):
        (lock,) = below.iterdir()
        with lock.open("rb+") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not list(below.iterdir())


@pytest.mark.parametrize(
    "name", ["a" * 64, "gpu-1.rack-7.example.org", "localhost", "weiß", "..", "a/b"]
)
def test_the_place_has_a_short_plain_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    be(monkeypatch, name)
    place = own_place(tmp_path)
    assert place.parent == tmp_path / "machines"
    assert len(place.name) <= 20
    assert place.name.isascii()
    be(monkeypatch, f"{name}x")
    assert own_place(tmp_path) != place


def test_its_file_is_the_usual_one_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    env = {"HOME": str(tmp_path)}
    shared = tmp_path / ".config/rayfwd.toml"
    shared.parent.mkdir()
    shared.touch()
    assert usual_config(env) == shared
    own = tmp_path / ".local/state/rayfwd/machines/gpu-1/rayfwd.toml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert usual_config(env) == own
    be(monkeypatch, "gpu-2")
    assert usual_config(env) == shared
    assert os.fspath(paths.default_state_dir(env)).endswith("/rayfwd")


@pytest.mark.parametrize("order", list(itertools.permutations(["first", "second", "third"])))
def test_what_all_machines_use_goes_with_the_last_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
) -> None:
    """What is a machine's own goes with it. Whoever is made first has recorded what all use."""
    usual = user_layout(tmp_path, 1000, "/x/rayfwd", "/x/python", None)
    layouts = {"first": usual}
    for name in ("second", "third"):
        be(monkeypatch, name)
        own = own_place(usual.state)
        apart = replace(usual, state=own, secrets=own, config=own / "rayfwd.toml")
        layouts[name] = replace(apart, manifest=own / "init.json")
    link = tmp_path / ".local/bin/rayfwd"
    for layout in layouts.values():
        set_up(layout, tmp_path, link)
    assert os.readlink(link) == "/x/rayfwd"
    for number, name in enumerate(order):
        layout, others = layouts.pop(name), [left.manifest for left in layouts.values()]
        manifest = Manifest(layout.manifest)
        if others:
            there._hand_over(manifest, layout, Manifest(others[0]))
        take_away(manifest, layout, False, True, lambda *_: None)
        assert not layout.config.exists()
        for left in layouts.values():
            assert left.config.exists()
            assert left.manifest.exists()
        assert link.is_symlink() == (number < 2)
    assert not list(tmp_path.iterdir())


def set_up(layout: Layout, home: Path, link: Path) -> None:
    """As `prepare` does, with its directories, its file and the link that all use."""
    manifest = Manifest(layout.manifest)
    missing = {layout.state, layout.config.parent, link.parent}
    above = {up for path in missing for up in path.parents if home in up.parents}
    for path in sorted(missing | above):
        if not path.exists():
            path.mkdir()
            manifest.add({"id": str(path), "kind": "directory", "path": str(path)})
    layout.config.touch()
    file = str(layout.config)
    manifest.add({"id": file, "kind": "file", "path": file, "sha256": ""})
    if not link.is_symlink():
        link.symlink_to("/x/rayfwd")
    entry = {"id": str(link), "kind": "link", "path": str(link), "target": "/x/rayfwd"}
    manifest.add(entry)


# -- what NFS remembers


def shows_once_opened(
    monkeypatch: pytest.MonkeyPatch, directory: Path, change: Callable[[], object]
) -> list[Path]:
    """What another machine has done in that directory. NFS shows it to who opens the directory;
    until then it may show for a minute what it saw before, also that nothing is there. Where it was
    opened."""
    opened: list[Path] = []
    really = os.open

    def open_(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECTORY and Path(path) == directory:
            if not opened:
                change()
            opened.append(directory)
        return really(path, flags, *more, **named)

    monkeypatch.setattr("os.open", open_)
    return opened


def test_a_directory_that_another_machine_has_just_made_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rayfwd add` of two at once: "~/.local/bin: File exists"."""
    made = tmp_path / "bin"
    shows_once_opened(monkeypatch, tmp_path, made.mkdir)
    step = Directory(made, None, None, 0o755)
    assert step.inspect(Manifest(tmp_path / "init.json")) is Verdict.THERE


def test_a_machine_that_was_removed_just_now_has_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the installation would stay for it."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    usual = user_layout(tmp_path, 1000, "/x/rayfwd", "/x/python", None)
    monkeypatch.setattr(there, "find_places", lambda _: usual)
    theirs = usual.state / "machines/gpu-2/init.json"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    own = usual.state / "machines/gpu-1"
    layout = replace(usual, state=own, manifest=own / "init.json")
    assert there._others_here(layout) == [theirs]
    shows_once_opened(monkeypatch, theirs.parent, theirs.unlink)
    assert there._others_here(layout) == []


def test_a_lock_whose_file_another_machine_has_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "is_on_a_network", lambda _: True)
    lock = tmp_path / files.LOCK_FILE

    def made_anew() -> None:
        lock.unlink()
        lock.touch()

    opened = shows_once_opened(monkeypatch, tmp_path, made_anew)
    with files.locked(tmp_path):
        assert len(opened) == 2
        with lock.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not lock.exists()
