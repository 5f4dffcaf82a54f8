"""What the service manager is told, and what it is asked."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from pathlib import Path

import pytest

from rayfwd.system.notify import Notifier
from rayfwd.system.restart_job import being_restarted, job_of, own_unit

SYSTEM = "0::/system.slice/rayfwd.service\n"
USERS = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/rayfwd.service\n"
LISTED = "147 other.service  start   waiting\n151 rayfwd.service restart running\n"


@pytest.mark.parametrize("abstract", [False, True])
def test_notifications(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"rayfwd-test-{os.getpid()}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        listener.bind("\0" + name if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        notifier = Notifier()
        assert notifier
        notifier.send("READY=1", "STATUS=zwei\nZeilen …")
        assert listener.recv(4096).decode() == "READY=1\nSTATUS=zwei Zeilen ?"
        assert notifier.send_descriptors([listener.fileno()], "FDSTORE=1")
        data, control, _, _ = listener.recvmsg(4096, socket.CMSG_SPACE(4))
        (_, kind, passed), *_ = control
        assert (data, kind) == (b"FDSTORE=1", socket.SCM_RIGHTS)
        os.close(array.array("i", passed)[0])
    notifier.send("READY=1")  # nobody listens any more, and nothing is raised
    assert not notifier.send_descriptors([0], "FDSTORE=1")
    notifier.close()
    assert not notifier


def test_nobody_to_notify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not Notifier()
    Notifier().send("READY=1")
    assert not Notifier().send_descriptors([0], "FDSTORE=1")


def test_whose_service_this_is() -> None:
    env = {"NOTIFY_SOCKET": "/run/systemd/notify"}
    assert own_unit(env, SYSTEM) == ("rayfwd.service", False)
    assert own_unit(env, USERS) == ("rayfwd.service", True)
    assert own_unit(env, "0::/user.slice/user-0.slice/session-3.scope\n") is None
    assert own_unit({}, SYSTEM) is None, "by hand, somewhere below a service"


def test_which_job_it_has() -> None:
    """As systemd 252 lists them."""
    assert job_of("rayfwd.service", LISTED) == "restart"
    assert job_of("rayfwd-ray.service", LISTED) == ""
    assert job_of("rayfwd.service", "No jobs listed.\n") == ""


def test_by_hand_it_is_a_stop() -> None:
    assert asyncio.run(being_restarted({})) is False
