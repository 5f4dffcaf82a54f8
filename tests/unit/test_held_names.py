"""A name that one process of this machine holds, whoever else makes it."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, closing

import pytest

from rayfwd.system.held_names import HeldName, NameHolder, holders_of_names
from rayfwd.system.sockdiag import SockDiag, UnixName
from tests.unit.other_user import OTHER, child, needs_root

NAME = f"rayfwd-test-{os.getpid()}"
TAKE = f"""
with socket.socket(socket.AF_UNIX) as s:
    s.bind("\\0{NAME}")
    if sys.argv[1] == "listens":
        s.listen(8)
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["the kernel says whose", "it does not"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: SockDiag) -> list[UnixName]:
        raise OSError("no unix_diag")

    if request.param == "it does not":
        monkeypatch.setattr(SockDiag, "unix_names", absent)


def rivals() -> list[NameHolder]:
    return [holder for holder in holders_of_names(NAME) if holder.counts]


def hold() -> HeldName:
    return HeldName(NAME, rivals)


def test_it_is_held_until_it_is_closed() -> None:
    with closing(hold()):
        (holder,) = holders_of_names(NAME)
        assert (holder.name, holder.uid) == (NAME.encode(), os.geteuid())
        with pytest.raises(OSError, match="in use"):
            hold()
    assert holders_of_names(NAME) == []
    hold().close()


@needs_root
@pytest.mark.parametrize("listens", ["listens", "does not"])
def test_a_stranger_keeps_nobody_from_it(listens: str) -> None:
    with child(TAKE, listens, uid=OTHER) as stranger:
        assert stranger.says() == "taken"
        with closing(hold()):
            assert [holder.uid for holder in rivals()] == [os.geteuid()]
            with pytest.raises(OSError, match="in use"):
                hold()
        hold().close()


@needs_root
def test_one_that_was_held_beside_a_stranger_is_held_when_the_stranger_is_gone() -> None:
    with ExitStack() as held:
        with child(TAKE, "listens", uid=OTHER) as stranger:
            assert stranger.says() == "taken"
            held.enter_context(closing(hold()))
        with pytest.raises(OSError, match="in use"):
            hold()
    hold().close()


def test_names_that_begin_otherwise_are_none_of_it() -> None:
    with socket.socket(socket.AF_UNIX) as other, closing(hold()):
        other.bind(f"\0x{NAME}")
        assert [holder.name for holder in holders_of_names(NAME)] == [NAME.encode()]
