"""The local socket that `rayfwd status` asks: one JSON line in, one JSON line out.

The daemon owns a `ControlServer`; commands call `ask`. A request that is bad, slow or not
permitted is answered with `{"error": {code, cause, remedy}}` and touches nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.system import ownership, setting, unixsocket
from rayfwd.system.accepting import close_server
from rayfwd.system.logs import get_logger

Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

REQUEST_LIMIT = 65536
"""Bytes of a request's line."""
ANSWER_LIMIT = 16 * 1024 * 1024
"""Bytes of an answer that a client takes."""
REQUEST_TIMEOUT = 5.0
"""Seconds for a request to come whole."""
VERB_TIMEOUT = 60.0
"""Seconds for its answer."""
CONNECTION_LIMIT = 32
"""Connections that are served at once."""

_log = get_logger("control")


class ControlServer:
    """Answers verbs on a Unix socket that only one user and root may use."""

    def __init__(
        self,
        path: Path,
        verbs: Mapping[str, Verb],
        request_seconds: float = REQUEST_TIMEOUT,
        verb_seconds: float = VERB_TIMEOUT,
        request_limit: int = REQUEST_LIMIT,
        owner: int | None = None,
    ) -> None:
        """`owner`: the id of a user who may ask, where that is not this process's own."""
        self._path = path
        self._verbs = dict(verbs)
        self._request_seconds = request_seconds
        self._verb_seconds = verb_seconds
        self._request_limit = request_limit
        self._owner = os.geteuid() if owner is None else owner
        self._server: asyncio.Server | None = None
        self._inode = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises ProblemError as `unixsocket.bind` does."""
        listener = unixsocket.bind(self._path, 0o600, uid=self._owner)
        self._inode = self._path.stat().st_ino
        self._server = await asyncio.start_unix_server(
            self._connected, sock=listener, limit=self._request_limit
        )

    async def close(self) -> None:
        """Stop listening, end what is being answered, and remove our socket file."""
        if self._server is None:
            return
        close_server(self._server)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server = None
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except OSError:
            pass

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # closed while this one was accepted
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(
            self._serve(reader, writer), name="control-connection"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.close())  # also where it was ended before it began

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._answer(reader, writer)
            writer.write(json.dumps(answer, default=str).encode() + b"\n")
            async with asyncio.timeout(self._request_seconds):
                await writer.drain()
        except (OSError, TimeoutError):
            writer.transport.abort()  # who asked has gone, or does not read

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> dict[str, Any]:
        try:
            self._check_peer(writer.get_extra_info("socket"))
            if len(self._tasks) > CONNECTION_LIMIT:
                raise codes.CONTROL_BUSY.error(
                    f"{CONNECTION_LIMIT} commands are asking this daemon", "try again later"
                )
            verb, args = await self._request(reader)
            async with asyncio.timeout(self._verb_seconds):
                return await self._verbs[verb](args)
        except ProblemError as exc:
            return {"error": exc.problem.to_wire()}
        except TimeoutError:
            cause = f"no answer within {self._verb_seconds:g} s"
            return {"error": codes.CONTROL_SLOW.problem(cause, "read the daemon's log").to_wire()}
        except OSError:
            raise
        except Exception as exc:  # a fault in an answer must not end what the answer is about
            _log.error("control_fault", exc_info=True)
            cause = f"{type(exc).__name__} while answering"
            return {"error": codes.CONTROL_FAULT.problem(cause, "read the daemon's log").to_wire()}

    def _check_peer(self, peer: socket.socket) -> None:
        _, uid, _ = ownership.peer_credentials(peer)
        if uid not in {0, self._owner}:
            _log.warning("control_not_permitted", uid=uid)
            raise codes.DAEMON_NOT_PERMITTED.error(
                f"user id {uid} may not ask the daemon of user id {self._owner}",
                "run this as that user, or as root",
            )

    async def _request(self, reader: asyncio.StreamReader) -> tuple[str, dict[str, Any]]:
        try:
            async with asyncio.timeout(self._request_seconds):
                line = await reader.readline()
        except TimeoutError:
            cause = f"no whole line came within {self._request_seconds:g} s"
            raise _bad(cause) from None
        except ValueError:
            raise _bad(f"the line is longer than {self._request_limit} bytes") from None
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise _bad("the line is not JSON") from None
        if not isinstance(request, dict) or not isinstance(request.get("args", {}), dict):
            raise _bad("the line is not an object with a verb and args")
        verb = request.get("verb")
        if not isinstance(verb, str) or verb not in self._verbs:
            raise _bad(f"the verb {str(verb)[:40]!r} is not one of {', '.join(self._verbs)}")
        return verb, request.get("args", {})


def _bad(cause: str) -> ProblemError:
    return codes.CONTROL_BAD_REQUEST.error(cause, 'send {"verb": …, "args": {…}} and a line end')


def ask(
    path: Path, verb: str, args: Mapping[str, Any] | None = None, timeout: float = 10.0
) -> dict[str, Any]:
    """The daemon's answer to `verb`; `timeout` in seconds bounds each wait.

    Raises ProblemError: `daemon_not_running`, `daemon_not_permitted`, `daemon_not_answering`,
    `socket_path_too_long`, or what the daemon itself answered.
    """
    unixsocket.check_path(path)
    try:
        return _understood(path, _exchange(path, _asking(verb, args), timeout))
    except OSError as exc:
        raise _unheard(path, exc) from exc


async def converse(
    path: Path, verb: str, args: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The same on the loop, for an answer that may take long; it ends when it is cancelled. Raises
    ProblemError as `ask` does."""
    unixsocket.check_path(path)
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=ANSWER_LIMIT)
            try:
                ownership.check_listener(writer.get_extra_info("socket"), path)
                writer.write(_asking(verb, args))
                return _understood(path, await reader.readline())
            finally:
                writer.transport.abort()
    except ValueError:
        raise _not_answering(path, "its answer is too long") from None
    except OSError as exc:
        raise _unheard(path, exc) from exc


def _asking(verb: str, args: Mapping[str, Any] | None) -> bytes:
    return json.dumps({"verb": verb, "args": dict(args or {})}).encode() + b"\n"


def _unheard(path: Path, exc: OSError) -> ProblemError:
    """Why nobody was asked, or has answered."""
    if isinstance(exc, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
        return codes.DAEMON_NOT_RUNNING.error(
            f"no rayfwd answers on {path}",
            f"{setting.how_to_start()}; if it has just been started, wait some seconds",
        )
    if isinstance(exc, PermissionError):
        return codes.DAEMON_NOT_PERMITTED.error(
            f"{path}: this user may not talk to the daemon" if exc.errno else str(exc),
            "run this as the daemon's user, or as root",
        )
    return _not_answering(path, str(exc) or type(exc).__name__)  # TimeoutError among them


def _understood(path: Path, line: bytes) -> dict[str, Any]:
    """Raises ProblemError: what the daemon has answered, or that it has not."""
    try:
        answer = json.loads(line)
    except ValueError:
        raise _not_answering(path, "it closed the connection without an answer") from None
    if not isinstance(answer, dict):
        raise _not_answering(path, "its answer is not an object")
    error = answer.get("error")
    if isinstance(error, dict):
        code, cause, remedy = (str(error.get(part, "?")) for part in ("code", "cause", "remedy"))
        raise codes.named(code).error(cause, remedy)
    return answer


def _not_answering(path: Path, why: str) -> ProblemError:
    return codes.DAEMON_NOT_ANSWERING.error(
        f"the daemon on {path} does not answer: {why}", "read the daemon's log"
    )


def _exchange(path: Path, request: bytes, timeout: float) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(str(path))
        ownership.check_listener(sock, path)
        sock.sendall(request)
        parts: list[bytes] = []
        size = 0
        while size <= ANSWER_LIMIT and (part := sock.recv(65536)):
            parts.append(part)
            size += len(part)
            if part.endswith(b"\n"):
                break
        return b"".join(parts)
