"""Conditions: what every code means for a cluster, how long it must last, and what explains it.

Pure: time is passed in. `step` follows what a watcher finds over time, `explain` finds the roots;
`board.py` keeps, logs and times them. docs/conditions.md has a section for every code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rayfwd.problems import Problem

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first. An error: something that was to work does not. A warning: it works, and may soon
not. A note: it passes by itself, or is as somebody wanted it."""

LINGER = 30.0
"""Seconds after a root is over in which what it explained is still its doing: watchers look every
so often, and Ray takes a while to come back."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a code."""

    severity: Severity
    hold: float = 0.0
    """Seconds that it must last before it shows."""
    looks: int = 1
    """How often in a row its watcher must have found it before it shows."""
    explained_by: frozenset[str] = frozenset()
    """Codes that explain it where the same node has them, or the head."""
    counted: bool = True
    """Listed in the status and counted in the metrics; False: only ever an answer to a command or
    to another node, or what ends the daemon."""


def _kinds(
    severity: Severity,
    codes: str,
    hold: float = 0.0,
    looks: int = 1,
    by: Iterable[str] = (),
    counted: bool = True,
) -> dict[str, Kind]:
    kind = Kind(severity, hold, looks, frozenset(by), counted)
    return dict.fromkeys(codes.split(), kind)


_LINK_WORDS = (
    "ssh_auth_refused ssh_config_invalid ssh_failed ssh_file_unreadable ssh_key_unusable "
    "ssh_unreachable ssh_turned_away host_key_mismatch host_key_unknown channel_refused "
    "hub_absent hub_not_permitted hub_unreachable hub_silent hub_closed "
    "user_not_allowed name_taken name_in_use address_taken plan_full join_bad roster_unwritable "
    "client_only protocol_version handshake_expected frame_unknown frame_too_long hello_malformed "
    "welcome_malformed refusal_malformed"
)
_ADVERTISE = (
    "advertise_dropped advertise_refused advertise_unroutable advertise_wrong_machine "
    "advertise_self_unreachable"
)
_RAY_WORDS = (
    "ray_not_found ray_not_usable ray_version_unsupported ray_version_differs "
    "python_version_differs ray_auth_differs ray_auth_unsupported ray_auth_unwritable port_in_use "
    "keeper_absent keeper_silent"
)
LINK_CODES = frozenset({*_LINK_WORDS.split(), "ssh_lost", "lane_lost", "link_parked", "link_down"})
RAY_CODES = frozenset(
    {*_RAY_WORDS.split(), *_ADVERTISE.split(), "ray_died", "ray_start_failed", "ray_token_missing"}
    | {"ray_token_wrong"}
)
"""What keeps a node's Ray from running."""
_BELOW = LINK_CODES | RAY_CODES
_PORTS = frozenset({"ray_port_unreachable", "ray_worker_ports_exhausted"})

CATALOGUE: Mapping[str, Kind] = {
    # The link, as the worker has it, and as the head has it.
    **_kinds("error", _LINK_WORDS),
    **_kinds("warning", "ssh_lost lane_lost", hold=3.0),
    **_kinds("note", "link_parked", by=LINK_CODES - {"link_parked", "link_down"}),
    **_kinds("error", "link_down"),
    **_kinds("warning", "lane_flapping link_slow", by=LINK_CODES),
    **_kinds("warning", "clients_full"),
    **_kinds("warning", "link_throughput_low", by=LINK_CODES | {"link_slow"}),
    # This machine.
    **_kinds("error", "listener_blocked metrics_blocked"),
    **_kinds("warning", "descriptors_low"),
    **_kinds("error", "descriptors_exhausted", by=["descriptors_low"]),
    **_kinds("warning", "disk_nearly_full"),
    **_kinds("note", "forward_target_unknown"),
    # Ray on a node.
    **_kinds("error", _RAY_WORDS),
    **_kinds("error", _ADVERTISE),
    **_kinds("error", "advertise_unchecked", by=LINK_CODES),
    **_kinds("error", "ray_start_failed", by=LINK_CODES | {"ray_died", "disk_nearly_full"}),
    **_kinds("error", "ray_died", by=LINK_CODES | {"ray_died"}),
    **_kinds("error", "ray_token_missing ray_token_wrong"),
    **_kinds("warning", "ray_token_file_differs ray_token_file_unwritable"),
    **_kinds("error", "ray_worker_ports_exhausted"),
    # The cluster.
    **_kinds("error", "ray_dashboard_absent", looks=2, by=_BELOW),
    **_kinds(
        "warning",
        "ray_nodes_failed ray_status_failed",
        looks=2,
        by=_BELOW | {"ray_dashboard_absent"},
    ),
    **_kinds("error", "ray_totals_stale", looks=2, by=RAY_CODES),
    **_kinds("error", "ray_not_listed", hold=15.0, looks=2, by=_BELOW | {"ray_address_twice"}),
    **_kinds("error", "ray_address_twice", looks=2, by=_BELOW),
    **_kinds("error", "ray_resources_fewer ray_resources_none", looks=2, by=_BELOW),
    **_kinds(
        "error",
        "ray_node_without_resources",
        hold=10.0,
        looks=2,
        by=_BELOW | {"ray_totals_stale", "ray_resources_fewer", "ray_resources_none"},
    ),
    **_kinds("error", "ray_node_flapping", by=_BELOW | _PORTS),
    **_kinds("error", "ray_port_unreachable", by=_BELOW),
    **_kinds("error", "canary_no_task canary_no_objects", by=_BELOW | _PORTS),
    **_kinds("warning", "canary_failed", by=_BELOW | _PORTS),
    # What a node waits for as it begins.
    **_kinds("note", "hub_starting link_starting ray_starting", by=LINK_CODES),
    # What ends the daemon, or answers a command or another node.
    **_kinds(
        "error",
        "already_running directory_unusable node_key_unusable user_unknown roster_newer "
        "roster_unreadable socket_in_use socket_not_possible socket_path_too_long",
        counted=False,
    ),
    **_kinds(
        "error",
        "canary_lost condition_unknown control_bad_request control_busy control_fault control_slow "
        "daemon_not_answering daemon_not_permitted daemon_not_running hello_missing not_a_head "
        "ray_not_up",
        counted=False,
    ),
    # What the hub tells of a session that is past, after which the worker begins another.
    **_kinds("note", "session_stale session_unknown", counted=False),
    # Of `rayfwd connect`.
    **_kinds("error", "hub_too_old listen_taken", counted=False),
    # Of `rayfwd doctor`.
    **_kinds(
        "error",
        "check_busy check_long check_malformed config_doubtful config_invalid clock_offset "
        "hub_older link_poor login_slow names_slow plan_malformed processes_low proxy_catches "
        "rayfwd_version_differs report_unwritable sshd_absent sshd_forbids",
        counted=False,
    ),
    # Of `rayfwd init` and `rayfwd uninstall`.
    **_kinds(
        "error",
        "manifest_unusable rayfwd_not_executable setup_blocked setup_command_failed setup_failed "
        "uninstall_failed",
        counted=False,
    ),
}
"""Every code. What another version has besides is taken for an error that shows at once."""

UNKNOWN = Kind("error")


def kind_of(code: str) -> Kind:
    return CATALOGUE.get(code, UNKNOWN)


def node_of(subject: str) -> str:
    """The node of a subject: `NODE`, or `NODE/THING` for a lane or a forward of it."""
    return subject.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Seen:
    """Something wrong, as a watcher found it."""

    subject: str
    """`NODE`, or `NODE/THING`."""
    problem: Problem
    seen_by: str = ""
    """The node that found it; empty: this one."""
    severity: Severity | None = None
    """Where it is another than its code's."""
    explains: bool = True
    """False: it is no root of others (another machine that takes a node's name, say)."""
    confirmed: bool = False
    """It has lasted as long as its code asks for: another node's board shows it."""

    @property
    def key(self) -> Key:
        return (self.problem.code, self.subject, self.seen_by)


Key = tuple[str, str, str]
"""Code, subject, and who found it."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Something wrong, as it is shown. `since` is in seconds since the epoch."""

    code: str
    severity: Severity
    subject: str
    since: float
    cause: str
    remedy: str
    seen_by: str
    explained_by: tuple[str, str] | None = None
    """Code and subject of its root; None: it is one itself."""

    def to_wire(self) -> dict[str, Any]:
        root = self.explained_by
        return {
            "code": self.code,
            "severity": self.severity,
            "subject": self.subject,
            "since": round(self.since, 1),
            "cause": self.cause,
            "remedy": self.remedy,
            "seen_by": self.seen_by,
            "explained_by": None if root is None else {"code": root[0], "subject": root[1]},
        }


@dataclass(frozen=True, slots=True)
class Tracked:
    """What a watcher finds, as it is followed. Times but `since` are on the clock of `step`."""

    seen: Seen
    first: float
    since: float
    """Seconds since the epoch, of the first look that showed it."""
    looks: int = 1
    shown: bool = False
    root: tuple[str, str] | None = None
    root_over: float | None = None
    """When `root` was found to have ended; None: it has not."""

    @property
    def severity(self) -> Severity:
        return self.seen.severity or kind_of(self.seen.problem.code).severity

    @property
    def due(self) -> float | None:
        """When it is to show, if it lasts; None: it shows, or must be found again first."""
        if self.seen.confirmed and not self.shown:
            return self.first
        kind = kind_of(self.seen.problem.code)
        return None if self.shown or self.looks < kind.looks else self.first + kind.hold

    def condition(self, own: str) -> Condition:
        problem = self.seen.problem
        return Condition(
            problem.code,
            self.severity,
            self.seen.subject,
            self.since,
            problem.cause,
            problem.remedy,
            self.seen.seen_by or own,
            self.root,
        )


def step(
    before: Mapping[Key, Tracked], found: Iterable[Seen], now: float, wall: float
) -> dict[Key, Tracked]:
    """Follow what one watcher finds through one more look; what it no longer finds is left out."""
    after: dict[Key, Tracked] = {}
    for seen in found:
        old = before.get(seen.key)
        if old is None:
            after[seen.key] = Tracked(seen, now, wall)
        else:
            after[seen.key] = replace(old, seen=seen, looks=old.looks + 1)
    return after


def show(tracked: Mapping[Key, Tracked], now: float) -> dict[Key, Tracked]:
    """Those that have lasted long enough show from now on."""
    return {
        key: replace(t, shown=True) if t.due is not None and now >= t.due else t
        for key, t in tracked.items()
    }


def explain(tracked: Mapping[Key, Tracked], head: str, now: float) -> dict[Key, Tracked]:
    """Find the root of each, as far as another that is there explains it.

    A root is of the same node, or the head's. Nobody's word on another node explains anything.
    """
    there: dict[tuple[str, str], Tracked] = {}
    for t in sorted(tracked.values(), key=_rank, reverse=True):
        if t.seen.explains and _speaks_for_itself(t.seen, head):
            there[t.seen.problem.code, node_of(t.seen.subject)] = t

    def root_of(one: Tracked, above: frozenset[Key]) -> Tracked | None:
        code, node = one.seen.problem.code, node_of(one.seen.subject)
        causes = [
            other
            for by in kind_of(code).explained_by
            # Of the same code only the head's explains another node's.
            for of in ({head} - {node} if by == code else {node, head})
            if (other := there.get((by, of))) is not None and other.seen.key not in above
        ]
        if not causes:
            return None
        first = min(causes, key=_rank)
        return root_of(first, above | {first.seen.key}) or first

    after: dict[Key, Tracked] = {}
    for key, one in tracked.items():
        root = root_of(one, frozenset({key}))
        if root is not None:
            told = (root.seen.problem.code, root.seen.subject)
            after[key] = replace(one, root=told, root_over=None)
        elif one.root is None:
            after[key] = one
        elif one.root_over is None:
            after[key] = replace(one, root_over=now)
        elif now - one.root_over >= LINGER:
            after[key] = replace(one, root=None, root_over=None)
        else:
            after[key] = one
    return after


def _rank(one: Tracked) -> tuple[int, float, Key]:
    """The worst first, of these the oldest."""
    return SEVERITIES.index(one.severity), one.first, one.seen.key


def _speaks_for_itself(seen: Seen, head: str) -> bool:
    return seen.seen_by in {"", head, node_of(seen.subject)}


def worst(conditions: Sequence[Condition]) -> Condition | None:
    """The worst root; of several the oldest."""
    roots = [c for c in conditions if c.explained_by is None]
    return min(roots, key=lambda c: (SEVERITIES.index(c.severity), c.since), default=None)


MOST_TOLD = 50
"""Conditions that another node is told of."""
LONGEST = 2000
"""Characters of a text in what is told."""


def message(conditions: Iterable[Condition]) -> dict[str, Any]:
    """What one node tells another of, as a control message; the worst of what is too much."""
    told = sorted(conditions, key=lambda c: (SEVERITIES.index(c.severity), c.since))[:MOST_TOLD]
    keys = ("code", "severity", "subject", "cause", "remedy", "seen_by")
    return {
        "type": "conditions",
        "conditions": [
            {key: value[:LONGEST] for key, value in c.to_wire().items() if key in keys}
            for c in told
        ],
    }


def from_message(message: Mapping[str, Any], seen_by: str | None) -> list[Seen]:
    """What another node told of; `seen_by` where it may speak for itself alone.

    Of what is its root the node here judges by itself. Raises ValueError.
    """
    try:
        return [
            Seen(
                _text(row["subject"], 200),
                Problem(_code(row["code"]), _text(row["cause"]), _text(row["remedy"])),
                seen_by or _text(row["seen_by"], 200),
                row["severity"] if row["severity"] in SEVERITIES else None,
                confirmed=True,
            )
            for row in list(message["conditions"])[:MOST_TOLD]
        ]
    except (KeyError, TypeError) as exc:
        raise ValueError(f"conditions: {exc!r}") from exc


def _code(value: Any) -> str:
    text = _text(value, 64)
    if not text.isidentifier():
        raise ValueError(f"conditions: {text!r} is no code")
    return text


def _text(value: Any, most: int = LONGEST) -> str:
    if not isinstance(value, str):
        raise ValueError("conditions: a text is none")
    return value[:most]
