"""A small HTTP server on loopback or a Unix socket, on the daemon's own loop: metrics and page.

It knows GET and HEAD, one request a connection, and keeps nobody for long. Who is let in, and what
is answered, a `Service` says; `Served` has it where the file says so, also after it has changed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rayfwd.config import split_host_port
from rayfwd.problems import Problem, ProblemError
from rayfwd.system import unixsocket
from rayfwd.system.accepting import close_server
from rayfwd.system.backoff import Backoff
from rayfwd.system.logs import get_logger
from rayfwd.system.tcp import cut

log = get_logger(__name__)

REQUEST_LIMIT = 16384
"""Bytes of a request's head."""
REQUEST_SECONDS = 10.0
CONNECTIONS = 16
RETRY_FIRST, RETRY_LAST = 1.0, 15.0
"""Seconds until a port that is taken is tried again."""


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a GET or HEAD."""

    path: str
    query: str
    headers: tuple[tuple[str, str], ...]
    """Names in lower case."""

    def header(self, name: str) -> str | None:
        """None where it is not there, or there more than once."""
        found = [value for key, value in self.headers if key == name]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    status: str
    kind: str
    """The media type."""
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self, head_only: bool) -> bytes:
        """With HEAD the body is left out."""
        headers = {
            "Content-Type": self.kind,
            "Content-Length": str(len(self.body)),
            **self.headers,
            "Connection": "close",
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {self.status}\r\n{lines}\r\n".encode()
        return head if head_only else head + self.body


class Service(Protocol):
    """What a server is for."""

    def blocked(self, listen: str, why: str) -> Problem:
        """That it cannot listen; `listen` is the first of the places."""

    def listening(self, listen: str) -> None:
        """It does."""

    def admits(self, connection: TransportSocket) -> bool:
        """Whether it is taken; else it is reset before a byte of it is read."""

    def gone(self, connection: TransportSocket) -> None:
        """One that was taken is over."""

    def answer(self, request: Request) -> Answer:
        """Never raises."""


class HttpServer:
    """One task, `run`, owns it; where every place is taken they are tried again."""

    def __init__(
        self, service: Service, places: Sequence[str], on_change: Callable[[], None]
    ) -> None:
        """`places`: each `host:port` on loopback or a socket's absolute path; the first that is
        free is taken. `on_change` is called when `problem` or `at` has changed."""
        self._service = service
        self.problem: Problem | None = None
        """Why it does not listen."""
        self.at: str | None = None
        """Where it listens."""
        self._places = places
        self._on_change = on_change
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(RETRY_FIRST, RETRY_LAST)
        while True:
            try:
                server, path = await self._start()
            except ProblemError as exc:
                if exc.problem != self.problem:
                    log.error(
                        exc.problem.code.event, cause=exc.problem.cause, remedy=exc.problem.remedy
                    )
                self._set(exc.problem, None)
                await asyncio.sleep(backoff.next())
                continue
            self._set(None, self.at)
            try:
                await asyncio.Event().wait()
            finally:
                self.at = None
                close_server(server)
                for task in self._connections:
                    task.cancel()
                await asyncio.gather(*self._connections, return_exceptions=True)
                if path is not None:
                    path.unlink(missing_ok=True)

    def _set(self, problem: Problem | None, at: str | None) -> None:
        before, self.problem, self.at = self.problem, problem, at
        if problem is None and at is not None:
            self._service.listening(at)
        if problem != before or at is not None:
            self._on_change()

    async def _start(self) -> tuple[asyncio.Server, Path | None]:
        """Listen. Raises ProblemError."""
        why = "no place is left for it"
        for place in self._places:
            if place.startswith("/"):
                path = Path(place)
                listener = unixsocket.bind(path, 0o600)
                self.at = place
                return await asyncio.start_unix_server(
                    self._connected, sock=listener, limit=REQUEST_LIMIT
                ), path
            host, port = split_host_port(place)
            try:
                server = await asyncio.start_server(
                    self._connected, host, port, limit=REQUEST_LIMIT, family=socket.AF_INET
                )
            except OSError as exc:
                why = os.strerror(exc.errno) if exc.errno else str(exc)
                continue
            self.at = place
            return server, None
        raise ProblemError(self._service.blocked(self._places[0] if self._places else "", why))

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection: TransportSocket = writer.get_extra_info("socket")
        if (
            len(self._connections) >= CONNECTIONS or self.at is None
        ):  # too many, or closed meanwhile
            writer.transport.abort()
            return
        if not self._service.admits(connection):
            cut(writer.transport)
            return
        task = asyncio.create_task(self._serve(reader, writer), name="http-connection")
        self._connections.add(task)
        task.add_done_callback(lambda done: self._done(done, connection, writer))

    def _done(
        self, task: asyncio.Task[None], connection: TransportSocket, writer: asyncio.StreamWriter
    ) -> None:
        self._connections.discard(task)
        writer.close()  # also where the task was ended before it began
        self._service.gone(connection)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()  # no request, or nobody who reads the answer

    def _answer(self, head: bytes) -> bytes:
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        method, target = (words[0], words[1]) if len(words) == 3 else ("", "")
        if method not in {"GET", "HEAD"}:
            allow = {"Allow": "GET, HEAD"}
            return Answer("405 Method Not Allowed", "text/plain", b"GET it\n", allow).encode(False)
        path, _, query = target.partition("?")
        pairs = (line.partition(":") for line in lines if line)
        headers = tuple((name.strip().lower(), value.strip()) for name, _, value in pairs)
        return self._service.answer(Request(path, query, headers)).encode(method == "HEAD")


class Served:
    """Has a server where the file says so, also after it has changed."""

    def __init__(
        self, service: Service, places: Sequence[str], on_change: Callable[[], None]
    ) -> None:
        """`places`: as `HttpServer` has them; none: it is not served."""
        self._places = tuple(places)
        self._service = service
        self._on_change = on_change
        self._server: HttpServer | None = None
        self._moved = asyncio.Event()

    @property
    def problem(self) -> Problem | None:
        """What keeps it from being asked for."""
        return self._server.problem if self._server is not None else None

    @property
    def at(self) -> str | None:
        """Where it listens; None: nowhere."""
        return self._server.at if self._server is not None else None

    def move(self, places: Sequence[str]) -> None:
        """Serve it there from now on."""
        if tuple(places) != self._places:
            self._places = tuple(places)
            self._moved.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._moved.clear()
            moved = asyncio.create_task(_set(self._moved), name="http moved")
            tasks = [moved]
            self._server = None
            if self._places:
                self._server = HttpServer(self._service, self._places, self._on_change)
                tasks.append(asyncio.create_task(self._server.run(), name="http server"))
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            self._on_change()


async def _set(event: asyncio.Event) -> None:
    await event.wait()
