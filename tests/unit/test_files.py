"""Files that are written whole, and read only where they are files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rayfwd.system.files import MOST_READ, read_regular, replace_file, write_new


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_new(path, b"one", 0o640)
    assert (read_regular(path), path.stat().st_mode & 0o777) == (b"one", 0o640)
    with pytest.raises(FileExistsError):
        write_new(path, b"two", 0o640)
    replace_file(path, b"three")
    assert (read_regular(path), path.stat().st_mode & 0o777) == (b"three", 0o600)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "hole").open("wb") as hole:
        hole.truncate(MOST_READ + 1)
    for name in ("link", "fifo", ".", "hole"):
        with pytest.raises(OSError):
            read_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")


def test_a_link_is_replaced_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    replace_file(tmp_path / "link", b"b")
    assert (tmp_path / "a").read_text() == "a"
    assert not (tmp_path / "link").is_symlink()


def refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_no_owner_is_set_where_none_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit's filter of system calls refuses it, whatever the owner."""
    monkeypatch.setattr(os, "fchown", refuse)
    write_new(tmp_path / "key", b"x", 0o600)
    assert (tmp_path / "key").read_bytes() == b"x"
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
