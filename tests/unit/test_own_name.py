"""The line of /etc/hosts by which the machine's own name leads to the node's address."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rayfwd.network.own_name import missing_line

LINE = "127.77.0.2 gpu-1"


@pytest.mark.parametrize(
    "text",
    [
        f"{LINE}\n",
        "127.77.0.2\tgpu-1.example.org gpu-1  # by hand\n",
        f"127.0.0.1 localhost\n\n# {LINE}\n127.77.0.2 GPU-1",
        f"{LINE}\n{LINE}\n",
    ],
)
def test_it_is_there(tmp_path: Path, text: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    assert missing_line("127.77.0.2", hosts, "gpu-1") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1 localhost\n127.0.1.1 gpu-1\n",
        f"127.0.1.1 gpu-1\n{LINE}\n",
        f"{LINE}\n198.51.100.2 gpu-1\n",
        f"{LINE}\n::1 gpu-1\n",  # which is told first
        f"# {LINE}\n",
        "127.77.0.2\n",
        "127.77.0.2 gpu-10 my-gpu-1\n",
        "127.77.0.3 gpu-1\n",
        "\udcff\n",
    ],
)
def test_it_is_missing(tmp_path: Path, text: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert missing_line("127.77.0.2", hosts, "gpu-1") == LINE


def test_without_a_file(tmp_path: Path) -> None:
    line = missing_line("127.77.0.2", tmp_path / "none")
    assert line == f"127.77.0.2 {socket.gethostname()}"
