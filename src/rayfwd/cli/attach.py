"""Join standard input and output to the hub's socket.

Made for sshd: `restrict,command="rayfwd attach"` before a key in authorized_keys lets that key
reach the hub and nothing else. What the client asked to run (SSH_ORIGINAL_COMMAND) is ignored.
"""

# The standard library only: this is started for every lane, and may run as a user who cannot
# read the configuration file.

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

from rayfwd.cli import FAULT, OK, MistakeError
from rayfwd.places import default_runtime_dir, find_socket, usual_config

_CHUNK = 262144
_HUB_SOCKET = "hub.sock"
_STDIN, _STDOUT, _STDERR = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket",
        metavar="PATH",
        type=Path,
        help="the hub's socket (default: the configuration file's, else /run/rayfwd/hub.sock)",
    )


def run(args: argparse.Namespace) -> int:
    path: Path = args.socket or hub_socket(args.config)
    hub = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        hub.connect(str(path))
    except PermissionError:
        user = f"user id {os.geteuid()}"
        return _refuse(
            "hub_not_permitted",
            f"{user} may not connect to {path}",
            "name this user in hub.users of the head's configuration",
        )
    except OSError as exc:
        return _refuse(
            "hub_absent",
            f"no hub answers on {path} ({exc.strerror or exc})",
            "start `rayfwd run` on the head, or correct the socket's path",
        )
    join(hub)
    return OK


def _refuse(code: str, cause: str, remedy: str) -> int:
    """One line in a form that the worker's link reads."""
    print(f"rayfwd attach: {code}: {cause}; {remedy}", file=sys.stderr)
    return FAULT


def hub_socket(config: Path | None) -> Path:
    """Where the configuration file says the hub listens, read without validating it.

    Without `config`, a usual file that is absent or closed to this user is no fault.
    """
    data: dict[str, Any] = {}
    try:
        data = tomllib.loads((config or usual_config(os.environ)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        if config is not None:
            raise MistakeError([f"{config}: cannot be read: {exc}"]) from None
    hub = data.get("hub")
    given = hub.get("socket") if isinstance(hub, dict) else None
    if isinstance(given, str):
        return Path(given)
    directory = data.get("runtime_dir")
    if isinstance(directory, str):
        return Path(directory) / _HUB_SOCKET
    return find_socket(default_runtime_dir(os.environ), _HUB_SOCKET)


def join(hub: socket.socket) -> None:
    """Copy both ways, each way ending by itself, until both have ended or the hub has gone."""
    sending = threading.Thread(target=_send, args=(hub,), name="attach-send", daemon=True)
    sending.start()
    if not _receive(hub):
        return
    # The hub has ended its half. Ours goes on until standard input ends, or the hub has gone.
    gone = select.poll()
    gone.register(hub, 0)  # POLLHUP and POLLERR are always reported (poll(2))
    while sending.is_alive() and not gone.poll(200):
        pass


def _send(hub: socket.socket) -> None:
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while size := os.readv(_STDIN, [buffer]):
            hub.sendall(view[:size])
    with contextlib.suppress(OSError):
        hub.shutdown(socket.SHUT_WR)


def _receive(hub: socket.socket) -> bool:
    """False: nobody reads our output any more."""
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while True:
        try:
            size = hub.recv_into(buffer)
        except OSError:
            size = 0
        if size == 0:
            break
        rest = view[:size]
        try:
            while rest:
                rest = rest[os.write(_STDOUT, rest) :]
        except OSError:
            return False
    # Whoever reads our output must see its end now, also while the other way goes on.
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, _STDOUT)
    os.dup2(nowhere, _STDERR)
    os.close(nowhere)
    return True
