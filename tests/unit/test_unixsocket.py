"""Sockets that `bind` makes, and whether somebody listens on one, as the kernel's table has it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from rayfwd.system import unixsocket

HEADER = "Num       RefCount Protocol Flags    Type St Inode Path\n"
LISTENS, STREAM = "00000002 00000000 00010000 0001 01", "00000003 00000000 00000000 0001 03"
HUB = Path("/run/rayfwd/hub.sock")


def line(state: str, path: str) -> str:
    return f"0000000000000000: {state} 12345 {path}\n"


@pytest.mark.parametrize(
    ("lines", "there"),
    [
        ([line(LISTENS, "/run/rayfwd/.hub1a2b")], True),
        ([line(LISTENS, "/run/rayfwd/hub.sock")], True),  # bound by somebody else
        ([line(STREAM, "/run/rayfwd/.hub1a2b")], False),
        ([line(LISTENS, "/run/rayfwd/.con1a2b")], False),  # the control socket
        ([line(LISTENS, "/run/other/.hub1a2b")], False),
        ([line(LISTENS, "/run/rayfwd/.hub1a2b3c")], False),
        ([line(LISTENS, "@/run/rayfwd/hub.sock"), "cut off he"], False),
        ([], False),
    ],
)
def test_lines_of_the_table(lines: list[str], there: bool) -> None:
    assert unixsocket.listens(HEADER + "".join(lines), HUB) is there


def test_the_kernels_own_table(tmp_path: Path) -> None:
    path = tmp_path / "hub.sock"

    def table() -> str:
        return Path("/proc/net/unix").read_text()

    with unixsocket.bind(path):
        assert unixsocket.listens(table(), path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert unixsocket.listens(table(), path)
    assert path.exists()
    assert not unixsocket.listens(table(), path)


def test_a_socket_of_ones_own_asks_for_no_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit's SystemCallFilter refuses chown(2) itself, whatever it would change."""

    def refused(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    path = tmp_path / "control.sock"
    with unixsocket.bind(path, 0o600, uid=os.geteuid()):
        assert path.stat().st_mode & 0o777 == 0o600
