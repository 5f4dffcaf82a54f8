"""Connect standard input and output to the hub's socket.

This is for sshd: `restrict,command="rayfwd attach"` before a key in authorized_keys lets that key
reach the hub and nothing else. The command that the client asks for (SSH_ORIGINAL_COMMAND) is
ignored. With --client, the key is for `rayfwd connect` only, and brings no node into the cluster.
With --peer, on a worker, the socket is the one where other workers' direct ways end.
"""

# Both are passed to the hub, and this only waits for its end. Where the hub does not take them
# (an older one), or they are no pipes, bytes are copied both ways.

# The standard library and a little of ours: this is started for every lane, and may run as a user
# who cannot read the configuration file.

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import select
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.cli import FAULT, OK, MistakeError
from rayfwd.problems import ProblemError
from rayfwd.session.frames import Frame, Kind, ProtocolError, encode, first_frame
from rayfwd.session.preamble import MARKER
from rayfwd.system.ownership import check_listener
from rayfwd.system.passing import is_stream
from rayfwd.system.paths import (
    SECRET,
    default_runtime_dir,
    find_socket,
    running_config,
    usual_config,
)

_CHUNK = 262144
_HUB_SOCKET, _LINK_SOCKET, _PEERS_SOCKET = "hub.sock", "link.sock", "peers.sock"
_STDIN, _STDOUT, _STDERR = 0, 1, 2
_HELLO_LIMIT = 1 << 16
_HELLO_TIMEOUT = 10.0
"""As the hub has them."""
_HELLO_USUAL = 2.0
"""Seconds in which it comes from who has one: it is sent with the command."""
_PROTOCOL, _PROOF = 1, "proof"
"""The protocol's version, and a feature that every version since 0.1.0 has (`session/handshake.py`,
which is slow to load)."""
_AT_ONCE = 1 << 14
"""Bytes that come to the hub in one piece, and the descriptors with them."""
_TAKEN = b"\0"
"""The hub's word that it has taken the descriptors. An older one answers with a frame, whose first
byte is another."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket",
        metavar="PATH",
        type=Path,
        help="the hub's socket (default: from the configuration file, else /run/rayfwd/hub.sock)",
    )
    parser.add_argument(
        "--node",
        metavar="NAME",
        help="the SSH key belongs to this node: it may come with a new key of rayfwd's, but "
        "not as another node",
    )
    parser.add_argument(
        "--client",
        action="store_true",
        help="let clients (`rayfwd connect`) through, and no nodes",
    )
    parser.add_argument(
        "--peer",
        action="store_true",
        help="on a worker: let another worker through, which dials this one ([[direct]] there)",
    )


def run(args: argparse.Namespace) -> int:
    path: Path = args.socket or hub_socket(args.config, args.cluster, args.peer)
    try:
        vouched, hello = _checked(args, path)
        hub = _connected(path)
    except ProblemError as exc:
        # One line in a form that the worker's link reads.
        problem = exc.problem
        print(f"rayfwd attach: {problem.code}: {problem}", file=sys.stderr)
        return FAULT
    begun = vouched + hello
    hello = hello or _read_hello(hub, within=_HELLO_USUAL)
    if not _knows_no_marker(hello):
        with contextlib.suppress(OSError):  # nobody reads it: `join` finds the same
            os.write(_STDOUT, MARKER)
    if not begun:
        begun = _read_hello(hub, hello)
        if not args.client:
            begun = _vouched_for_key(path, begun)
    if not _handed_over(hub, begun):
        join(hub)
    return OK


def _checked(args: argparse.Namespace, path: Path) -> tuple[bytes, bytes]:
    """What the hub is to be told first, and the HELLO; both are empty where the line of
    authorized_keys says nothing of who may come, and nothing is read yet. Raises ProblemError."""
    if args.client:
        hello = _read_hello()
        if not _is_clients(hello):
            raise codes.CLIENT_ONLY.error(
                "this SSH key is for `rayfwd connect` only, and the machine that used it "
                "is not a client",
                "use a key whose line in authorized_keys has no --client",
            )
        return b"", hello
    return (b"", b"") if args.node is None else _of_node(args.node, path)


def _of_node(node: str, path: Path) -> tuple[bytes, bytes]:
    hello = _read_hello()
    if _said_in(hello) is None:
        # What followed would be the hub's alone to read, and it knows nothing of this line.
        raise codes.HELLO_MISSING.error(
            f"this SSH key is for the node {node}, and no complete HELLO came with it",
            "nothing: rayfwd sends a HELLO at once, so it was another program",
        )
    claimed = _node_of(hello)
    if claimed is None:
        return b"", hello
    if claimed != node:
        raise codes.KEY_OF_ANOTHER.error(
            f"this SSH key is for the node {node}, but this machine says that it is {claimed}",
            f"give this machine that name (--name {node}, or `name` in its file), or use "
            "its own SSH key",
        )
    try:
        return _vouch(node, path, ssh_key(os.environ)), hello
    except OSError as exc:
        raise codes.HUB_NOT_PERMITTED.error(
            f"{path.with_name(SECRET)} cannot be read: {exc.strerror or exc}",
            "log in as the user that runs the hub, and check that the hub runs: --node needs both",
        ) from None


def _connected(path: Path) -> socket.socket:
    """To the hub. Raises ProblemError."""
    hub = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        hub.connect(str(path))
        check_listener(hub, path)
    except PermissionError as exc:
        if exc.errno is None:
            raise codes.HUB_NOT_PERMITTED.error(
                str(exc), "name the hub's socket with --socket"
            ) from None
        raise codes.HUB_NOT_PERMITTED.error(
            f"user id {os.geteuid()} may not connect to {path}",
            "add this user to hub.users in the head's file (`rayfwd head --users USER`), then "
            "restart rayfwd there",
        ) from None
    except OSError as exc:
        raise codes.HUB_ABSENT.error(
            f"no hub answers on {path} ({exc.strerror or exc})",
            "start rayfwd on the head (`systemctl start rayfwd`), or correct the socket's path",
        ) from None
    return hub


def _read_hello(
    hub: socket.socket | None = None, buffer: bytes = b"", within: float = _HELLO_TIMEOUT
) -> bytes:
    """Standard input, which began with `buffer`, until its first frame is whole, or cannot be one,
    or does not come, or the hub has something to say before."""
    deadline = time.monotonic() + within
    ready = select.poll()
    ready.register(_STDIN, select.POLLIN)
    if hub is not None:
        ready.register(hub, select.POLLIN)
    while not _is_decided(buffer) and (left := deadline - time.monotonic()) > 0:
        what = ready.poll(left * 1000)
        if not what or what[0][0] != _STDIN:
            break
        data = os.read(_STDIN, _CHUNK)
        if not data:
            break
        buffer += data
    return buffer


def _is_decided(begun: bytes) -> bool:
    """Its first frame is whole, or cannot be one."""
    try:
        return first_frame(bytearray(begun), _HELLO_LIMIT) is not None
    except ProtocolError:
        return True


def _whole_frame(begun: bytes) -> Frame | None:
    """The first frame, if it is whole and can be one."""
    try:
        return first_frame(bytearray(begun), _HELLO_LIMIT)
    except ProtocolError:
        return None


def _handed_over(hub: socket.socket, begun: bytes) -> bool:
    """Send what standard input has brought; with it standard input and output, if they are pipes
    and it is a frame of the usual length. True: the hub took them, and has gone since."""
    usual = _whole_frame(begun) is not None and len(begun) <= _AT_ONCE
    try:
        if usual and is_stream(_STDIN) and is_stream(_STDOUT):
            socket.send_fds(hub, [begun], [_STDIN, _STDOUT])
        else:
            hub.sendall(begun)
            return False
        if hub.recv(1, socket.MSG_PEEK) != _TAKEN:
            return False
    except OSError:  # it has gone: to copy what it said and to find its end is the same as ever
        return False
    hub.recv(1)
    _let_go(_STDIN, _STDOUT)
    with contextlib.suppress(OSError):
        while hub.recv(_CHUNK):  # it has no more to say here
            pass
    return True


def _is_clients(begun: bytes) -> bool:
    """Whether it begins with the HELLO of a client, or with what its doctor asks in place of one,
    whose payload is the same."""
    body = _said_in(begun)
    return body is not None and body.get("role") == "client"


def _knows_no_marker(begun: bytes) -> bool:
    """Whether it begins with what a 0.1.0 says: to that, all that comes back is frames."""
    body = _said_in(begun)
    if body is None or "key" not in body:
        return False
    features = body.get("features")
    return not isinstance(features, list) or _PROOF not in features


def _node_of(begun: bytes) -> str | None:
    """The name that a worker's HELLO, or its doctor's, begins with; None: it is none."""
    body = _said_in(begun)
    if body is None or body.get("role", "worker") != "worker":
        return None
    return str(body.get("node", ""))


def _said_in(begun: bytes) -> dict[str, Any] | None:
    """What a HELLO says, or what a doctor asks in place of one; None: it is neither."""
    frame = _whole_frame(begun)
    if frame is None or frame.kind not in {Kind.HELLO, Kind.CHECK}:
        return None
    try:
        body = json.loads(frame.payload)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _vouched_for_key(hub: Path, begun: bytes) -> bytes:
    """With the SSH key's word before it, where sshd tells which that is and the hub believes us."""
    key = ssh_key(os.environ)
    if key is None or _node_of(begun) is None:
        return begun
    try:
        return _vouch(None, hub, key) + begun
    except OSError:  # a login as another user than the hub's
        return begun


def ssh_key(environ: Mapping[str, str]) -> str | None:
    """The fingerprint of the key that this login came by, as `ssh-keygen -l` has it; None: sshd
    does not tell (`ExposeAuthInfo yes` in sshd_config(5))."""
    try:
        lines = Path(environ["SSH_USER_AUTH"]).read_text(encoding="ascii").splitlines()
        words = next(line.split() for line in lines if line.startswith("publickey "))
        digest = hashlib.sha256(base64.b64decode(words[2], validate=True)).digest()
    except (KeyError, OSError, ValueError, StopIteration, IndexError):
        return None
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _vouch(node: str | None, hub: Path, key: str | None = None) -> bytes:
    """What the hub is told before that. Raises OSError."""
    secret = hub.with_name(SECRET).read_text(encoding="ascii", errors="replace").strip()
    payload = json.dumps({"node": node, "secret": secret, "key": key}).encode()
    return encode(Kind.VOUCH, 0, _PROTOCOL, payload)


def hub_socket(config: Path | None, cluster: str | None = None, peer: bool = False) -> Path:
    """Where the configuration file says the hub listens, read without validating it; of a `peer`,
    where a worker waits for others.

    Without `config`, a usual file that is absent or closed to this user is no fault.
    """
    data: dict[str, Any] = {}
    try:
        file = config or running_config(os.environ, cluster) or usual_config(os.environ, cluster)
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        if config is not None:
            why = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise MistakeError([f"{config}: cannot be read: {why}"]) from None
    hub = data.get("hub")
    given = hub.get("socket") if isinstance(hub, dict) else None
    if isinstance(given, str) and not peer:
        return Path(given)
    # On a worker that the head dials: where that worker waits.
    name = _LINK_SOCKET if data.get("role") == "worker" else _HUB_SOCKET
    name = _PEERS_SOCKET if peer else name
    directory = data.get("runtime_dir")
    if isinstance(directory, str):
        return Path(directory) / name
    if cluster is not None:
        return default_runtime_dir(os.environ, cluster) / name
    return find_socket(default_runtime_dir(os.environ), name)


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
    _let_go(_STDOUT, _STDERR)
    return True


def _let_go(*descriptors: int) -> None:
    """Whoever has their other ends sees that they are closed."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
