"""Examines a head: its hub's place, its sshd, its Ray and ports."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Mapping

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import DialConfig, MeetConfig
from rayfwd.daemon.dialling import all_dials
from rayfwd.doctor import judgements, observe
from rayfwd.doctor.common_checks import Examination, several
from rayfwd.doctor.rows import Row, failed, passed, skipped, warned
from rayfwd.doctor.settings import no_token, not_writable
from rayfwd.doctor.sshd import sshd_options
from rayfwd.hub.roster import read, settle
from rayfwd.problems import Problem, ProblemError
from rayfwd.ssh.carriers import carrier_for
from rayfwd.ssh.meeting import NO_SSHD
from rayfwd.ssh.ssh_connector import SshConnector
from rayfwd.system import setting, unixsocket
from rayfwd.system.addresses import is_address
from rayfwd.system.asuser import own_account
from rayfwd.system.users import allowed_uids


class HeadExamination(Examination):
    """Of a head."""

    async def run(self) -> None:
        config = self.config
        self.emit(self.settings())
        self.emit(await self.daemon())
        self.emit(await self.keeper())
        self.own = own = config.own_head_plan()
        self.nodes = await asyncio.to_thread(self._roster, own)
        self.emit(self._socket())
        self.emit(await self._sshd())
        self.emit(await self._dial())
        self.emit(await self._meet())
        self.emit(await self._ray())
        self.emit(await self.ports())
        self.emit(await self.listeners())
        self.emit(await self.network_level())
        self.emit(await self.limits())
        self.emit(skipped("clock", "each worker compares its clock with this one"))
        self.emit(skipped("names", "`dial` checks the names of the workers that this head dials"))
        self.emit(self.proxies())
        self.emit(skipped("link", "each worker measures its own link"))

    async def _ray(self) -> Row:
        """With what follows from its version, where that was not known from the file alone."""
        row, found = await self.ray()
        if found is None or no_token(self.config) is not None:
            return row
        line = no_token(self.config, found.versions.ray)
        if line is None:
            return row
        return warned("ray", codes.CONFIG_DOUBTFUL.problem(line, "check whether this is intended"))

    def _roster(self, own: NodePlan) -> tuple[NodePlan, ...]:
        try:
            records, _ = read(self.config.roster_file)
        except ProblemError:
            return (own,)
        hub = self.config.hub
        settled = settle(records, own, hub.network, hub.port_base)
        return (own, *(record.plan for record in settled.records))

    def _socket(self) -> Row:
        path = self.config.hub_socket
        try:
            allowed_uids(self.config.hub.users, "hub.users")
            if self.status is not None:
                return passed("socket", f"the daemon listens on {path}")
            unixsocket.check_path(path)
            unixsocket.check_not_taken(path)
        except ProblemError as exc:
            return failed("socket", exc.problem)
        if (fault := not_writable(path.parent)) is not None:
            remedy = (
                "make the user that runs rayfwd the owner of the directory, or set "
                f"{setting.key('runtime_dir')} to another one"
            )
            return warned("socket", codes.DIRECTORY_UNUSABLE.problem(fault, remedy))
        return passed("socket", f"{path} can be created")

    async def _sshd(self) -> Row:
        # Workers say as whom they log in: most likely as those who may come to the hub.
        logins = self.config.hub.users or (own_account().name,)
        found = [await sshd_options(login) for login in logins]
        readable = [options for options in found if options is not None]
        places = _sshd_places(readable[0].values if readable else {})
        said = None
        for host, port in places:
            if (said := await observe.greeting(host, port)) is not None:
                break
        if said is None:
            where = " and ".join(f"{host}:{port}" for host, port in places)
            problem = codes.SSHD_ABSENT.problem(
                f"no SSH server answers on {where}",
                "start sshd (`systemctl enable --now ssh`); if it listens elsewhere, check that "
                "the workers' head.ssh (HEAD of `rayfwd join`) names that place",
            )
            return failed("sshd", problem) if readable else warned("sshd", problem)
        if not readable:
            return passed("sshd", f"{said} answers; this user may not read its options")
        workers = len([node for node in self.nodes if node.role == "worker"])
        wrong = [p for options in readable for p in judgements.judge_sshd(options, workers)]
        if wrong:
            return warned("sshd", several(list(dict.fromkeys(wrong))), server=said)
        return passed("sshd", f"{said} answers, and allows what workers need", server=said)

    async def _dial(self) -> Row:
        """Log in at each worker that is dialled from here; nothing is opened there."""
        try:
            dials = all_dials(self.config)
        except ProblemError as exc:
            return failed("dial", exc.problem)
        if not dials:
            return skipped("dial", "this head dials no worker ([[hub.dial]])")
        found = await asyncio.gather(*map(_logged_in, dials))
        wrong = [problem for problem in found if problem is not None]
        if wrong:
            return failed("dial", several(wrong))
        names = ", ".join(dial.called for dial in dials)
        return passed("dial", f"logged in at {names}; the host keys are known")

    async def _meet(self) -> Row:
        """Log in at each meeting place."""
        places = self.config.hub.meet
        if not places:
            return skipped("meet", "this head waits at no meeting place ([[hub.meet]])")
        found = await asyncio.gather(*map(_came_to, places))
        wrong = [problem for problem in found if problem is not None]
        if wrong:
            return failed("meet", several(wrong))
        names = ", ".join(meet.called for meet in places)
        own = any(meet.sshd_address() is None for meet in places)
        whose = "rayfwd answers there itself" if own else "this head's own sshd answers"
        return passed("meet", f"logged in at {names}; {whose}")


async def _came_to(meet: MeetConfig) -> Problem | None:
    """Why not, where it does not come to that; and whether this head's own sshd is where it says.
    What the daemon holds there is left alone."""
    connector = SshConnector(meet.way())
    try:
        (await connector.connect()).abort()
    except ProblemError as exc:
        problem = exc.problem
        return problem.code.problem(f"{meet.called}: {problem.cause}", problem.remedy)
    finally:
        connector.close()
    address = meet.sshd_address()
    try:
        if address is not None:
            _, writer = await asyncio.open_connection(*address)
            writer.close()
    except OSError as exc:
        return codes.MEETING_REFUSED.problem(
            f"{meet.called}: {meet.sshd_called} does not answer: {exc.strerror or exc}",
            NO_SSHD,
        )
    return None


async def _logged_in(dial: DialConfig) -> Problem | None:
    """Why not, where it does not come to that."""
    # By `via = "exec"` the system's ssh would run the command, which says something to the worker.
    carrier = carrier_for(dial.way().model_copy(update={"via": "socket"}))
    try:
        (await carrier.dial(asyncio.Event())).abort()
    except ProblemError as exc:
        problem = exc.problem
        return problem.code.problem(f"{dial.called}: {problem.cause}", problem.remedy)
    finally:
        carrier.close()
    return None


def _sshd_places(options: Mapping[str, list[str]]) -> list[tuple[str, int]]:
    """Where an sshd with these options listens, loopback first."""
    numbers = [int(p) for p in options.get("port", []) if p.isdecimal()] or [22]
    found = [("127.0.0.1", port) for port in numbers]
    for given in options.get("listenaddress", []):
        host, colon, port = given.partition(":")
        if is_address(host) and not ipaddress.ip_address(host).is_unspecified:
            found.append((host, int(port) if colon and port.isdecimal() else numbers[0]))
        elif colon and port.isdecimal():
            found.append(("127.0.0.1", int(port)))
    return list(dict.fromkeys(found))
