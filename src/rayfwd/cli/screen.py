"""A status as a person reads it: what is wrong and what to do first, then how everything stands.

Made of a status alone; what fits beside each other is decided by the width that there is. Names and
causes come from other machines: nothing in them may act on the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from rayfwd import codes
from rayfwd.network.own_name import GLOO_NEEDS
from rayfwd.ray.nodes import NodeSeen
from rayfwd.status import (
    Cut,
    Direct,
    Link,
    ListenerCount,
    PortCount,
    RosterRow,
    Status,
    Volume,
    Worker,
)
from rayfwd.system.logs import escaped
from rayfwd.watch.conditions import Condition

MOST_SYMPTOMS = 5
"""Symptoms that are named below their root."""

MOST_PORTS = 5
"""Ports of a kind that are named."""

WIDE_COLUMNS = 110
"""Columns from which on tables have what is nice to know, too."""

_STYLES = {
    "ready": "bold green",
    "up": "green",
    "alive": "green",
    "starting": "yellow",
    "waiting": "bold yellow",
    "parked": "bold yellow",
    "sidelined": "yellow",
    "stopping": "yellow",
    "warning": "bold yellow",
    "note": "bold",
    "down": "bold red",
    "dead": "bold red",
    "failed": "bold red",
    "not listed": "bold red",
    "error": "bold red",
}
_DIM = "dim"


@dataclass(frozen=True, slots=True)
class Screen:
    """A status at a time, for rich to print; `now` in Unix seconds."""

    status: Status
    now: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= WIDE_COLUMNS
        yield self._headline()
        yield from self._conditions()
        yield Text()
        yield self._facts()
        yield from self._workers(wide)
        yield from self._clients()
        yield from self._nodes(wide)

    # -- the parts, from above ------------------------------------------------------------------

    def _headline(self) -> Text:
        status = self.status
        who = f"{escaped(status.role)} {escaped(status.name)}"
        if status.node is not None:
            who += f" at {escaped(status.node.address)}"
        parts = [who, f"up {duration(status.uptime)}"]
        code = "" if status.code is None else f" ({escaped(status.code)})"
        parts += [f"rayfwd {escaped(status.version)}{code}", f"pid {status.pid}"]
        return _joined("  ", [_state(status.state, status.state.upper()), Text(", ".join(parts))])

    def _conditions(self) -> Iterable[RenderableType]:
        """What the node waits for, then all else; below a root what it explains."""
        conditions = {c.id: c for c in self.status.conditions}
        explained: dict[str, list[Condition]] = {}
        for each in self.status.conditions:
            root = conditions.get(each.explained_by or "")
            # What the node waits for is shown whole, unless its root says as much.
            if root is not None and root.blocks_ready >= each.blocks_ready:
                explained.setdefault(root.id, []).append(each)
        below = {each.id for symptoms in explained.values() for each in symptoms}
        shown = [each for each in self.status.conditions if each.id not in below]
        for each in sorted(shown, key=lambda c: not c.blocks_ready):
            yield Text()
            yield self._condition(each, explained.get(each.id, ()))

    def _condition(self, condition: Condition, more: Sequence[Condition]) -> RenderableType:
        """`more` are those that it explains."""
        title = Text.assemble((escaped(condition.code.name), "bold"))
        title.append(f"  {escaped(condition.subject)}")
        title.append(f"  for {self._age(condition.since)}", _DIM)
        body = Table.grid(padding=(0, 2))
        body.add_column(no_wrap=True)
        body.add_column(overflow="fold")
        body.add_row(_state("waiting" if condition.blocks_ready else condition.severity), title)
        body.add_row("", Text(escaped(condition.problem.cause)))
        body.add_row(Text("do", "bold", justify="right"), Text(escaped(condition.problem.remedy)))
        if more:
            names = [escaped(f"{c.code} {c.subject}") for c in more]
            rest = f" and {len(names) - MOST_SYMPTOMS} more" if len(names) > MOST_SYMPTOMS else ""
            body.add_row("", Text(f"explains {', '.join(names[:MOST_SYMPTOMS])}{rest}", _DIM))
        return body

    def _facts(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="bold", min_width=8)
        grid.add_column(overflow="fold")
        for title, lines in (
            ("link", self._link()),
            ("direct", self._direct()),
            ("ray", self._ray()),
            ("streams", self._streams()),
            ("listeners", self._listeners()),
            ("network", self._network()),
            ("page", self._page()),
            ("cluster", self._cluster()),
        ):
            for index, line in enumerate(lines):
                grid.add_row("" if index else title, line)
        return grid

    def _link(self) -> list[RenderableType]:
        link = self.status.link
        if link is None:
            return []
        words = Text(f"for {self._age(link.since)} to {escaped(link.head)}")
        lines: list[RenderableType] = [_joined(" ", [_state(link.state), words]), self._cuts(link)]
        rows = [
            (
                Text(escaped(lane.lane_class)),
                _state(lane.state),
                Text(_milliseconds(lane.rtt_ms)),
                Text(size(lane.bytes_in)),
                Text(size(lane.bytes_out)),
                Text(self._age(lane.since)),
            )
            for lane in sorted(link.lanes, key=lambda lane: lane.lane_class != "interactive")
        ]
        if rows:
            columns = ("lane", "state", ">round trip", ">in", ">out", "up for")
            lines.append(_table(columns, rows))
        return lines

    def _direct(self) -> list[RenderableType]:
        """A line for each other worker to which there is a way, or is to be one."""
        return [self._direct_line(way) for way in self.status.direct]

    def _direct_line(self, way: Direct) -> Text:
        stands = way.way == "direct"
        line = _joined(
            " ",
            [
                Text(f"{escaped(way.node)}:", ""),
                _state("up" if stands else "sidelined", "direct" if stands else "by the head"),
            ],
        )
        if way.rtt_ms is not None:
            line.append(f", {_milliseconds(way.rtt_ms)}")
        if stands:
            lanes = sum(lane.lane_class != "reserve" for lane in way.lanes)
            line.append(f", {lanes} {'lane' if lanes == 1 else 'lanes'}")
        line.append(f"; {size(way.bytes.received)} in, {size(way.bytes.sent)} out")
        if way.cuts:
            line.append(f"; cut {_times(way.cuts)}")
        if way.why is not None:
            line.append(f"; {escaped(way.why)}")
        return line

    def _cuts(self, link: Link) -> Text:
        if not link.cuts:
            return Text("never cut")
        text = Text(f"cut {_times(link.cuts)}")
        lasts = link.last_cut is not None and link.last_cut.seconds is None
        if link.cuts > lasts:
            text.append(f", ridden through {_times(link.ridden_through)}")
        if last := self._last_cut(link.last_cut, long=True):
            text.append(f"; {'last ' if link.cuts > 1 else ''}{last}")
        return text

    def _last_cut(self, cut: Cut | None, long: bool) -> str:
        if cut is None:
            return ""
        began = self._age(cut.began)
        if cut.seconds is None:
            return f"{began} ago, still down" if long else "lasts"
        if not long:
            return f"{began} ago"
        lost = "" if cut.ridden_through else ", given up"
        return f"{began} ago, for {_seconds(cut.seconds)}{lost}"

    def _ray(self) -> list[RenderableType]:
        ray = self.status.ray
        parts = []
        if ray.version is not None:
            parts.append(f"Ray {escaped(ray.version)}")
        if ray.python is not None:
            parts.append(f"Python {escaped(ray.python)}")
        if ray.pid is not None:
            parts.append(f"pid {ray.pid}" + " (adopted)" * ray.adopted)
        if ray.restarts:
            parts.append(f"{ray.restarts} {'restart' if ray.restarts == 1 else 'restarts'}")
        since = Text(f"for {self._age(ray.since)}")
        line = _joined(" ", [_state(ray.state.replace("_", " ")), since])
        if parts:
            line.append(f"; {', '.join(parts)}")
        return [line]

    def _streams(self) -> list[RenderableType]:
        streams, volume = self.status.streams, self.status.bytes
        line = Text(f"{streams.open} open, ")
        line.append(f"{streams.parked} parked", _STYLES["parked"] if streams.parked else "")
        return [line.append(f"; {size(volume.received)} in, {size(volume.sent)} out")]

    def _listeners(self) -> list[RenderableType]:
        listeners = self.status.listeners
        line = Text(f"{listeners.open} open")
        if listeners.blocked:
            line.append(f", {listeners.blocked} blocked", _STYLES["error"])
        return [line]

    def _network(self) -> list[RenderableType]:
        """The level and why, in a line."""
        network = self.status.network
        line = Text(escaped(network.level))
        if network.interface is not None:
            line.append(f" by {escaped(network.interface)}")
        lines: list[RenderableType] = [line.append(f": {escaped(network.why)}" * bool(network.why))]
        if network.remedy is not None:
            lines.append(Text(f"to get the overlay: {escaped(network.remedy)}"))
        if network.hosts_line is not None:
            lines.append(Text(f"{GLOO_NEEDS}: {escaped(network.hosts_line)}"))
        if network.level == "overlay" and not network.guard and self.status.node is not None:
            lines.append(Text("other machines reach Ray's ports here (network.guard)"))
        elif network.guard_from:
            lines.append(Text(f"Ray's ports are open to {', '.join(network.guard_from[:9])}"))
        for rows, words in (
            (network.dialled, "reached, besides the plan's ports"),
            (network.refused_there, "refused there"),
            (network.refused_here, "refused here"),
        ):
            if rows:
                shown = ", ".join(_place(row) for row in rows[:MOST_PORTS])
                more = f" and {len(rows) - MOST_PORTS} more" * (len(rows) > MOST_PORTS)
                lines.append(Text(f"{words}: {shown}{more}"))
        return lines

    def _page(self) -> list[RenderableType]:
        return [] if self.status.page is None else [Text(escaped(self.status.page))]

    def _cluster(self) -> list[RenderableType]:
        cluster = self.status.cluster
        if cluster is None:
            return []
        alive = sum(node.state == "ALIVE" for node in cluster.nodes)
        first = f"Ray has {alive} {'node' if alive == 1 else 'nodes'} alive"
        if cluster.as_of is not None:
            first += f", as of {self._age(cluster.as_of)} ago"
        totals = [
            f"{_label(name)} {_quantity(name, used)} of {_quantity(name, total)}"
            for name, (used, total) in cluster.totals.items()
        ]
        return [Text(first), *([Text(f"in use: {', '.join(totals)}")] if totals else [])]

    def _workers(self, wide: bool) -> Iterable[RenderableType]:
        """Of a head: its workers' links, a row each."""
        if not self.status.workers:
            return
        columns = ["link", "state", "for", ">lanes", ">round trip", ">cuts", ">ridden", "last cut"]
        if wide:
            columns += [">streams", ">in", ">out"]
        yield Text()
        yield _table(columns, [self._worker(worker, wide) for worker in self.status.workers])

    def _worker(self, worker: Worker, wide: bool) -> list[Text]:
        trips = [lane.rtt_ms for lane in worker.lanes if lane.rtt_ms is not None]
        sidelined = sum(lane.state != "up" for lane in worker.lanes)
        count = f"{len(worker.lanes)}" + (f", {sidelined} sidelined" if sidelined else "")
        row = [
            Text(escaped(worker.name)),
            _state("left" if worker.left and worker.state == "down" else worker.state),
            Text(self._age(worker.since)),
            Text(count, _STYLES["sidelined"] if sidelined else ""),
            Text(_milliseconds(min(trips, default=None))),
            Text(str(worker.cuts)),
            Text(str(worker.ridden_through)),
            Text(self._last_cut(worker.last_cut, long=wide) or "-"),
        ]
        if wide:
            row += [Text(str(worker.streams.open)), *_volume(worker.bytes)]
        return row

    def _clients(self) -> Iterable[RenderableType]:
        """Of a head: who is connected and is no node."""
        if not self.status.clients:
            return
        columns = ["client", "as", "state", "for", ">lanes", ">cuts", ">streams", ">in", ">out"]
        rows = [
            [
                Text(escaped(client.name)),
                Text(escaped(client.user)),
                _state(client.state),
                Text(self._age(client.since)),
                Text(str(len(client.lanes))),
                Text(str(client.cuts)),
                Text(str(client.streams.open)),
                *_volume(client.bytes),
            ]
            for client in self.status.clients
        ]
        yield Text()
        yield _table(columns, rows)

    def _nodes(self, wide: bool) -> Iterable[RenderableType]:
        """The plan's nodes, and those that Ray has besides."""
        columns = ["node", "address", "Ray", "brings", ">listeners"]
        if wide:
            columns[2:2] = ["role", "ports"]
        seen = self._seen_by_address()
        rows = [self._node(node, seen.pop(node.address, None), wide) for node in self.status.roster]
        between = [Text("-"), Text("-")] if wide else []
        rows += [
            [
                Text("(not rayfwd's)", _DIM),
                Text(escaped(there.address)),
                *between,
                _state("alive"),
                Text(_brings(there.resources_total, wide)),
                Text("-"),
            ]
            for there in seen.values()
            if there.state == "ALIVE"
        ]
        if rows:
            yield Text()
            yield _table(columns, rows)

    def _node(self, node: RosterRow, there: NodeSeen | None, wide: bool) -> list[Text]:
        row = [
            Text(escaped(node.name) + " (this)" * (node.name == self.status.name)),
            Text(escaped(node.address) + " (direct)" * node.advertised),
            _state(self._ray_of(node, there)),
            Text(_brings(there.resources_total if there else {}, wide)),
            _listeners_of(node.listeners),
        ]
        if wide:
            row[2:2] = [Text(escaped(node.role)), Text(escaped(node.ports))]
        return row

    # -- what is looked up ----------------------------------------------------------------------

    def _seen_by_address(self) -> dict[str, NodeSeen]:
        """Ray's node table, the living before the dead at the same address."""
        out: dict[str, NodeSeen] = {}
        for node in self.status.cluster.nodes if self.status.cluster else ():
            if node.address not in out or node.state == "ALIVE":
                out[node.address] = node
        return out

    def _ray_of(self, node: RosterRow, there: NodeSeen | None) -> str:
        """A node's Ray in a word: what the node itself says of it, and what Ray's table says."""
        if there is not None and there.state == "ALIVE":
            return "alive"
        workers = {worker.name: worker for worker in self.status.workers or ()}
        state = None
        if node.name == self.status.name:
            state = self.status.ray.state
        elif node.name in workers and (ray := workers[node.name].ray) is not None:
            state = ray.state
        if state is not None and state != "up":
            return state.replace("_", " ")
        if there is not None:
            return there.state.lower()
        if state == "up":
            return "not listed" if self._is_missed(node) else "up"
        return "-"

    def _is_missed(self, node: RosterRow) -> bool:
        """Whether Ray's table has lacked it for longer than a look at the table takes."""
        return any(
            each.code is codes.RAY_NOT_LISTED and each.subject == node.name
            for each in self.status.conditions
        )

    def _age(self, since: float) -> str:
        """How long ago `since` was."""
        return duration(self.now - since)


# -- words and numbers -----------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """`3 s`, `12 min`, `5 h 10 min`, `3 d 4 h`."""
    whole = max(0, int(seconds)) if math.isfinite(seconds) else 0
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def size(amount: float) -> str:
    """Bytes in units of 1000: `999 B`, `1.2 kB`, `3.4 GB`."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(amount) < 999.95 or unit == "PB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else duration(value)


def _times(count: int) -> str:
    return "never" if not count else "once" if count == 1 else f"{count} times"


def _quantity(resource: str, amount: float) -> str:
    return size(amount) if "memory" in resource else f"{amount:.2f}".rstrip("0").rstrip(".")


def _label(resource: str) -> str:
    return escaped(resource).replace("_", " ") if "memory" in resource else escaped(resource)


def _brings(resources: Mapping[str, float], memory: bool) -> str:
    """`CPU 8, GPU 1, memory 12.0 GB`; what Ray adds of its own for every node is left out."""
    own = {
        name: amount
        for name, amount in resources.items()
        if not name.startswith("node:") and (memory or "memory" not in name)
    }
    names = sorted(own, key=lambda name: ("memory" in name, name not in {"CPU", "GPU"}, name))
    return ", ".join(f"{_label(name)} {_quantity(name, own[name])}" for name in names) or "-"


def _listeners_of(listeners: ListenerCount) -> Text:
    if not listeners.open and not listeners.blocked:
        return Text("-")
    text = Text(str(listeners.open))
    if listeners.blocked:
        text.append(f", {listeners.blocked} blocked", _STYLES["error"])
    return text


def _place(row: PortCount) -> str:
    return f"{escaped(row.node)}:{row.port or '(others)'} ({row.connections})"


def _volume(volume: Volume) -> tuple[Text, Text]:
    return Text(size(volume.received)), Text(size(volume.sent))


# -- rich ------------------------------------------------------------------------------------------


def _state(word: str, shown: str | None = None) -> Text:
    return Text(escaped(shown or word), _STYLES.get(word, ""))


def _joined(between: str, parts: Sequence[Text]) -> Text:
    return Text(between).join(parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Text]]) -> RenderableType:
    """Columns under small titles; a title that begins with > is of numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=_DIM)
    for column in columns:
        title = column.lstrip(">")
        table.add_column(
            title.upper() if title.islower() else title,
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    return table
