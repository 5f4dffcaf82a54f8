"""Who listens, by the kernel's word and by its files."""

from __future__ import annotations

import os
import socket

import pytest

from rayfwd.ray import procfs
from rayfwd.system.sockdiag import SockDiag


@pytest.mark.parametrize("answers", [True, False], ids=["netlink", "files"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_listener_and_its_process(
    answers: bool, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: SockDiag) -> None:
        raise PermissionError("a sandbox")

    if not answers:
        monkeypatch.setattr(SockDiag, "__init__", refuse)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        port = server.getsockname()[1]
        assert port in procfs.listening()
        found = procfs.listener(port)
        assert found is not None
        assert found.pid == os.getpid()
    assert port not in procfs.listening()
    assert procfs.listener(port) is None
