"""A client: a machine that is no node, with the head's dashboard, Ray Client and page on its
loopback.

Owns the listening sockets, the link and the file of Ray's token; `Client.run` begins and ends them.
Nothing here needs Linux, root, or an address in 127/8 but 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rayfwd import __version__, codes
from rayfwd.cluster.identity import Identity
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import Config, HeadConfig
from rayfwd.problems import Code, Problem, ProblemError
from rayfwd.ray import token
from rayfwd.ray.token import RayAuth
from rayfwd.session import messages
from rayfwd.session.frames import Frame
from rayfwd.session.handshake import PROOF, Challenge, Hello, Proof, Welcome
from rayfwd.session.messages import Message
from rayfwd.session.session import Limits
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Target
from rayfwd.ssh.carriers import carrier_for
from rayfwd.system import setting
from rayfwd.system.backoff import Backoff
from rayfwd.system.files import replace_file
from rayfwd.system.logs import get_logger
from rayfwd.system.notify import Notifier
from rayfwd.system.users import allowed_uids
from rayfwd.system.watchdog import Late, Watchdog, late_loops
from rayfwd.transport.acceptor import BACKLOG, Acceptor
from rayfwd.transport.admission import Admission
from rayfwd.transport.link import Link
from rayfwd.transport.mux import MuxStream, StreamOwner
from rayfwd.transport.relay import SocketRelay

log = get_logger(__name__)

LOOPBACK = "127.0.0.1"
USUAL_PORTS = {"dashboard": 8265, "client": 10001}
"""Where a client listens unless told otherwise, by the head's name for what is behind it."""
USUAL_PAGE = 9480
"""The same for the head's page in the browser, where it has one."""
MOST_NEAR_PORTS = 100
"""How many ports from the usual one on are tried where it is taken."""

RETRY_FIRST, RETRY_LAST = 1.0, 15.0
"""Seconds between attempts before the link has stood for the first time."""
RIDE_THROUGH_MOST = 86400.0
"""Seconds: says that the head decides."""

PAGE = "page"
"""The head's name for its page, which only a head that serves one has."""

Via = Literal["socket", "exec"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where this machine listens, and for what."""

    what: str
    """`dashboard`, `client` or `page`, else a port of the head, in digits."""
    port: int
    wanted: int
    """Which port it would have been."""
    address: str = LOOPBACK

    def port_at(self, head: NodePlan) -> int:
        """The port of the head that this stands for."""
        return int(self.what) if self.what.isdigit() else head.head_services[self.what]

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


class Client:
    """Holds the head's ports here. `run` works until SIGTERM or Ctrl-C."""

    def __init__(self, config: Config, emit: Callable[[str], None]) -> None:
        """`emit` is given lines for whoever started it. Raises ProblemError."""
        assert config.head is not None, "a client's configuration has a head"
        self._config = config
        self._head: HeadConfig = config.head
        self._emit = emit
        # A new one for each process: clients are told apart, and nothing of them is kept.
        self._identity = Identity.make()
        self._link: Link | None = None
        self._plan: NodePlan | None = None
        self._welcome: Welcome | None = None
        self._auth: RayAuth | None = None
        self._listening: list[tuple[Place, socket.socket]] = []
        self._admission = Admission(allowed_uids(config.listeners.users, "listeners.users"))
        self._acceptor = Acceptor(self._admission, self._held_up)
        self._relays: set[SocketRelay] = set()
        self._news = asyncio.Event()
        self._ending = False
        self._shown: tuple[str, Code | None] = ("", None)
        """State of the link and code of its problem, as last shown."""

    @property
    def token_file(self) -> Path:
        """Where Ray's token is written, if the cluster has one."""
        name = re.sub(r"[^A-Za-z0-9._@-]", "_", self._head.ssh)
        return self._config.state_dir / "clients" / name / token.TOKEN_FILE

    # -- life ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Raises ProblemError where it cannot begin."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        self._listening = listen_all(self._config)
        stopping = asyncio.create_task(stop.wait(), name="stop")
        holding = asyncio.create_task(self._hold(), name="hold")
        watchdog = Watchdog(self._late, lambda: self._welcome is not None, Notifier())
        feeding = asyncio.create_task(watchdog.run(), name="watchdog")
        try:
            await asyncio.wait({stopping, holding}, return_when=asyncio.FIRST_COMPLETED)
            if holding.done():
                holding.result()
        finally:
            self._ending = True
            self._acceptor.close()
            self._admission.close()
            for _, sock in self._listening:
                sock.close()
            if self._link is not None:
                await self._link.close("the client was ended")
            for task in (stopping, holding, feeding):
                task.cancel()
            await asyncio.gather(stopping, holding, feeding, return_exceptions=True)

    def _late(self) -> list[Late]:
        link = self._link
        if link is None:
            return []
        return late_loops(
            (s.heartbeat for s in link.slots), [link.mux] if link.mux is not None else []
        )

    async def _hold(self) -> None:
        """Hold the link for ever, once there was a way to the hub."""
        via = self._head.via if "via" in self._head.model_fields_set else "auto"
        ways: Sequence[Via] = ("socket", "exec") if via == "auto" else (via,)
        backoff = Backoff(RETRY_FIRST, RETRY_LAST, jitter=0.2)
        shown: Code | None = None
        while True:
            problem = await self._by(ways[0])
            if len(ways) > 1 and problem.code.another_way:
                other = await self._by(ways[1])
                # That `rayfwd` is not found there says less than why the socket was no way.
                problem = problem if other.code == codes.HUB_CLOSED else other
            if problem.code.lasting:
                raise ProblemError(problem)
            if problem.code != shown:
                shown = problem.code
                self._emit(f"{problem.code}: {problem}; still trying")
            await asyncio.sleep(backoff.next())

    async def _by(self, via: Via) -> Problem:
        """Hold the link by that way; where it does not come to stand even once, why not."""
        head = self._head.model_copy(update={"via": via})
        link = self._link = Link(self, head, carrier_for(head), Limits())
        async with asyncio.TaskGroup() as group:
            running = group.create_task(link.run(), name="link")
            while self._welcome is None and link.problem is None:
                self._news.clear()
                await self._news.wait()
            if self._welcome is not None:
                await self._open()
                await running  # it ends with us only
            problem = link.problem
            await link.close("another way is tried")
            running.cancel()
        assert problem is not None, "there was no welcome"
        return _understood(problem, head)

    # -- as the link's owner -------------------------------------------------------------

    def hello(self) -> Hello:
        return hello_of(self._config, self._identity.public)

    def prove(self, greeting: Frame, challenge: Challenge) -> Proof:
        return self._identity.prove(greeting, challenge)

    def accept_stream(self, stream: MuxStream, target: bytes) -> StreamOwner | None:
        stream.reset(ResetReason.NOT_IN_PLAN, "a client serves nothing")
        return None

    def welcomed(self, welcome: Welcome) -> None:
        try:
            self._plan = NodePlan.from_wire(welcome.nodes[0])
            if not USUAL_PORTS.keys() <= self._plan.head_services.keys():
                raise ValueError("the first node is not the head")
            self._take_auth(welcome.ray_auth)
        except (ValueError, IndexError) as exc:
            log.error("plan_malformed", cause=str(exc), remedy="run the same rayfwd on both sides")
            return
        self._welcome = welcome
        self._news.set()

    async def _open(self) -> None:
        """What connects is taken from now on, and whoever started us is told where."""
        self._listen_for_page()
        self._admission.open()
        if (problem := self._admission.problem) is not None:
            self._emit(f"{problem.code}: {problem}")
        for place, sock in self._listening:
            self._acceptor.add(sock, partial(self._relay_for, place))
        assert self._welcome is not None, "it has come"
        places = [place for place, _ in self._listening]
        token_file = self.token_file if self._has_token else None
        for line in addresses(self._head.ssh, self._welcome, places, token_file, os.environ):
            self._emit(line)
        with closing(Notifier()) as notifier:
            notifier.send("READY=1")

    def _listen_for_page(self) -> None:
        """Where the head has one, and only there."""
        assert self._plan is not None, "the plan has come"
        given = next((own for own in self._listening if own[0].what == PAGE), None)
        if PAGE not in self._plan.head_services and given is not None:
            self._listening.remove(given)
            given[1].close()
            self._emit("the head serves no page in the browser (page.listen there)")
        elif PAGE in self._plan.head_services and given is None:
            with suppress(ProblemError):  # every port is taken; the rest is worth more
                sock = _listen_near(USUAL_PAGE)
                self._listening.append((Place(PAGE, sock.getsockname()[1], USUAL_PAGE), sock))

    def _relay_for(self, place: Place, dialled: Target) -> SocketRelay:
        return SocketRelay(self._relays, lambda relay: self._route(place, relay))

    def _route(self, place: Place, relay: SocketRelay) -> None:
        assert self._link is not None, "listeners open once a link has stood"
        assert self._plan is not None, "the plan has come before they open"
        target = Target(self._plan.address, place.port_at(self._plan))
        relay.open_stream(self._link.mux, target)

    def _held_up(self) -> None:
        if (problem := self._acceptor.problem) is not None:
            self._emit(f"{problem.code}: {problem}")

    def message(self, message: Message) -> None:
        if isinstance(message, messages.Auth):  # all that a client is told
            self._take_auth(message.to_wire())

    @property
    def _has_token(self) -> bool:
        return self._auth is not None and self._auth.mode == "token"

    def _take_auth(self, data: Mapping[str, Any] | None) -> None:
        """Raises ValueError."""
        auth = None if data is None else RayAuth.from_wire(data)
        if auth == self._auth:
            return
        self._auth = auth
        if not self._has_token or auth is None:
            return
        try:
            self.token_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self.token_file, auth.token.encode() + b"\n")
        except OSError as exc:
            problem = codes.RAY_AUTH_UNWRITABLE.problem(
                f"Ray's token cannot be written to {self.token_file}: {exc.strerror or exc}",
                f"make that directory writable, or set {setting.key('state_dir')}",
            )
            self._emit(f"{problem.code}: {problem}")

    def link_changed(self) -> None:
        self._news.set()
        link = self._link
        if link is None or self._welcome is None or self._ending:
            return
        state, problem = link.state, link.problem
        code = problem.code if problem is not None else None
        before, self._shown = self._shown, (state, code)
        clock = time.strftime("%H:%M:%S")
        if state != before[0] and before[0]:
            held = f"{self._welcome.ride_through:g} s"
            words = {
                "up": "the link is back" if before[0] == "parked" else "connected again",
                "parked": f"the link is down; open connections are held for {held}",
                "down": "the open connections are lost; dialling again",
            }
            self._emit(f"{clock}  {words[state]}")
        if problem is not None and code not in {codes.LANE_LOST, before[1]}:
            self._emit(f"{clock}  {code}: {problem}")


def hello_of(config: Config, key: str) -> Hello:
    """What a client of this configuration says to the hub; `key` is its public one."""
    given = "ride_through" in config.model_fields_set
    return Hello(
        node=config.name,
        key=key,
        version=__version__,
        worker_ports=0,
        role="client",
        features=frozenset({PROOF}),
        ride_through=config.ride_through if given else RIDE_THROUGH_MOST,
    )


def _understood(problem: Problem, head: HeadConfig) -> Problem:
    """What a hub that knows no clients says to one, in words."""
    if problem.code == codes.HELLO_MALFORMED:
        return codes.HUB_TOO_OLD.problem(
            f"the rayfwd on {head.ssh} is older than this one and accepts no clients",
            "upgrade rayfwd on the head",
        )
    return problem


def listen_all(config: Config) -> list[tuple[Place, socket.socket]]:
    """The sockets of everything that is to be held here. Raises ProblemError."""
    given = {
        "dashboard": config.client.dashboard_port,
        "client": config.client.client_port,
        PAGE: config.client.page_port,
    }
    found: list[tuple[Place, socket.socket]] = []
    try:
        # What was asked for exactly goes first: the others make room for it.
        for forward in config.forwards:
            (address, port), (_, to) = forward.listen_address(), forward.target()
            found.append((Place(str(to), port, port, address), _listen(address, port)))
        for what, exact in given.items():
            if exact is not None:
                found.append((Place(what, exact, exact), _listen(LOOPBACK, exact)))
        for what, usual in USUAL_PORTS.items():
            if given[what] is None:
                sock = _listen_near(usual)
                found.append((Place(what, sock.getsockname()[1], usual), sock))
    except BaseException:
        for _, sock in found:
            sock.close()
        raise
    return found


def _listen_near(usual: int) -> socket.socket:
    """On the usual port or the first free one above it. Raises ProblemError."""
    for port in range(usual, usual + MOST_NEAR_PORTS):
        with suppress(ProblemError):
            return _listen(LOOPBACK, port)
    raise codes.LISTEN_TAKEN.error(
        f"all ports from {usual} to {usual + MOST_NEAR_PORTS - 1} are in use on {LOOPBACK}",
        "choose a port with --dashboard-port, --client-port or --page-port",
    )


def _listen(address: str, port: int) -> socket.socket:
    """Raises ProblemError."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        # At once: until then another one could bind the same.
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        taken = exc.errno == errno.EADDRINUSE
        raise codes.LISTEN_TAKEN.error(
            f"{address}:{port} cannot be opened: "
            + ("another program uses it" if taken else str(exc.strerror)),
            f"stop the program that listens there (`ss -ltnp sport = :{port}`), or choose another "
            "port: --dashboard-port, --client-port, --page-port, --forward"
            if taken
            else "choose a port from 1024 on, and an address that this machine has",
        ) from exc
    return sock


def addresses(
    head: str,
    welcome: Welcome,
    places: Sequence[Place],
    token_file: Path | None,
    env: Mapping[str, str],
) -> list[str]:
    """What to tell whoever wants to use it."""
    by_what = {place.what: place for place in places}
    dashboard, client = (str(by_what[what]) for what in USUAL_PORTS)
    versions = f" (Ray {welcome.ray}, Python {welcome.python})" if welcome.ray else ""
    lines = [
        f"connected to {head}{versions}",
        "",
        f"  dashboard    http://{dashboard}",
        f"  Ray Client   ray://{client}",
    ]
    if PAGE in by_what:
        lines.append(f"  page         http://{by_what[PAGE]}/ (the cluster's links)")
    lines += [f"  forward      {p} is head:{p.what}" for p in places if p.what.isdigit()]
    lines += [
        f"  port {place.wanted} is in use on this machine, so port {place.port} is used"
        for place in places
        if place.port != place.wanted
    ]
    lines += [
        "",
        "In the shell where you use it:",
        f"  export RAY_API_SERVER_ADDRESS=http://{dashboard}  # ray job submit, ray list",
        f"  export RAY_ADDRESS=ray://{client}  # ray.init(), with the head's Ray and Python",
    ]
    if token_file is not None:
        lines.append(f"  export {token.MODE}=token {token.PATH}={shlex.quote(str(token_file))}")
    proxied = any(env.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"))
    exempt = ",".join(env.get(name, "") for name in ("no_proxy", "NO_PROXY"))
    if proxied and LOOPBACK not in exempt.split(","):
        lines.append(
            f"  export NO_PROXY={LOOPBACK} no_proxy={LOOPBACK}  # bypasses this shell's proxy"
        )
    return [*lines, "", "Ctrl-C ends it."]
