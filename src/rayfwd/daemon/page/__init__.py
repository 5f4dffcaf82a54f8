"""The page in the browser: read-only, on loopback, for the users that the listeners let in.

The page is three files of the package and `data.json`, which the browser asks for every few
seconds. Nothing comes from elsewhere and nothing goes elsewhere; docs/page.md says who sees it.
"""

from __future__ import annotations

import json
import re
import socket
import time
from asyncio.trsock import TransportSocket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import cast
from urllib.parse import parse_qs

from rayfwd import codes
from rayfwd.daemon.history import History
from rayfwd.daemon.httpserver import Answer, Request
from rayfwd.daemon.page.view import page_data
from rayfwd.problems import Problem
from rayfwd.status import Status
from rayfwd.system import setting
from rayfwd.system.logs import get_logger
from rayfwd.transport.admission import Admission, Pass

log = get_logger(__name__)

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
DATA = "/data.json"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_LOOPBACK = re.compile(r"(127\.\d{1,3}\.\d{1,3}\.\d{1,3}|localhost|\[::1\])(:\d{1,5})?", re.I)
"""What a browser says that was sent here by its user, also over a forward to another port. A name
that somebody has made lead to 127.0.0.1 (DNS rebinding) is another."""


def url(place: str) -> str:
    """Of a page that is served there."""
    return f"http://{place}/"


class PageService:
    """Answers with the page. Fails closed: where the kernel does not say whose a connection is,
    none is taken."""

    def __init__(self, look: Callable[[], Status], history: History, admission: Admission) -> None:
        self._look = look
        self._history = history
        self._admission = admission
        self._boot = token_hex(8)
        self._passes: dict[TransportSocket, Pass] = {}

    def blocked(self, listen: str, why: str) -> Problem:
        return codes.PAGE_BLOCKED.problem(
            f"the page cannot be served at {listen}: {why}",
            "stop the program that listens there (`ss -ltnp sport = "
            f":{listen.rpartition(':')[2]}`), set {setting.key('page.listen')} to another "
            "port, or set it to off",
        )

    def listening(self, listen: str) -> None:
        log.info("page_listening", url=url(listen))

    def admits(self, connection: TransportSocket) -> bool:
        if not self._admission.asks_kernel:
            return False
        # It has what is asked of a socket.
        admitted = self._admission.admit(cast(socket.socket, connection))
        if admitted is not None:
            self._passes[connection] = admitted
        return admitted is not None

    def gone(self, connection: TransportSocket) -> None:
        if (admitted := self._passes.pop(connection, None)) is not None:
            admitted.give_back()

    def answer(self, request: Request) -> Answer:
        host = request.header("host")
        if host is None or _LOOPBACK.fullmatch(host) is None:
            return _text(
                "421 Misdirected Request", "open the page at the address that rayfwd prints\n"
            )
        if request.path == DATA:
            return self._data(request)
        if request.path not in FILES:
            return _text("404 Not Found", "the page is at /\n")
        name, kind = FILES[request.path]
        return Answer("200 OK", kind, _file(name), HEADERS)

    def _data(self, request: Request) -> Answer:
        if request.header("sec-fetch-site") not in {None, "same-origin", "none"}:
            return _text("403 Forbidden", "only the page itself may read this\n")
        asked = parse_qs(request.query, max_num_fields=4).get("since", ["0"])[0]
        since = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 12 else 0
        try:
            data = page_data(self._look(), self._history.since(since), self._boot, time.time())
        except Exception:  # a fault in what is shown must not end what it is about
            log.error("page_fault", exc_info=True)
            return _text(
                "500 Internal Server Error", "this is a fault of rayfwd's own; see its log\n"
            )
        body = json.dumps(data, separators=(",", ":")).encode()
        return Answer("200 OK", "application/json", body, HEADERS)


def _text(status: str, text: str) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", text.encode(), HEADERS)


@cache
def _file(name: str) -> bytes:
    return Path(__file__).with_name(name).read_bytes()
