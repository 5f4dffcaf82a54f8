"""Examines a client: where it would listen here, and its way to the hub."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from rayfwd import __version__, codes
from rayfwd.client import LOOPBACK, hello_of, listen_all
from rayfwd.config import HeadConfig
from rayfwd.doctor import judgements
from rayfwd.doctor.hub_probe import OLDER, HubProbe
from rayfwd.doctor.reachability import WayExamination
from rayfwd.doctor.rows import Row, failed, passed, warned
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import procfs
from rayfwd.session.checks import CheckReply
from rayfwd.session.handshake import Hello
from rayfwd.ssh.asyncssh_carrier import SshConnection
from rayfwd.ssh.openssh_carrier import OpensshConnection


class ClientExamination(WayExamination):
    """Of a client. It has no Ray, no ports of the plan and no daemon that could be asked."""

    async def run(self) -> None:
        self.emit(self.settings())
        self.emit(await asyncio.to_thread(self._listen))
        await self.way()
        self.emit(await self.names())
        self.emit(self.proxies([LOOPBACK]))
        self.emit(self.later("link"))

    def _listen(self) -> Row:
        try:
            found = listen_all(self.config)
        except ProblemError as exc:
            holder = next(filter(None, map(_rayfwd_on, self._given_ports())), None)
            if holder is not None:
                return passed(
                    "listen", f"`rayfwd connect` has its ports here already (pid {holder})"
                )
            return failed("listen", exc.problem)
        for _, sock in found:
            sock.close()
        places = [place for place, _ in found]
        said = ", ".join(f"{place.what} at {place}" for place in places)
        moved = [str(place.wanted) for place in places if place.port != place.wanted]
        more = f" (in use here: {', '.join(moved)})" if moved else ""
        return passed("listen", f"{said}{more}", **{place.what: str(place) for place in places})

    def _given_ports(self) -> Iterator[int]:
        """Those of 127.0.0.1 for which there is no other."""
        for forward in self.config.forwards:
            yield forward.listen_address()[1]
        own = self.config.client
        ports = (own.dashboard_port, own.client_port, own.page_port)
        yield from (port for port in ports if port is not None)

    def hello(self) -> Hello:
        return hello_of(self.config, self.identity.public)

    def ways(self) -> tuple[HeadConfig, ...]:
        """As the client itself goes them."""
        if "via" in self._head.model_fields_set:
            return (self._head,)
        return (self._head, self._head.model_copy(update={"via": "exec"}))

    async def open(
        self, connection: SshConnection | OpensshConnection, hub_probe: HubProbe
    ) -> CheckReply:
        try:
            return await super().open(connection, hub_probe)
        except ProblemError as exc:
            # Of a client that is what an `attach --client` says which knows no such questions.
            raise ProblemError(OLDER) if exc.problem.code == codes.CLIENT_ONLY else exc from None

    def leads_on(self, problem: Problem) -> bool:
        return problem.code.another_way

    def hub(self, answer: CheckReply) -> Row:
        welcome, refusal = answer.welcome, answer.refusal
        self.network = welcome.network
        if refusal is not None:
            return failed("hub", refusal)
        problem = judgements.judge_version(__version__, welcome.version)
        if problem is not None:
            return warned("hub", problem, version=welcome.version)
        ray = f", with Ray {welcome.ray} and Python {welcome.python}" if welcome.ray else ""
        return passed("hub", f"rayfwd {welcome.version} answers{ray}", version=welcome.version)


def _rayfwd_on(port: int) -> int | None:
    """The process that listens there, if it is a rayfwd; None also where that is not to be seen."""
    process = procfs.listener(port)
    if process is None:
        return None
    try:
        words = (procfs.PROC / str(process.pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return process.pid if "rayfwd" in {Path(word.decode()).name for word in words[:3]} else None
