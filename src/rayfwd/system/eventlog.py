"""Every event of the log, once: its name, its level and its fields.

What a logger takes is declared here, so that the type checker finds a misspelt name, a field too
many or one that is missing. A new event is a line here, the place that logs it, and its row in
docs/events.md, which a test holds to this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, get_overloads, get_type_hints, overload

from rayfwd.problems import EventName


class EventLog(Protocol):
    """Writes events; `system/logs.py` has the one that does.

    Besides these, a `Problem` is logged under its code's `event`, at the level of its severity.
    """

    @overload
    def debug(self, event: Literal["change_traced"], /, *, peer: str, what: str) -> None: ...
    @overload
    def debug(
        self,
        event: Literal["frame_traced"],
        /,
        *,
        peer: str,
        lane: int,
        lane_class: str,
        direction: str,
        kind: str,
        stream: int,
        offset: int,
        length: int,
    ) -> None: ...
    @overload
    def debug(self, event: Literal["ray_output"], /, *, line: str) -> None: ...
    def debug(self, event: str, /, **fields: object) -> None: ...

    @overload
    def info(self, event: Literal["advertise_checked"], /, *, address: str) -> None: ...
    @overload
    def info(
        self, event: Literal["config_reloaded"], /, *, file: str, changed: list[str]
    ) -> None: ...
    @overload
    def info(self, event: Literal["descriptors_there"], /) -> None: ...
    @overload
    def info(
        self,
        event: Literal["extra_lane_failed"],
        /,
        *,
        node: str,
        lane: str,
        code: str,
        cause: str,
    ) -> None: ...
    @overload
    def info(self, event: Literal["direct_asked"], /, *, node: str, version: str) -> None: ...
    @overload
    def info(self, event: Literal["fast_path_absent"], /, *, cause: str) -> None: ...
    @overload
    def info(
        self, event: Literal["handover_packed"], /, *, streams: int, listeners: int
    ) -> None: ...
    @overload
    def info(
        self, event: Literal["handover_taken"], /, *, streams: int, reset: int, seconds: float
    ) -> None: ...
    @overload
    def info(
        self, event: Literal["hub_asked"], /, *, node: str, uid: int, version: str
    ) -> None: ...
    @overload
    def info(self, event: Literal["hub_listening"], /, *, socket: str, nodes: int) -> None: ...
    @overload
    def info(
        self, event: Literal["keeper_child_ended"], /, *, pid: int, exit_code: int
    ) -> None: ...
    @overload
    def info(self, event: Literal["keeper_listening"], /, *, socket: str) -> None: ...
    @overload
    def info(self, event: Literal["keeper_spawned"], /, *, pid: int) -> None: ...
    @overload
    def info(self, event: Literal["keeper_stopping"], /, *, signal: str) -> None: ...
    @overload
    def info(self, event: Literal["lane_up"], /, *, lane: str, node: str = ...) -> None: ...
    @overload
    def info(self, event: Literal["link_awaited_at"], /, *, socket: str) -> None: ...
    @overload
    def info(
        self, event: Literal["link_resumed"], /, *, parked_seconds: float, node: str = ...
    ) -> None: ...
    @overload
    def info(self, event: Literal["listener_unblocked"], /, *, listen: str) -> None: ...
    @overload
    def info(self, event: Literal["listeners_open"], /, *, listeners: int, new: int) -> None: ...
    @overload
    def info(
        self, event: Literal["meeting_held"], /, *, place: str, socket: str, host_key: str | None
    ) -> None: ...
    @overload
    def info(self, event: Literal["metrics_listening"], /, *, listen: str) -> None: ...
    @overload
    def info(
        self, event: Literal["network_level"], /, *, level: str, cause: str, remedy: str = ...
    ) -> None: ...
    @overload
    def info(self, event: Literal["node_forgotten"], /, *, node: str) -> None: ...
    @overload
    def info(self, event: Literal["node_given_back"], /, *, node: str) -> None: ...
    @overload
    def info(
        self, event: Literal["node_joined"], /, *, node: str, address: str, ports: str
    ) -> None: ...
    @overload
    def info(self, event: Literal["node_key_renewed"], /, *, node: str) -> None: ...
    @overload
    def info(self, event: Literal["node_leaving"], /, *, node: str) -> None: ...
    @overload
    def info(self, event: Literal["overlay_down"], /, *, interface: str) -> None: ...
    @overload
    def info(self, event: Literal["overlay_handed_on"], /, *, interface: str) -> None: ...
    @overload
    def info(self, event: Literal["overlay_dials_unheard"], /, *, cause: str) -> None: ...
    @overload
    def info(self, event: Literal["overlay_keeper_listening"], /, *, socket: str) -> None: ...
    @overload
    def info(self, event: Literal["overlay_not_owned"], /, *, cause: str) -> None: ...
    @overload
    def info(
        self, event: Literal["overlay_taken_over"], /, *, interface: str, address: str
    ) -> None: ...
    @overload
    def info(self, event: Literal["overlay_up"], /, *, interface: str, address: str) -> None: ...
    @overload
    def info(self, event: Literal["page_listening"], /, *, url: str) -> None: ...
    @overload
    def info(
        self, event: Literal["plan_received"], /, *, address: str, ports: str, nodes: list[str]
    ) -> None: ...
    @overload
    def info(
        self,
        event: Literal["problem_over"],
        /,
        *,
        after_seconds: float,
        code: str,
        node: str,
        seen_by: str,
    ) -> None: ...
    @overload
    def info(
        self,
        event: Literal["ray_adopted"],
        /,
        *,
        pid: int,
        ours: bool,
        version: str = ...,
        session_dir: str | None = ...,
    ) -> None: ...
    @overload
    def info(self, event: Literal["ports_held"], /, *, held: int, new: int) -> None: ...
    @overload
    def info(self, event: Literal["ray_auth_settled"], /, *, mode: str) -> None: ...
    @overload
    def info(
        self, event: Literal["ray_left_running"], /, *, pid: int | None, ours: bool
    ) -> None: ...
    @overload
    def info(self, event: Literal["ray_output"], /, *, line: str) -> None: ...
    @overload
    def info(self, event: Literal["ray_process_killed"], /, *, pid: int, title: str) -> None: ...
    @overload
    def info(self, event: Literal["ray_remains_found"], /, *, pid: int) -> None: ...
    @overload
    def info(self, event: Literal["ray_restarting"], /, *, reason: str) -> None: ...
    @overload
    def info(self, event: Literal["ray_start_by_hand"], /, *, command: str) -> None: ...
    @overload
    def info(self, event: Literal["ray_started"], /, *, pid: int, seconds: float) -> None: ...
    @overload
    def info(
        self,
        event: Literal["ray_starting"],
        /,
        *,
        pid: int,
        version: str,
        python: str,
        command: str,
    ) -> None: ...
    @overload
    def info(
        self, event: Literal["ray_stopped"], /, *, pid: int, exit_code: int | None, killed: int
    ) -> None: ...
    @overload
    def info(self, event: Literal["ray_stopping"], /, *, pid: int, reason: str) -> None: ...
    @overload
    def info(
        self, event: Literal["ray_totals"], /, *, totals: Mapping[str, float], nodes_alive: int
    ) -> None: ...
    @overload
    def info(self, event: Literal["rayfwd_ready"], /, *, node: str, listeners: int) -> None: ...
    @overload
    def info(self, event: Literal["rayfwd_restarting"], /, *, signal: str) -> None: ...
    @overload
    def info(
        self, event: Literal["rayfwd_starting"], /, *, version: str, role: str, node: str
    ) -> None: ...
    @overload
    def info(self, event: Literal["rayfwd_stopped"], /, *, node: str) -> None: ...
    @overload
    def info(self, event: Literal["rayfwd_stopping"], /, *, signal: str) -> None: ...
    @overload
    def info(
        self, event: Literal["roster_changed"], /, *, node: str, address: str, ports: str
    ) -> None: ...
    @overload
    def info(self, event: Literal["roster_forgot"], /, *, node: str) -> None: ...
    @overload
    def info(self, event: Literal["session_ended"], /, *, cause: str, node: str = ...) -> None: ...
    @overload
    def info(
        self,
        event: Literal["session_started"],
        /,
        *,
        node: str = ...,
        head: str = ...,
        version: str = ...,
        hub_version: str = ...,
    ) -> None: ...
    @overload
    def info(self, event: Literal["worker_dialled"], /, *, worker: str) -> None: ...
    @overload
    def info(
        self,
        event: Literal["canary_back"],
        /,
        *,
        ok: bool,
        seconds: float,
        failed: list[str],
        cause: str | None,
    ) -> None: ...
    @overload
    def info(self, event: EventName, /, *, cause: str, **fields: object) -> None: ...
    def info(self, event: str, /, **fields: object) -> None: ...

    @overload
    def warning(
        self, event: Literal["advertise_not_checked"], /, *, cause: str, remedy: str
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["config_kept"], /, *, kept: list[str], remedy: str
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["connection_given_up"], /, *, node: str, held: int
    ) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["connection_refused"],
        /,
        *,
        user: str,
        listen: str,
        count: int,
        remedy: str,
    ) -> None: ...
    @overload
    def warning(self, event: Literal["control_not_permitted"], /, *, uid: int) -> None: ...
    @overload
    def warning(
        self, event: Literal["dial_lost"], /, *, worker: str, connection: int, cause: str
    ) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["dial_refused"],
        /,
        *,
        side: str,
        node: str,
        port: int,
        count: int,
        cause: str,
        remedy: str,
    ) -> None: ...
    @overload
    def warning(self, event: Literal["hub_crowded"], /, *, user: str, silent: int) -> None: ...
    @overload
    def warning(
        self, event: Literal["hub_lanes_shed"], /, *, user: str, node: str, lanes: int
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["known_hosts_damaged"], /, *, path: str, line: int
    ) -> None: ...
    @overload
    def warning(self, event: Literal["direct_refused"], /, *, node: str, code: str) -> None: ...
    @overload
    def warning(self, event: Literal["direct_stranger"], /, *, uid: int) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["lane_lost"],
        /,
        *,
        lane: str,
        cause: str,
        node: str = ...,
        up_seconds: float | None = ...,
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["lane_refused"], /, *, node: str, uid: int, code: str, cause: str
    ) -> None: ...
    @overload
    def warning(self, event: Literal["linger_off"], /, *, cause: str, remedy: str) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["link_parked"],
        /,
        *,
        streams: int,
        ride_through: float,
        node: str = ...,
    ) -> None: ...
    @overload
    def warning(self, event: Literal["link_stranger"], /, *, uid: int) -> None: ...
    @overload
    def warning(self, event: Literal["listeners_not_held"], /, *, cause: str) -> None: ...
    @overload
    def warning(self, event: Literal["login_slow"], /, *, hop: str, seconds: float) -> None: ...
    @overload
    def warning(self, event: Literal["meeting_lost"], /, *, place: str) -> None: ...
    @overload
    def warning(self, event: Literal["message_cut"], /, *, type: str, left_out: str) -> None: ...
    @overload
    def warning(
        self, event: Literal["message_malformed"], /, *, cause: str, node: str = ...
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["network_shared"], /, *, network: str, theirs: str, who: str
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["node_yielded"], /, *, node: str, user: str, key: str
    ) -> None: ...
    @overload
    def warning(self, event: Literal["open_ports_many"], /, *, ports: int, most: int) -> None: ...
    @overload
    def warning(self, event: Literal["overlay_child_failed"], /, *, cause: str) -> None: ...
    @overload
    def warning(self, event: Literal["overlay_left"], /, *, cause: str, remedy: str) -> None: ...
    @overload
    def warning(self, event: Literal["overlay_not_restored"], /, *, cause: str) -> None: ...
    @overload
    def warning(self, event: Literal["overlay_restored"], /, *, interface: str) -> None: ...
    @overload
    def warning(self, event: Literal["overlay_unwatched"], /, *, cause: str) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["overlay_users_left_out"],
        /,
        *,
        users: list[str],
        cause: str,
        remedy: str,
    ) -> None: ...
    @overload
    def warning(self, event: Literal["plan_not_kept"], /, *, cause: str) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["ray_exited"],
        /,
        *,
        pid: int,
        dead: list[str],
        exit_code: int | None = ...,
    ) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["ray_token_turned"],
        /,
        *,
        forgotten: str,
        restarted: Sequence[str],
        away: Sequence[str],
        by_hand: Sequence[str],
    ) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["ride_through_differs"],
        /,
        *,
        node: str,
        own: float,
        theirs: float,
        used: float,
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["roster_moved"], /, *, nodes: list[str], cause: str
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["secret_not_written"], /, *, file: str, cause: str
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["session_ended"], /, *, cause: str, node: str = ...
    ) -> None: ...
    @overload
    def warning(self, event: Literal["session_full"], /, *, streams: int) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["stop_cut_short"],
        /,
        *,
        seconds: float,
        step: str,
        steps: dict[str, float],
        killed: int,
    ) -> None: ...
    @overload
    def warning(
        self, event: Literal["stop_or_restart_unknown"], /, *, cause: str, remedy: str
    ) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["streams_shed"],
        /,
        *,
        node: str,
        user: str,
        streams: int,
        bytes: int,
        most: int,
    ) -> None: ...
    @overload
    def warning(
        self,
        event: Literal["canary_back"],
        /,
        *,
        ok: bool,
        seconds: float,
        failed: list[str],
        cause: str | None,
    ) -> None: ...
    @overload
    def warning(self, event: EventName, /, *, cause: str, **fields: object) -> None: ...
    def warning(self, event: str, /, **fields: object) -> None: ...

    @overload
    def error(
        self, event: Literal["config_refused"], /, *, file: str, mistake: str, remedy: str
    ) -> None: ...
    @overload
    def error(self, event: Literal["control_fault"], /, *, exc_info: bool) -> None: ...
    @overload
    def error(self, event: Literal["dial_failed"], /, *, target: str, cause: str) -> None: ...
    @overload
    def error(self, event: Literal["handover_failed"], /, *, cause: str, remedy: str) -> None: ...
    @overload
    def error(self, event: Literal["handover_refused"], /, *, cause: str, remedy: str) -> None: ...
    @overload
    def error(self, event: Literal["loop_stuck"], /, *, loop: str, late_seconds: float) -> None: ...
    @overload
    def error(
        self, event: Literal["message_too_long"], /, *, type: str, bytes: int, most: int
    ) -> None: ...
    @overload
    def error(self, event: Literal["metrics_fault"], /, *, exc_info: bool) -> None: ...
    @overload
    def error(self, event: Literal["not_ready_in_time"], /, *, option: str, cause: str) -> None: ...
    @overload
    def error(self, event: Literal["page_fault"], /, *, exc_info: bool) -> None: ...
    @overload
    def error(self, event: Literal["plan_malformed"], /, *, cause: str, remedy: str) -> None: ...
    @overload
    def error(self, event: Literal["rayfwd_fault"], /, *, exc_info: bool) -> None: ...
    @overload
    def error(
        self,
        event: Literal["roster_damaged"],
        /,
        *,
        file: str,
        damage: str,
        kept: list[str],
        aside: str,
        remedy: str,
    ) -> None: ...
    @overload
    def error(
        self, event: Literal["roster_dropped"], /, *, nodes: list[str], cause: str, remedy: str
    ) -> None: ...
    @overload
    def error(self, event: Literal["session_broken"], /, *, code: str, cause: str) -> None: ...
    @overload
    def error(
        self, event: Literal["watcher_fault"], /, *, watcher: str, again_in: float, exc_info: bool
    ) -> None: ...
    @overload
    def error(self, event: EventName, /, *, cause: str, **fields: object) -> None: ...
    def error(self, event: str, /, **fields: object) -> None: ...


@dataclass(slots=True)
class Event:
    """What is declared of one name."""

    levels: set[str]
    fields: set[str]


def declared() -> dict[str, Event]:
    """All of them by name, those that are named by a code left out."""
    found: dict[str, Event] = {}
    for level in ("debug", "info", "warning", "error"):
        for one in get_overloads(getattr(EventLog, level)):
            kind = get_type_hints(one)["event"]
            for name in get_args(kind):
                event = found.setdefault(name, Event(set(), set()))
                event.levels.add(level)
                event.fields.update(_keywords(one))
    return found


def _keywords(method: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(method).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
