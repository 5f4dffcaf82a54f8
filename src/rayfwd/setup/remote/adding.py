"""One machine is brought in: every step in order, said as it is done, and safe to repeat."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.config import DialConfig
from rayfwd.problems import ProblemError
from rayfwd.ray.install import Versions
from rayfwd.setup.remote import hosts, install, keys, sight, there
from rayfwd.setup.remote.calls import Found, Known, NodeRequest, Prepared, SelfReport, Started
from rayfwd.setup.remote.here import Added, Head, Way
from rayfwd.setup.remote.hosts import Host
from rayfwd.setup.remote.shipment import Shipment, pack_ray
from rayfwd.setup.remote.sight import Sight
from rayfwd.setup.remote.slots import SLOT_SECONDS, Slot
from rayfwd.setup.remote.ssh import Failed, Hangs, Machine, NoShell, by_hand
from rayfwd.status import Status
from rayfwd.system import setting
from rayfwd.wire import fields_from_wire, fields_to_wire

LOOK_SECONDS = 90.0
"""For a machine to say what it has."""
START_SECONDS = 180.0
"""For its files to be made, and for its daemon to be started."""
POLL_SECONDS = 0.5
"""Between two questions to the head whether it is in the cluster."""
BUSY_SECONDS = 2.0
"""Between two looks at a machine on which something is being installed."""
ASK_SECONDS = 15.0
"""Between two looks at what its own rayfwd says: what does not pass by itself ends the wait."""

Report = Callable[[str, str, str], None]
"""Takes the machine, the step and what came of it."""


@dataclass(slots=True)
class Outcome:
    """Of one machine."""

    called: str
    name: str = ""
    changed: bool = False
    seconds: float = 0.0
    problem: ProblemError | None = None
    at: str = ""
    """The step at which it is, or failed."""
    ended: bool = False
    """Well or not; False: it was interrupted."""
    slot: Slot = field(default_factory=Slot)


@dataclass(slots=True)
class Adding:
    """What all machines of one command share."""

    head: Head
    shipment: Shipment
    folder: Path
    """For what is packed."""
    wait_for: float
    """Seconds until a machine must be ready."""
    report: Report
    names: dict[str, str] = field(default_factory=dict)
    """Who has a name in this command."""
    looks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By what a machine of this command is known again, under another name or address."""
    places: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Who is at work on a machine."""
    _ray: asyncio.Task[list[Path]] | None = None

    async def rays(self) -> list[Path]:
        """Wheels of the head's Ray, packed once. Raises ProblemError."""
        assert self.head.ray is not None, "it was asked for"
        if self._ray is None:
            packing = pack_ray(self.head.ray.python, self.folder / "ray")
            self._ray = asyncio.create_task(packing, name="pack Ray")
        return await asyncio.shield(self._ray)


async def add(all_: Adding, host: Host, outcome: Outcome) -> None:
    """Never raises but for faults of ours: what went wrong is in the outcome."""
    began = time.monotonic()
    one = _One(all_, host, outcome)
    try:
        await one.run()
    except ProblemError as exc:
        outcome.problem = exc
    except Failed as exc:
        outcome.problem = codes.ADD_FAILED.error(f"{host.ssh}: {exc}", exc.remedy)
    except MAKES_NO_SENSE as exc:
        outcome.problem = makes_no_sense(host.ssh, exc)
    finally:
        one.close()
    outcome.seconds = time.monotonic() - began


class _One:
    """One machine, on its way in."""

    def __init__(self, all_: Adding, host: Host, outcome: Outcome) -> None:
        self._all = all_
        self._head = all_.head
        self._host = host
        self._outcome = outcome
        self._machine: Machine | None = None
        self._own_program = False
        """What other machines of the same home have does not run here."""

    def close(self) -> None:
        if self._machine is not None:
            self._machine.close()

    def _at(self, step: str) -> None:
        self._outcome.at = step

    def _say(self, came: str, changed: bool = False) -> None:
        self._outcome.changed |= changed
        self._all.report(self._outcome.called, self._outcome.at, came)

    async def run(self) -> None:
        """Raises ProblemError, Failed."""
        self._at("log in")
        async with self._outcome.slot.lent(lambda: self._say(no_answer_yet())):
            self._machine = machine = await Machine.connect(self._host)
            self._at("look")
            seen = await look(machine, self._host.prefix, self._rays())
        seen = await self._when_installed(machine, seen)
        if self._is_anothers_program(seen):
            # No Python that it needs is here: this machine has a program of its own.
            beside = f"{seen.prefix}-{hosts.node_name(seen.host)}"
            seen = await look(machine, beside, self._rays())
            self._own_program = True
        seen = await self._apart(machine, seen)
        self._say(seen.lines())
        if seen.same:
            self._all.looks[self._host.ssh] = (seen.same, seen.user, seen.prefix)
        self._check_ray_can_be_there(seen)
        name = await self._name(seen)
        await self._check_it_is_free(machine, seen, name)
        self._check_no_other_is_it()
        self._remember(name, seen, None)
        self._at("install")
        new = await install.rayfwd(machine, seen, self._all.shipment, name)
        self._say(f"rayfwd in {seen.prefix}" + ("" if new else ", as it is here"), new)
        if self._host.ray:
            await self._install_ray(machine, seen)
        python = f"{seen.prefix}/bin/python"
        ray, ways = await self._look_further(machine, seen, python, name)
        service = await self._set_up(machine, seen, python, name, ray, ways, new)
        await self._wait(machine, python, name, service)

    def _rays(self) -> list[str]:
        """Where Ray may be there: as was said, else where the head has it."""
        if self._host.ray_command is not None:
            return [self._host.ray_command]
        return [] if self._head.ray is None else [self._head.ray.command]

    def _check_ray_can_be_there(self, seen: Sight) -> None:
        """Raises ProblemError."""
        if seen.is_musl and self._starts_ray and not (seen.rays and not self._host.ray):
            raise codes.ADD_BLOCKED.error(
                f"{self._host.ssh} has {seen.libc or 'musl'} as its C library, and Ray is built "
                "for glibc only",
                "use a machine or an image with glibc (Debian, Ubuntu, Fedora)",
            )

    def _check_no_other_is_it(self) -> None:
        """Raises ProblemError where another machine of this command is this one, under another
        name or address: both would write the same files."""
        if (look := self._all.looks.get(self._host.ssh)) is None:
            return
        first = self._all.places.setdefault(look, self._host.ssh)
        if first != self._host.ssh:
            raise self._same_as(first)

    def _same_as(self, first: str) -> ProblemError:
        return codes.ADD_BLOCKED.error(
            f"{self._host.ssh} is the same machine and user as {first}",
            "name it once",
        )

    @property
    def _starts_ray(self) -> bool:
        return dict(self._host.more.get("ray", {})).get("start") is not False

    async def _name(self, seen: Sight) -> str:
        """The node's. Raises ProblemError where another machine has it."""
        known = self._head.added()
        before = [n for n, entry in known.items() if entry.ssh == self._host.ssh]
        says = (seen.made or {}).get("name")
        usual = before[0] if before else says if says in known else None
        try:
            name = self._host.name or usual or hosts.node_name(seen.host)
        except ValueError as exc:
            raise codes.ADD_BLOCKED.error(
                f"{seen.host!r}, the host name of {self._host.ssh}, {exc}",
                "choose another name with --name",
            ) from None
        if before and name not in before:
            raise codes.ADD_BLOCKED.error(
                f"{self._host.ssh} is the node {before[0]} already, and would become {name}",
                f"run `rayfwd remove {before[0]}` first, or leave --name out",
            )
        first = self._all.names.setdefault(name, self._host.ssh)
        if first != self._host.ssh:
            look = self._all.looks.get(self._host.ssh)
            if look is not None and look == self._all.looks.get(first):
                raise self._same_as(first)
            raise codes.ADD_BLOCKED.error(
                f"{self._host.ssh} would get the name {name}, which {first} has",
                "choose another name with --name",
            )
        await self._check_nobody_has(name, known, seen)
        if name in (self._head.config.name, "head"):
            raise codes.ADD_BLOCKED.error(
                f"{self._host.ssh} would get the name {name}, which the head has",
                "choose another name with --name",
            )
        self._outcome.name = self._outcome.called = name
        return name

    async def _check_nobody_has(self, name: str, known: Mapping[str, Added], seen: Sight) -> None:
        """Whether the machine that has the name has gone, and this one was said to be in its
        place. Raises ProblemError."""
        other = known[name].ssh if name in known else self._host.ssh
        if other == self._host.ssh:
            return
        cause = f"{self._host.ssh} would get the name {name}, which {other} has"
        if (seen.made or {}).get("name") == name and self._host.name != name:
            raise codes.ADD_BLOCKED.error(
                f"{self._host.ssh} is the node {name} already, which was added as {other}",
                f"run `rayfwd add {other}` for it; to reach it as {self._host.ssh} from now on, "
                f"use --name {name} while it is not connected, or `rayfwd remove {name}` first; "
                "if it is a copy of that machine, remove what rayfwd has on it "
                f"({seen.prefix}), and choose another name with --name",
            )
        if await self._head.is_up(name):
            raise codes.ADD_BLOCKED.error(
                f"{cause}, and that one is connected",
                "choose another name with --name, or run `rayfwd remove` for the other machine",
            )
        if self._host.name != name:
            raise codes.ADD_BLOCKED.error(
                cause,
                f"choose another name with --name; if this machine takes the place of the other "
                f"one, which is gone, use --name {name}",
            )
        self._say(f"takes the place of {other}, which is not connected")

    async def _when_installed(self, machine: Machine, seen: Sight) -> Sight:
        """The same, once nobody installs there: an `add` that was interrupted may, or that for
        another machine with the same home."""
        deadline = time.monotonic() + install.INSTALL_SECONDS / 2
        if not seen.busy:
            return seen
        self._say("another installation is at work there, and is waited for")
        self._outcome.slot.leave()
        while time.monotonic() < deadline:
            await asyncio.sleep(BUSY_SECONDS)
            seen = await look(machine, self._host.prefix, self._rays())
            if not seen.busy:
                break
        await self._outcome.slot.take()
        return seen

    def _is_anothers_program(self, seen: Sight) -> bool:
        """Whether what is there runs on the machine that it was installed from, and not on this
        one, which has the same home."""
        return seen.broken and (seen.made or {}).get("host", seen.host) != seen.host

    async def _apart(self, machine: Machine, seen: Sight) -> Sight:
        """The same; where other machines have this home too, without what is theirs in it."""
        if seen.made is None or seen.root:
            return seen
        known = Known()
        if not seen.broken:
            with suppress(ProblemError):  # an earlier version's, which does not know
                told = await machine.call(f"{seen.prefix}/bin/python", there.who, {})
                known = fields_from_wire(Known, told, "known")
        if not known.apart:
            theirs, host = seen.made.get("name"), seen.made.get("host", seen.host)
            if host == seen.host or theirs not in await self._elsewhere():
                return seen
        made = {key: value for key, value in seen.made.items() if key not in {"name", "host"}}
        if known.name is not None:
            made["name"] = known.name
        return replace(seen, made=made, systemd=seen.systemd and not known.apart)

    async def _elsewhere(self) -> list[str]:
        """Nodes that certainly are other machines: they are connected, or were looked at in this
        command. Raises ProblemError."""
        found, up = [], await self._head.names_up()
        for name, entry in self._head.added().items():
            ssh = entry.ssh
            if ssh == self._host.ssh:
                continue
            look, own = self._all.looks.get(ssh), self._all.looks.get(self._host.ssh)
            if (look is not None and look != own) or name in up:
                found.append(name)
        return found

    async def _check_it_is_free(self, machine: Machine, seen: Sight, name: str) -> None:
        """Raises ProblemError where it is a node already: under another name, or in the cluster of
        another head now."""
        if seen.made is None:
            return
        if (other := seen.made.get("name", name)) != name:
            raise codes.ADD_BLOCKED.error(
                f"{self._host.ssh} is {other!r} already, and would be {name}",
                there.other_name(other),
            )
        status = await running(machine, seen.prefix)
        link = None if status is None else status.link
        if status is None or link is None or link.state != "up":
            return
        if not await self._head.is_up(status.name):
            raise codes.ADD_BLOCKED.error(
                f"{self._host.ssh} is {status.name} in another cluster, of the head {link.head}",
                "run `rayfwd remove` on that head first; to be in both clusters, run "
                "`rayfwd join HEAD --cluster NAME` on the machine",
            )

    async def _install_ray(self, machine: Machine, seen: Sight) -> None:
        self._at("Ray")
        if self._head.ray is None:
            raise codes.ADD_BLOCKED.error(
                f"the head starts no Ray itself ({setting.value('ray.start', False)})",
                "leave --ray out",
            )
        wanted = self._head.ray.versions
        ours: list[Path] = []
        if (
            seen.made_ray != install.ray_marker(wanted) or seen.broken_ray
        ) and seen.machine == self._all.shipment.machine:
            with suppress(ProblemError):  # the index may have it
                ours = await self._all.rays()
        new = await install.ray(machine, seen, self._all.shipment, wanted, ours)
        place = install.ray_prefix(seen)
        self._say(f"Ray {wanted.ray} in {place}" + ("" if new else ", as it is here"), new)

    async def _look_further(
        self, machine: Machine, seen: Sight, python: str, name: str
    ) -> tuple[str, list[tuple[Way, str]]]:
        """Its Ray, and each way to the head with why it is none. Raises ProblemError."""
        self._at("look")
        rays = list(seen.rays)
        if self._host.ray_command is not None:
            rays = [self._host.ray_command]
        if self._host.ray:
            rays = [f"{install.ray_prefix(seen)}/bin/ray"]
        ways = []
        # What the head came to dial stays so, as its daemon would have to start anew.
        if self._host.via == "worker" or (
            self._host.via == "auto" and self._way_before(name) != "head"
        ):
            ways = await self._head.ways(self._host, seen.head_as)
        asked: dict[str, Any] = {"rays": rays}
        asked["ways"] = [{"ssh": w.ssh, "key": w.key} for w in ways]
        if self._head.ray is not None:
            asked["wanted"] = [self._head.ray.versions.ray, self._head.ray.versions.python]
        told = await machine.call(python, there.look, asked, LOOK_SECONDS)
        found = fields_from_wire(Found, told, "found")
        ray = self._checked_ray(found)
        return ray, list(zip(ways, found.ways, strict=True))

    def _checked_ray(self, found: Found) -> str:
        """Raises ProblemError where its Ray is none, or not as the head's."""
        if not self._starts_ray:
            return found.ray or "ray"
        told = f"{self._outcome.called}: "
        remedy = "use --ray, which installs the head's version, or give its path with --ray-command"
        if found.ray is None:
            wrong = found.ray_problem
            cause = wrong.cause if wrong else "no Ray was found there"
            code = wrong.code if wrong else codes.RAY_NOT_FOUND
            raise code.error(told + cause, remedy)
        if self._head.ray is not None:
            check_same(Versions(*found.versions or ()), self._head.ray.versions, told, remedy)
        return found.ray

    async def _set_up(
        self,
        machine: Machine,
        seen: Sight,
        python: str,
        name: str,
        ray: str,
        ways: list[tuple[Way, str]],
        new: bool,
    ) -> bool:
        """Its files, the keys, and its daemon; whether a service manager has it. Raises
        ProblemError."""
        way = next((w for w, why in ways if not why), None)
        why = "; ".join(why for _, why in ways if why) or "the head's sshd does not answer here"
        if way is not None:
            self._at("set up")
            made = await self._prepare(machine, seen, python, name, ray, way)
            self._at("way")
            new |= self._head.let_in(name, made.key or "")
            try:
                asked = {"head": way.ssh, "identity": made.identity, "user": made.user}
                asked["known_hosts"] = made.known_hosts
                await machine.call(python, there.check_way, asked, LOOK_SECONDS)
                await self._head.undial(name)
                self._say(f"the machine dials {way.ssh}")
            except ProblemError as exc:
                why, way = exc.problem.cause, None
        if way is None:
            self._at("way")
            if self._host.via == "worker":
                raise codes.ADD_NO_WAY.error(
                    f"{self._outcome.called} cannot log in on the head: {why}",
                    "say how that machine reaches the head with --head USER@HOST[:PORT], or leave "
                    "out --via worker, so that the head dials",
                )
            self._at("set up")
            made = await self._prepare(machine, seen, python, name, ray, None)
            await self._dial(machine, seen, python, name, made)
            self._at("way")
            reason = "" if not ways else f", because the machine does not reach the head: {why}"
            self._say(f"the head dials the machine{reason}")
        seen = replace(seen, systemd=made.service)
        self._remember(name, seen, "head" if way is None else "worker")
        self._at("start")
        how = {"service": seen.systemd, "anew": new or bool(made.changed)}
        told = await machine.call(python, there.start, how, START_SECONDS)
        started = fields_from_wire(Started, told, "started")
        self._say(f"{started.came}: {started.how}", started.came != "runs")
        return seen.systemd

    def _remember(self, name: str, seen: Sight, way: str | None) -> None:
        """For another `add`, and for `remove`. `way`: None, as before. Raises ProblemError."""
        before = self._head.added().get(name, Added())
        host = self._host
        entry = Added(
            ssh=host.ssh,
            way=way or before.way,
            prefix=seen.prefix,
            service=seen.systemd,
            own_program=self._own_program or before.own_program,
            identity=_text(host.identity),
            known_hosts=_text(host.known_hosts),
            ssh_config=_text(host.ssh_config),
        )
        self._head.remember(name, entry)

    def _way_before(self, name: str) -> str | None:
        return self._head.added().get(name, Added()).way

    async def _prepare(
        self, machine: Machine, seen: Sight, python: str, name: str, ray: str, way: Way | None
    ) -> Prepared:
        request = NodeRequest(
            name=name,
            ray=ray,
            service=seen.systemd,
            head=None if way is None else way.ssh,
            host_key=None if way is None else way.known_host,
            attach=self._head.attach_words(name)[0],
            more=self._host.more,
            elsewhere=() if seen.root else tuple(await self._elsewhere()),
        )
        asked = {"request": fields_to_wire(request)}
        told = await machine.call(python, there.prepare, asked, START_SECONDS)
        made = fields_from_wire(Prepared, told, "prepared")
        for thing in made.kept:
            self._say(f"{thing} was left as it is, because it was edited or added otherwise before")
        count = len(made.changed)
        came = f"created {count} files and directories" if count else "nothing to create"
        self._say(f"{came}; the configuration is {made.config}", count > 0)
        return made

    async def _dial(
        self, machine: Machine, seen: Sight, python: str, name: str, made: Prepared
    ) -> None:
        """Have the head dial it. Raises ProblemError."""
        self._head.shut_out(name)
        path, public = self._head.dial_key()
        words = [made.command, "attach"]
        if seen.root:
            words += ["--socket", made.socket]
        # Else its file says where: of machines with one home, sshd takes the first one's line.
        line = keys.forced_line(words, public, f"head-of-{name}")
        asked = {"line": line, "name": f"head-of-{name}"}
        await machine.call(python, there.authorize, asked)
        given: dict[str, Any] = {"name": name, "ssh": self._host.ssh, "via": "exec"}
        given |= {"identity": str(path), "attach_command": f"{words[0]} attach"}
        for key in ("known_hosts", "ssh_config"):
            if (named := getattr(self._host, key)) is not None:
                given[key] = str(named)
        await self._head.dial(DialConfig.model_validate(given))

    async def _wait(self, machine: Machine, python: str, name: str, service: bool) -> None:
        """Until it is in the cluster. Raises ProblemError."""
        self._at("join")
        self._outcome.slot.leave()  # whoever waits does no work
        began = asked = time.monotonic()
        while not await self._head.is_ready(name):
            now = time.monotonic()
            late = now - began > self._all.wait_for
            if late or now - asked > ASK_SECONDS:
                asked = now
                told = await machine.call(python, there.how_it_is, {"service": service})
                report = fields_from_wire(SelfReport, told, "report")
                if late or any(problem.code.lasting for problem in report.conditions):
                    raise not_ready(name, now - began, report)
            await asyncio.sleep(POLL_SECONDS)
        self._say("in the cluster" + ", with its Ray" * self._starts_ray)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


MAKES_NO_SENSE = (LookupError, TypeError, ValueError, AttributeError)
"""What it comes to where a machine answers, but not as its rayfwd would: no other machine is to
suffer for that."""


def makes_no_sense(machine: str, exc: Exception) -> ProblemError:
    """That it has answered so."""
    return codes.ADD_FAILED.error(
        f"{machine} gives an answer that makes no sense: {exc!r}",
        "run the same command again; if nothing changes, remove what `rayfwd add` has created "
        "there (`rayfwd remove`), and find out who has changed that machine",
    )


def no_answer_yet() -> str:
    """Of a machine that keeps its slot no longer."""
    return f"no answer for {SLOT_SECONDS:.0f} s; going on with the next machine meanwhile"


async def look(machine: Machine, prefix: str | None, rays: Iterable[str]) -> Sight:
    """Raises ProblemError."""
    try:
        output = await machine.sh(sight.script(prefix, list(rays)), seconds=LOOK_SECONDS)
        return sight.read(output.decode(errors="replace"), time.time())
    except Hangs as exc:
        at = sight.last_look(exc.own.decode(errors="replace"))
        cause = f"{machine.host.ssh} accepts the login, but {exc}"
        raise codes.ADD_FAILED.error(cause + f": it hangs at {at}" * bool(at), exc.remedy) from None
    except NoShell as exc:
        raise codes.ADD_FAILED.error(
            f"{machine.host.ssh} accepts the login, but runs no command; it says: {exc}",
            f"run `{by_hand(machine.host, 'true')}`, which must not print that: give that "
            "login a shell (`usermod --shell /bin/sh`), or remove what answers in its place "
            "(`command=` in its line of authorized_keys, ForceCommand in sshd_config)",
        ) from None
    except (Failed, ValueError) as exc:
        remedy = exc.remedy if isinstance(exc, Failed) else "use a Linux machine that has `sh`"
        raise codes.ADD_FAILED.error(
            f"{machine.host.ssh} cannot be examined: {exc}", remedy
        ) from None


async def running(machine: Machine, prefix: str) -> Status | None:
    """What the rayfwd that was added there says of itself; None: none of a kind that we know
    answers."""
    command = shlex.quote(f"{prefix}/bin/rayfwd")
    try:
        said = await machine.sh(f"{command} status --json 2>/dev/null || :")
        return Status.from_answer(json.loads(said))
    except (Failed, ValueError, ProblemError):
        return None


def check_same(there_: Versions, here: Versions, told: str, remedy: str) -> None:
    """Raises ProblemError: Ray refuses other versions than the head's."""
    if there_.ray != here.ray:
        raise codes.RAY_VERSION_DIFFERS.error(
            f"{told}its Ray is {there_.ray}, and the head's is {here.ray}", remedy
        )
    if there_.python != here.python:
        raise codes.PYTHON_VERSION_DIFFERS.error(
            f"{told}its Ray's Python is {there_.python}, and the head's Ray has {here.python}",
            remedy,
        )


def not_ready(name: str, seconds: float, report: SelfReport) -> ProblemError:
    """With what its own rayfwd says of it."""
    cause = f"{name} is not in the cluster after {seconds:.0f} s: {report.summary}"
    remedy = "run `rayfwd status` and `rayfwd doctor` on that machine"
    if report.conditions:
        first = report.conditions[0]
        cause, remedy = f"{cause}; {first.code.name}: {first.cause}", first.remedy
    elif report.log:
        cause += f"; its log ends with: {report.log[-300:].strip()}"
    return codes.ADD_NOT_READY.error(cause, remedy)
