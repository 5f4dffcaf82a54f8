"""The overlay's keeper: the one process with the right to change the machine's network.

It makes the interface and the rules that the daemon asks for, as far as it may have them, and
removes them when it ends. In a service it has a unit of its own (`rayfwd-net.service`), which
starts as root and keeps CAP_NET_ADMIN alone; in a container that has this right it is the daemon's
child, and ends with it (`until_eof`).

A service that is restarted, or was killed, leaves the interface and the table that shuts the way.
The next one makes the rules again from what the last one was asked for (`last_rules`). Connections
that stand wait meanwhile, and so do new ones.

    up {rules} -> {}: everything is there; `rules` as `Rules.to_wire` gives them
    update {rules} -> {}: the ports are up to date
    dialled {} -> {places}: waits for programs that dial ports which are not known to be open; null:
        it does not come to know of that
    decide {places} -> {}: of such places, whether they are open
    found {} -> {interface, address, table, refused, may, left_out}: what stands now, and who
        may not dial though that was asked for
    beside {} -> {tables}: other tables of nftables that see what this machine sends to itself
    down {} -> {}: nothing is there
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import signal
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.network import overlay
from rayfwd.network.held_dials import HeldDials
from rayfwd.network.last_rules import LastRules
from rayfwd.network.named_users import named_users
from rayfwd.network.ruleset import LOWEST_PORT, Rules
from rayfwd.problems import ProblemError
from rayfwd.system.control import ControlServer
from rayfwd.system.held_names import HeldName, NameHolder, holders_of_names
from rayfwd.system.logs import get_logger
from rayfwd.system.notify import Notifier
from rayfwd.system.restart_job import being_restarted
from rayfwd.system.users import user_name

LEFT_SECONDS = 30.0
"""Seconds after its start in which a keeper is asked by a daemon that wants an overlay; then what
one before it has left, or has had, is removed."""
DIALLED_SECONDS = 30.0
"""Seconds for which who asks what is dialled waits, at most."""
REQUEST_LIMIT = 4 << 20
"""Bytes: the open ports of a thousand nodes."""
NETWORKS = (ipaddress.IPv4Network("127.64.0.0/10"),)
"""Where the plan's network may lie without anybody's word: nothing else is at home there.

127.0.0.0/10 is left out: name servers and databases listen there.
"""

_log = get_logger(__name__)


class OverlayKeeper:
    """`run` works until SIGTERM, SIGINT or, as a child, the end of its standard input."""

    def __init__(
        self,
        socket: Path,
        interface: str,
        owner: int | None = None,
        networks: Sequence[ipaddress.IPv4Network] = (),
        until_eof: bool = False,
        file: Path | None = None,
    ) -> None:
        """`owner` may ask besides root; `networks` are allowed besides `NETWORKS`. `file`: root's
        configuration, which says who may dial besides these two; None: whoever asks says it."""
        self._socket = socket
        self._interface = interface
        self._owner = owner
        self._networks = (*NETWORKS, *networks)
        self._until_eof = until_eof
        self._file = file
        self._left_out: tuple[frozenset[int], str] = frozenset(), ""
        """Users who may not dial, though that was asked for, and why: said once."""
        self._overlay = overlay.OverlayMaker(interface)
        self._rules: Rules | None = None
        self._last = None if until_eof else LastRules(socket)
        self._dials: HeldDials | None = None
        self._dials_port: int | None = None
        """The port for which it was found out whether there are any."""
        self._dialled = asyncio.Event()
        self._listener: asyncio.Event | None = None
        """Set when another one waits for what is dialled in its place."""
        self._asked = False
        """A daemon is there that wants something of this keeper."""
        self._turn = asyncio.Lock()
        self._stop = asyncio.Event()
        self._notifier = Notifier()

    async def run(self) -> None:
        """Raises ProblemError where it cannot listen, or where an overlay cannot be had."""
        await asyncio.to_thread(overlay.check_tools)
        with closing(self._claim()) if self._until_eof else nullcontext():
            await self._serve()

    def _claim(self) -> HeldName:
        """Nobody else's child makes this interface here. Raises ProblemError."""
        name = f"rayfwd-overlay-{self._interface}"
        try:
            return HeldName(name, lambda: _keepers(name))
        except OSError as exc:
            raise codes.OVERLAY_IMPOSSIBLE.error(
                f"another rayfwd on this machine uses the interface {self._interface}",
                "set network.interface and network.port to other values for one of them",
            ) from exc

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        if self._until_eof:
            loop.add_reader(0, self._came_on_stdin)
        await self._take_over()
        verbs = {
            "up": self._up,
            "update": self._update,
            "found": self._found,
            "beside": self._beside,
            "dialled": self._tell_dialled,
            "decide": self._decide,
            "down": self._down,
        }
        server = ControlServer(self._socket, verbs, request_limit=REQUEST_LIMIT, owner=self._owner)
        await server.start()
        watch = asyncio.create_task(self._watch_tables(), name="tables")
        left = asyncio.create_task(self._remove_left(), name="left")
        try:
            _log.info("overlay_keeper_listening", socket=str(self._socket))
            self._notifier.send("READY=1", self._state())
            await self._stop.wait()
            self._notifier.send("STOPPING=1")
        finally:
            watch.cancel()
            left.cancel()
            await asyncio.gather(watch, left, return_exceptions=True)
            await server.close()
            self._close_dials()
            await self._end()

    async def _take_over(self) -> None:
        """Make again what a keeper before this one had, which was restarted or killed."""
        left = self._last.found() if self._last is not None else None
        if left is None:
            return
        try:
            rules = self._checked({"rules": left})
            await self._hear_dials(rules.port)
            await asyncio.to_thread(self._overlay.up, rules)
        except ProblemError as exc:
            _log.warning("overlay_not_restored", cause=exc.problem.cause)
        else:
            self._rules = rules
            _log.info("overlay_taken_over", interface=rules.interface, address=rules.own)

    async def _end(self) -> None:
        """Leave nothing, unless another keeper follows at once."""
        if self._rules is not None and self._last is not None and await being_restarted(os.environ):
            _log.info("overlay_handed_on", interface=self._interface)
            return
        await self._remove()

    async def _remove(self) -> None:
        """Raises ProblemError."""
        if self._last is not None:
            self._last.forget()
        await asyncio.to_thread(self._overlay.down)
        self._rules = None

    async def _remove_left(self) -> None:
        """One that was killed has left the way to other nodes shut, and the daemon is gone too."""
        await asyncio.sleep(LEFT_SECONDS)
        async with self._turn:
            with suppress(OSError, ProblemError):
                if not self._asked and (
                    self._rules is not None
                    or await asyncio.to_thread(overlay.orphaned, self._interface)
                ):
                    await self._remove()
                    self._notifier.send(self._state())

    async def _watch_tables(self) -> None:
        """Make the rules anew as soon as another program removes them (`nft flush ruleset`): until
        then, what is dialled to another node would go to whoever has that port here."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        try:
            events = overlay.TableEvents()
        except OSError as exc:
            _log.warning("overlay_unwatched", cause=str(exc))
            return
        loop.add_reader(events, changed.set)
        try:
            while True:
                await changed.wait()
                changed.clear()
                if events.deleted():
                    await self._restore()
        finally:
            loop.remove_reader(events)
            events.close()

    async def _restore(self) -> None:
        async with self._turn:
            await self._look()

    async def _look(self) -> overlay.Found:
        """What stands now; rules that another program has removed are made again first."""
        rules = self._rules
        if rules is None:
            return overlay.NOTHING
        found = await asyncio.to_thread(overlay.found, rules)
        if found.table:
            return found  # also where it was removed, or replaced, by ourselves
        try:
            await asyncio.to_thread(self._overlay.up, rules)
        except ProblemError as exc:
            _log.warning("overlay_not_restored", cause=exc.problem.cause)
            return found
        _log.warning("overlay_restored", interface=rules.interface)
        return await asyncio.to_thread(overlay.found, rules)

    def _came_on_stdin(self) -> None:
        with suppress(BlockingIOError):
            if not os.read(0, 4096):
                self._stop.set()

    def _state(self) -> str:
        if self._rules is None:
            return "STATUS=no overlay"
        return f"STATUS=the overlay of {self._rules.own} is up"

    async def _up(self, args: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            rules = self._checked(args)
            await self._hear_dials(rules.port)
            await asyncio.to_thread(self._overlay.up, rules)
            await self._stands(rules)
        _log.info("overlay_up", interface=rules.interface, address=rules.own)
        self._notifier.send(self._state())
        return {}

    async def _update(self, args: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            rules = self._checked(args)
            await asyncio.to_thread(self._overlay.update, rules)
            await self._stands(rules)
        return {}

    async def _stands(self, rules: Rules) -> None:
        """From now on this is what there is to be."""
        self._asked = True
        self._rules = rules
        if self._last is not None:
            await asyncio.to_thread(self._last.keep, rules)

    async def _found(self, args: dict[str, Any]) -> dict[str, Any]:
        self._asked = True
        may = [str(network) for network in self._networks]
        async with self._turn:
            found = await self._look()
        return {"may": may, "left_out": self._told_left_out(), **found.to_wire()}

    def _told_left_out(self) -> dict[str, Any] | None:
        users, cause = self._left_out
        return {"users": sorted(map(user_name, users)), "cause": cause} if users else None

    async def _beside(self, args: dict[str, Any]) -> dict[str, Any]:
        return {"tables": await asyncio.to_thread(overlay.beside, self._interface)}

    # -- what dials a port that is not known to be open --------------------------------------------

    async def _hear_dials(self, port: int) -> None:
        """The daemon's port is the group's number as well: no other overlay here has it."""
        if port == self._dials_port:
            return
        self._close_dials()
        self._dials_port = port
        try:
            self._dials = await asyncio.to_thread(self._overlay.hear_dials, port)
        except OSError as exc:
            _log.info("overlay_dials_unheard", cause=str(exc))
        else:
            asyncio.get_running_loop().add_reader(self._dials, self._read_dials, self._dials)

    def _close_dials(self) -> None:
        dials, self._dials = self._dials, None
        if dials is not None:
            asyncio.get_running_loop().remove_reader(dials)
            dials.close()

    def _read_dials(self, dials: HeldDials) -> None:
        dials.read()
        self._dialled.set()

    async def _tell_dialled(self, args: dict[str, Any]) -> dict[str, Any]:
        """To the last one who waits: those before it may be gone."""
        if self._listener is not None:
            self._listener.set()
            self._dialled.set()
        self._listener = replaced = asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(DIALLED_SECONDS):
                while self._dials is not None and not replaced.is_set():
                    if places := self._dials.untold():
                        return {"places": places}
                    self._dialled.clear()
                    await self._dialled.wait()
        return {"places": None if self._dials is None else []}

    async def _decide(self, args: dict[str, Any]) -> dict[str, Any]:
        try:
            answers = [((str(a), int(p)), o is True) for a, p, o in args["places"]]
        except (KeyError, TypeError, ValueError) as exc:
            raise _refused(str(exc), "run the same version of rayfwd on both sides") from exc
        if self._dials is not None:
            self._dials.decide(answers)
        return {}

    async def _down(self, args: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            await self._remove()
        _log.info("overlay_down", interface=self._interface)
        self._notifier.send(self._state())
        return {}

    def _checked(self, args: dict[str, Any]) -> Rules:
        """What is asked for, if it may be had. Raises ProblemError."""
        try:
            rules = Rules.from_wire(args["rules"])
        except (KeyError, TypeError, ValueError) as exc:
            raise _refused(str(exc), "run the same version of rayfwd on both sides") from exc
        network = ipaddress.IPv4Network(rules.network)
        if rules.interface != self._interface:
            raise _refused(
                f"the interface {rules.interface}, but this process makes {self._interface}",
                "start it with --interface and the same name",
            )
        if not any(network.subnet_of(allowed) for allowed in self._networks):
            allowed = ", ".join(map(str, self._networks))
            raise _refused(
                f"the network {network}, and only {allowed} are allowed",
                f"start it with --network {network}, if nothing else uses that network",
            )
        low = [first for first, _ in (*rules.guarded, (rules.port, 0)) if first < LOWEST_PORT]
        if low:
            raise _refused(
                f"port {low[0]}, and ports below {LOWEST_PORT} are not allowed", "choose another"
            )
        return rules if self._file is None else replace(rules, uids=self._dialers(rules.uids))

    def _dialers(self, asked: frozenset[int]) -> frozenset[int]:
        """Those of them whose connections may be brought to the daemon. Whoever has got hold of
        that would have them of every user otherwise."""
        left_out, cause = asked - {0, self._owner}, ""
        if left_out:
            assert self._file is not None, "somebody is to be named there"
            cause = f"listeners.users in {self._file} does not name them"
            try:
                left_out -= named_users(self._file)
            except ValueError as exc:
                cause = f"the file that has listeners.users cannot be trusted: {exc}"
        if left_out and (left_out, cause) != self._left_out:
            _log.warning(
                "overlay_users_left_out",
                users=sorted(map(user_name, left_out)),
                cause=cause,
                remedy="name them in listeners.users of a file that only root can write, and that "
                "file by `--config` in rayfwd-net.service if it is another one; then restart "
                "rayfwd-net and rayfwd",
            )
        self._left_out = left_out, cause
        return asked - left_out


def _keepers(name: str) -> list[NameHolder]:
    """Those that may hold an interface by this name. Any user can make the name, and only root and
    this user count. Keepers of earlier checkouts do not listen: not every kernel says whose those
    are, and then they count too."""
    same = re.compile(re.escape(name.encode()) + rb"(-[0-9a-f]{16})?")
    found = (holder for holder in holders_of_names(name) if same.fullmatch(holder.name))
    return [holder for holder in found if holder.counts or holder.uid is None]


def _refused(cause: str, remedy: str) -> ProblemError:
    return codes.OVERLAY_REFUSED.error(f"rayfwd-net was asked for {cause}", remedy)
