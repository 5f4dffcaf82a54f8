"""Keeps on the head's disk which worker has which address and ports, and what proves its name.

The hub owns one `Roster`. Each worker proves its name with a key of its own making, of which the
roster keeps the public half; of a worker of a version that sends a secret instead, the secret's
SHA-256. Reading and settling are functions without side effects, so that
`rayfwd plan` can use them beside a running daemon.
"""

from __future__ import annotations

import ipaddress
import json
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rayfwd import codes
from rayfwd.cluster.plan import Level, NodePlan, allocate, check_name, fits, may_be_advertised
from rayfwd.problems import ProblemError
from rayfwd.session.proof import Claim
from rayfwd.system import setting
from rayfwd.system.files import read_regular, replace_file, write_new
from rayfwd.system.logs import get_logger

SCHEMA = 1

KEY_MINIMUM = 16
"""Bytes of a node's key below which it proves nothing."""

WORKER_PORTS = range(8, 10001)
"""How many worker ports a node may ask for, as in the configuration file."""

_log = get_logger("roster")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_fingerprint(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("SHA256:[A-Za-z0-9+/]{43}", value) is not None


@dataclass(frozen=True, slots=True)
class Record:
    """A worker as the roster keeps it."""

    plan: NodePlan
    key_sha256: str
    """Of the public key, or of the secret of a version that sends it."""
    public_key: str | None = None
    """Which it has proved to have, and must prove again; None: it never did."""
    seen: float = 0.0
    """Unix seconds when it was here last, as far as that was written down; 0: not known."""
    ephemeral: bool = False
    """It is given back as soon as it has left."""
    ssh_key: str | None = None
    """The fingerprint of the SSH key by which it came last, where sshd has told; None: it never
    has."""

    def to_wire(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_wire(),
            "key_sha256": self.key_sha256,
            "public_key": self.public_key,
            "seen": round(self.seen),
            "ephemeral": self.ephemeral,
            "ssh_key": self.ssh_key,
        }

    @classmethod
    def from_wire(cls, data: Any) -> Record:
        """The inverse of `to_wire`. Raises ValueError on anything else."""
        if not isinstance(data, dict) or not isinstance(data.get("plan"), dict):
            raise ValueError("not a node's record")
        plan = NodePlan.from_wire(data["plan"])
        check_name(plan.name)
        digest, public = data.get("key_sha256"), data.get("public_key")
        if (
            plan.role != "worker"
            or not _is_digest(digest)
            or not (public is None or _is_digest(public))
        ):
            raise ValueError(f"node {plan.name}: not a worker's record")
        seen = data.get("seen", 0)
        if isinstance(seen, bool) or not isinstance(seen, int | float) or not 0 <= seen < 1e12:
            raise ValueError(f"node {plan.name}: seen = {seen!r}")
        ssh_key = data.get("ssh_key")
        if ssh_key is not None and not _is_fingerprint(ssh_key):
            raise ValueError(f"node {plan.name}: ssh_key is no fingerprint")
        ephemeral = data.get("ephemeral") is True
        return cls(plan, str(digest), public, float(seen), ephemeral, ssh_key)

    def belongs_to(self, claim: Claim) -> bool:
        """Whether this is the node that it was. A key that was proved once is to be proved always:
        what an earlier version sent is good for nothing from then on."""
        if self.public_key is not None:
            return claim.proven and claim.key == self.public_key
        return claim.knows(self.key_sha256)


@dataclass(frozen=True, slots=True)
class Settled:
    """Records that fit the head's present plan, and what that took."""

    records: tuple[Record, ...]
    moved: tuple[str, ...] = ()
    """Names of workers whose address or ports had to change."""
    dropped: tuple[str, ...] = ()
    """Names of workers for which nothing is left."""


def read(path: Path) -> tuple[tuple[Record, ...], str | None]:
    """The file's records, and what is damaged about it (None: nothing).

    Records that can be read are kept even where others cannot. A missing file is an empty
    roster. Raises ProblemError `roster_unreadable` and `roster_newer`.
    """
    try:
        text = read_regular(path)
    except FileNotFoundError:
        return (), None
    except OSError as exc:
        raise codes.ROSTER_UNREADABLE.error(
            f"the roster {path} cannot be read: {exc.strerror}",
            "make the user that runs rayfwd the owner of this file (`chown`)",
        ) from exc
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as exc:
        return (), f"not JSON: {exc}"
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        return (), "no schema number"
    if data["schema"] > SCHEMA:
        raise codes.ROSTER_NEWER.error(
            f"the roster {path} has schema {data['schema']}, and this rayfwd reads schema {SCHEMA}",
            "run the newer rayfwd that wrote it, or move the file away, in which case "
            "all nodes get new addresses and ports",
        )
    nodes = data.get("nodes")
    if not isinstance(nodes, list):
        return (), "no list of nodes"
    records: dict[str, Record] = {}
    damage: list[str] = []
    for node in nodes:
        try:
            record = Record.from_wire(node)
        except ValueError as exc:
            damage.append(str(exc))
            continue
        if record.plan.name in records:
            damage.append(f"node {record.plan.name} is there twice")
        records.setdefault(record.plan.name, record)
    return tuple(records.values()), "; ".join(damage) or None


def settle(records: Iterable[Record], own: NodePlan, network: str, port_base: int) -> Settled:
    """Fit the workers beside the head's plan: who can stay stays, the others are moved."""
    kept: dict[str, Record] = {}
    misfits: list[Record] = []
    dropped: list[str] = []
    order: list[str] = []
    for record in records:
        beside = [own, *(r.plan for r in kept.values())]
        if record.plan.name == own.name:
            dropped.append(record.plan.name)
            continue
        order.append(record.plan.name)
        if fits(record.plan, beside, network, port_base):
            kept[record.plan.name] = record
        else:
            misfits.append(record)
    moved: list[str] = []
    for record in misfits:
        old = record.plan
        others = [own, *(r.plan for r in kept.values())]
        advertise = old.address if old.advertised else None
        try:
            # `old` goes in too, so that the half of it that still fits is kept.
            plan = allocate(
                [*others, old], old.name, network, port_base, old.worker_ports, advertise, old.level
            )
        except ProblemError:
            dropped.append(old.name)
            order.remove(old.name)
            continue
        kept[old.name] = replace(record, plan=plan)
        moved.append(old.name)
    return Settled(tuple(kept[name] for name in order), tuple(moved), tuple(dropped))


class Roster:
    """The plan of every node, the head's first; every change is on disk before it is told."""

    def __init__(self, path: Path, own: NodePlan, network: str, port_base: int) -> None:
        """Read the file and fit it to the head's plan `own`.

        A damaged file is copied aside and what can be read of it is kept. Raises ProblemError
        `roster_unreadable`, `roster_newer` and `roster_unwritable`.
        """
        self._path = path
        self._own = own
        self._network = network
        self._port_base = port_base
        records, damage = read(path)
        if damage is not None:
            aside = _set_aside(path)
            _log.error(
                "roster_damaged",
                file=str(path),
                damage=damage,
                kept=[r.plan.name for r in records],
                aside=str(aside),
                remedy="nothing, but nodes that are not listed as kept get a new address when "
                "they join",
            )
        settled = settle(records, own, network, port_base)
        self._records: dict[str, Record] = {}
        self._plans: tuple[NodePlan, ...] = ()
        self._together = False
        self.most_listeners: Callable[[], int | None] = lambda: None
        """How many all workers together may make necessary on this machine, as far as who is new
        adds to them; None: any number."""
        self._texts: dict[str, tuple[Record, str]] = {}
        """Records as the file has them."""
        self._keep({r.plan.name: r for r in settled.records})
        if settled.moved:
            _log.warning(
                "roster_moved",
                nodes=list(settled.moved),
                cause=f"{setting.key('hub.network')}, {setting.key('hub.port_base')}, or the "
                "head's name or ports have changed",
            )
        if settled.dropped:
            _log.error(
                "roster_dropped",
                nodes=list(settled.dropped),
                cause="no address, no ports or no name is left for them",
                remedy=f"choose a wider {setting.key('hub.network')}, or lower "
                f"{setting.key('hub.port_base')}",
            )
        if damage is not None or settled.moved or settled.dropped:
            self._write(self._records)

    @property
    def own(self) -> NodePlan:
        return self._own

    def plans(self) -> tuple[NodePlan, ...]:
        """Every node's plan, the head's first; the same tuple as long as nothing changes."""
        return self._plans

    def plan(self, name: str) -> NodePlan | None:
        """The plan of worker `name`, if it has one."""
        record = self._records.get(name)
        return None if record is None else record.plan

    def join(
        self,
        name: str,
        key: str | Claim,
        worker_ports: int,
        advertise: str | None,
        level: Level = "listeners",
        renew: bool = False,
        ephemeral: bool = False,
        ssh_key: str | None = None,
    ) -> NodePlan:
        """The plan of worker `name`, made now or kept from before. `key`: a secret, or what was
        proved. `renew`: the name may have another key from now on. `ephemeral`: it is not kept
        when the worker has left. `ssh_key`: by which it has come; None: not known this time.

        Raises ProblemError: `name_taken`, `address_taken`, `plan_full`, `listeners_full`,
        `join_bad` (a value that no rayfwd sends), `roster_unwritable`.
        """
        known = self._records.get(name)
        record = self._record(name, key, worker_ports, advertise, level, renew)
        if ssh_key is None and known is not None:
            ssh_key = known.ssh_key
        record = replace(record, ephemeral=ephemeral, ssh_key=ssh_key)
        if record != known:
            records = {**self._records, name: record}
            if not self._together:
                self._write(records)
            self._keep(records)
            plan = record.plan
            _log.info(
                "roster_changed",
                node=name,
                address=plan.address,
                ports=f"{plan.base}-{plan.last_worker_port}",
            )
        return record.plan

    def check(self, name: str, claim: Claim, live: bool = False) -> None:
        """Whether worker `name` is who it was; `live`: the one that it was is there. Raises
        ProblemError `name_taken`."""
        if self.has(name, claim):
            return
        if live:
            raise codes.NAME_TAKEN.error(
                f"the name {name} belongs to a node with another key, which is connected now",
                "give this node another name (`name`, or --name)",
            )
        raise _name_taken(name, "belongs to a node with another key")

    def changes(
        self, name: str, worker_ports: int, advertise: str | None, level: Level = "listeners"
    ) -> bool:
        """Whether worker `name` has another plan than it would with these."""
        known = self._records.get(name)
        return known is None or not known.plan.suits(worker_ports, advertise, level)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Whoever joins meanwhile is written down at the end, all at once: a disk may take a tenth
        of a second each time. Raises ProblemError there, and none of them has joined then."""
        before, self._together = self._records, True
        try:
            yield
        finally:
            self._together = False
        if self._records is not before:
            try:
                self._write(self._records)
            except ProblemError:
                self._keep(before)
                raise

    def preview(
        self,
        name: str,
        key: str | Claim,
        worker_ports: int,
        advertise: str | None,
        renew: bool = False,
    ) -> NodePlan:
        """What `join` would give at the level that the node has, changing nothing. Raises
        ProblemError as that does."""
        known = self.plan(name)
        level: Level = "listeners" if known is None else known.level
        return self._record(name, key, worker_ports, advertise, level, renew).plan

    def has(self, name: str, claim: Claim) -> bool:
        """Whether worker `name` has that key."""
        known = self._records.get(name)
        return known is not None and known.belongs_to(claim)

    def came_by(self, name: str, ssh_key: str | None) -> bool:
        """Whether this SSH key is the one by which worker `name` has come, and no other worker
        has."""
        known = self._records.get(name)
        if ssh_key is None or known is None or known.ssh_key != ssh_key:
            return False
        return sum(record.ssh_key == ssh_key for record in self._records.values()) == 1

    def _record(
        self,
        name: str,
        key: str | Claim,
        worker_ports: int,
        advertise: str | None,
        level: Level,
        renew: bool,
    ) -> Record:
        claim = key if isinstance(key, Claim) else Claim(key)
        _check_request(name, claim.key, worker_ports, advertise)
        known = self._records.get(name)
        if name in (self._own.name, "head"):
            raise _name_taken(name, "is the head's")
        if known is not None and not (renew or known.belongs_to(claim)):
            raise _name_taken(name, "belongs to a node with another key")
        if known is not None and known.plan.suits(worker_ports, advertise, level):
            plan = known.plan  # it fits beside all others, as they were made to
        else:
            plan = allocate(
                self.plans(), name, self._network, self._port_base, worker_ports, advertise, level
            )
            self._check_listeners(plan)
        seen = known.seen if known is not None else 0.0
        return Record(plan, claim.sha256, claim.key if claim.proven else None, seen)

    def _check_listeners(self, plan: NodePlan) -> None:
        """Whether there are descriptors for the listeners of a plan. Raises ProblemError."""
        most = self.most_listeners()
        taken = sum(r.plan.listeners for r in self._records.values() if r.plan.name != plan.name)
        if plan.listeners and most is not None and taken + plan.listeners > most:
            raise codes.LISTENERS_FULL.error(
                f"the head has file descriptors for {most} listeners; the nodes of the plan use "
                f"{taken} of them, and {plan.name} would need {plan.listeners}",
                "on the head, raise the limit (LimitNOFILE= of the service, or `ulimit -n`), or "
                "run `rayfwd forget --keep-token NAME` for nodes that are gone; or lower "
                f"{setting.theirs('ray.worker_ports')} on this node",
            )

    def note_seen(self, here: Collection[str], now: float) -> None:
        """These are here; of whom nothing is known, the time begins to count. Raises ProblemError
        where that cannot be written."""
        records = {
            name: replace(r, seen=now) if name in here or not r.seen else r
            for name, r in self._records.items()
        }
        if records != self._records:
            self._write(records)
            self._records = records

    def note_key(self, name: str, claim: Claim) -> None:
        """Worker `name`, which was known by a secret, is known from now on by the key that it has
        proved. Raises ProblemError where that cannot be written."""
        known = self._records.get(name)
        if known is not None and known.public_key is None and claim.proven:
            record = replace(known, key_sha256=claim.sha256, public_key=claim.key)
            records = {**self._records, name: record}
            self._write(records)
            self._records = records

    def has_new(self) -> bool:
        """There is one of whom it is not known when it was here."""
        return any(not r.seen for r in self._records.values())

    def away_for(self, seconds: float, now: float) -> list[str]:
        """Who was not seen for longer than that."""
        return [n for n, r in self._records.items() if r.seen and now - r.seen > seconds]

    def for_a_while(self) -> list[str]:
        """Who is not kept when it has left."""
        return [name for name, record in self._records.items() if record.ephemeral]

    def room(self, most: int) -> tuple[int, Literal["plan", "files"]]:
        """How many more workers have a place, `most` at the most: each as large as the largest, and
        with listeners unless none has them. And what has no more room: the plan's addresses and
        ports, or this process's file descriptors."""
        plans = list(self.plans())
        ports = max(plan.worker_ports for plan in plans)
        listeners = sum(r.plan.listeners for r in self._records.values())
        most_listeners = self.most_listeners()
        overlay = bool(self._records) and all(plan.level == "overlay" for plan in plans[1:])
        level: Level = "overlay" if overlay else "listeners"
        for found in range(most):
            name = f"{found}?"  # no node's name
            try:
                plan = allocate(plans, name, self._network, self._port_base, ports, None, level)
            except ProblemError:
                return found, "plan"
            listeners += plan.listeners
            if most_listeners is not None and listeners > most_listeners:
                return found, "files"
            plans.append(plan)
        return most, "plan"

    def knows(self, name: str) -> bool:
        """Whether there is a worker of that name."""
        return name in self._records

    def forget(self, name: str) -> bool:
        """Drop worker `name`, so that its name, address and ports are free. False: not known."""
        if name not in self._records:
            return False
        records = {n: r for n, r in self._records.items() if n != name}
        self._write(records)
        self._keep(records)
        _log.info("roster_forgot", node=name)
        return True

    def set_own_level(self, level: Level) -> None:
        """The head's, once it is known."""
        if level != self._own.level:
            self._own = replace(self._own, level=level)
            self._keep(self._records)

    def _keep(self, records: dict[str, Record]) -> None:
        self._records = records
        self._plans = (self._own, *(r.plan for r in records.values()))

    def _write(self, records: dict[str, Record]) -> None:
        # A record is made text once: with a thousand of them each join would wait for all.
        for name, record in records.items():
            if name not in self._texts or self._texts[name][0] != record:
                text = json.dumps(record.to_wire(), indent=1)
                self._texts[name] = record, textwrap.indent(text, "  ")
        self._texts = {name: self._texts[name] for name in records}
        nodes = ",\n".join(text for _, text in self._texts.values())
        text = f'{{\n "schema": {SCHEMA},\n "nodes": [\n{nodes}\n ]\n}}\n'
        try:
            replace_file(self._path, text.encode())
        except OSError as exc:
            raise codes.ROSTER_UNWRITABLE.error(
                f"the roster {self._path} cannot be written: {exc.strerror or exc}",
                f"make {self._path.parent} writable for this user, and check that its disk is not "
                "full",
            ) from exc


def _set_aside(path: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    try:
        write_new(aside, read_regular(path), 0o600)
    except OSError as exc:
        raise codes.ROSTER_UNWRITABLE.error(
            f"the damaged roster {path} cannot be copied to {aside}: {exc.strerror or exc}",
            f"make {path.parent} writable for this user, and check that its disk is not full",
        ) from exc
    return aside


def _name_taken(name: str, why: str) -> ProblemError:
    return codes.NAME_TAKEN.error(
        f"the name {name} {why}",
        "give this node another name; if it is the same machine after a reinstallation, run "
        f"`rayfwd forget --keep-token {name}` on the head first, or let its key's line in "
        f"authorized_keys run `rayfwd attach --node {name}`",
    )


def _check_request(name: str, key: str, worker_ports: int, advertise: str | None) -> None:
    try:
        check_name(name)
        if len(key) < KEY_MINIMUM:
            raise ValueError(f"the key has {len(key)} bytes, and at least {KEY_MINIMUM} are needed")
        if worker_ports not in WORKER_PORTS:
            allowed = f"{WORKER_PORTS.start} to {WORKER_PORTS.stop - 1}"
            raise ValueError(f"worker_ports = {worker_ports}: must be {allowed}")
        if advertise is not None and not may_be_advertised(ipaddress.IPv4Address(advertise)):
            raise ValueError(
                f"advertise = {advertise}: must be an address that other machines reach"
            )
    except ValueError as exc:
        raise codes.JOIN_BAD.error(
            f"node {name[:63]!r} asked to join: {exc}",
            "correct that value in the node's file, or in its options",
        ) from exc
