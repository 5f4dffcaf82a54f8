"""A status as a person reads it: what is wrong and what to do first, then how everything stands.

Made of a status document alone (docs/status.md); parts that are missing are left out. What fits
beside each other is decided by the width that there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from rayfwd.system.logs import escaped

SYMPTOMS = 5
"""Symptoms that are named below their root."""

WIDE = 110
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
    "away": "red",
    "down": "bold red",
    "dead": "bold red",
    "failed": "bold red",
    "not listed": "bold red",
    "error": "bold red",
    "problem": "bold red",
}
_DIM = "dim"


@dataclass(frozen=True, slots=True)
class Screen:
    """A status at a time, for rich to print; `now` in Unix seconds."""

    status: Mapping[str, Any]
    now: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= WIDE
        yield self._headline()
        yield from self._problems()
        yield Text()
        yield self._facts()
        yield from self._links(wide)
        yield from self._clients()
        yield from self._nodes(wide)

    # -- the parts, from above ------------------------------------------------------------------

    def _headline(self) -> Text:
        status = self.status
        node = _object(status.get("node"))
        who = [_text(status.get(key)) for key in ("role", "name") if status.get(key)]
        if node.get("address"):
            who.append(f"at {_text(node['address'])}")
        parts = [" ".join(who)] if who else []
        if (uptime := _number(status.get("uptime"))) is not None:
            parts.append(f"up {duration(uptime)}")
        parts.append(f"rayfwd {_text(status.get('version'))}")
        if status.get("pid") is not None:
            parts.append(f"pid {_text(status['pid'])}")
        state = _text(status.get("state"))
        return _joined("  ", [_state(state, state.upper()), Text(", ".join(parts))])

    def _problems(self) -> Iterable[RenderableType]:
        """Each once: what the node waits for, then all else."""
        status = self.status
        ray, link = _object(status.get("ray")), _object(status.get("link"))
        told: set[tuple[str, str]] = set()
        explained = self._explained()
        for tag, problems in (
            ("waiting", _objects(status.get("waiting_for"))),
            ("problem", _objects(status.get("problems"))),
            ("problem", _objects([link.get("problem"), ray.get("problem")])),
            ("problem", _objects(_object(status.get("listeners")).get("blocked"))),
        ):
            for problem in problems:
                key = (_text(problem.get("code")), _text(problem.get("cause")))
                if key not in told and problem not in explained.get(None, ()):
                    told.add(key)
                    yield Text()
                    yield self._problem(tag, problem, explained.get(_root(problem, self._name), ()))

    def _explained(self) -> dict[tuple[str, str] | None, list[Mapping[str, Any]]]:
        """What is explained by another that is shown, by that other; under None all of them."""
        status = self.status
        waits = _objects(status.get("waiting_for"))
        problems = _objects(status.get("problems"))
        roots = {_root(p, self._name) for p in [*waits, *problems] if not p.get("explained_by")}
        found: dict[tuple[str, str] | None, list[Mapping[str, Any]]] = {}
        for problem in problems:
            root = _root(_object(problem.get("explained_by")), self._name)
            if problem.get("explained_by") and root in roots:
                found.setdefault(root, []).append(problem)
                found.setdefault(None, []).append(problem)
        return found

    def _problem(
        self, tag: str, problem: Mapping[str, Any], more: Sequence[Mapping[str, Any]]
    ) -> RenderableType:
        """`more` are those that it explains."""
        shown = tag if tag == "waiting" else _text(problem.get("severity") or tag)
        title = Text.assemble((_text(problem.get("code")), "bold"))
        if problem.get("subject"):
            title.append(f"  {_text(problem['subject'])}")
        if age := self._age(problem.get("since")):
            title.append(f"  for {age}", _DIM)
        body = Table.grid(padding=(0, 2))
        body.add_column(no_wrap=True)
        body.add_column(overflow="fold")
        body.add_row(_state(shown), title)
        if problem.get("cause"):
            body.add_row("", Text(_text(problem["cause"])))
        if problem.get("remedy"):
            body.add_row(Text("do", "bold", justify="right"), Text(_text(problem["remedy"])))
        if more:
            names = [f"{_text(p.get('code'))} {_text(p.get('subject'))}" for p in more]
            rest = f" and {len(names) - SYMPTOMS} more" if len(names) > SYMPTOMS else ""
            body.add_row("", Text(f"explains {', '.join(names[:SYMPTOMS])}{rest}", _DIM))
        return body

    def _facts(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="bold", min_width=8)
        grid.add_column(overflow="fold")
        for title, lines in (
            ("link", self._link()),
            ("ray", self._ray()),
            ("streams", self._streams()),
            ("listeners", self._listeners()),
            ("cluster", self._cluster()),
        ):
            for index, line in enumerate(lines):
                grid.add_row("" if index else title, line)
        return grid

    def _link(self) -> list[RenderableType]:
        link = _object(self.status.get("link"))
        if not link:
            return []
        first = [_state(_text(link.get("state")))]
        if age := self._age(link.get("since")):
            first.append(Text(f"for {age}"))
        if link.get("head"):
            first.append(Text(f"to {_text(link['head'])}"))
        lines: list[RenderableType] = [_joined(" ", first)]
        if (cuts := self._cuts(link)) is not None:
            lines.append(cuts)
        rows = [
            (
                Text(_text(lane.get("class"))),
                _state(_text(lane.get("state"))),
                Text(_milliseconds(_number(lane.get("rtt_ms")))),
                Text(size(lane.get("bytes_in"))),
                Text(size(lane.get("bytes_out"))),
                Text(self._age(lane.get("since")) or "?"),
            )
            for lane in sorted(
                _objects(link.get("lanes")), key=lambda lane: lane.get("class") != "interactive"
            )
        ]
        if rows:
            columns = ("lane", "state", ">round trip", ">in", ">out", "up for")
            lines.append(_table(columns, rows))
        return lines

    def _cuts(self, link: Mapping[str, Any]) -> Text | None:
        cuts = _number(link.get("cuts"))
        if cuts is None:
            return None
        if not cuts:
            return Text("never cut")
        ridden = _number(link.get("ridden_through")) or 0
        text = Text(f"cut {_times(cuts)}")
        lasts = _object(link.get("last_cut")).get("seconds", 0) is None
        if cuts > lasts:
            text.append(f", ridden through {_times(ridden)}")
        if last := self._last_cut(link, long=True):
            text.append(f"; {'last ' if cuts > 1 else ''}{last}")
        return text

    def _last_cut(self, link: Mapping[str, Any], long: bool) -> str:
        cut = _object(link.get("last_cut"))
        began, seconds = self._age(cut.get("began")), _number(cut.get("seconds"))
        if not cut or began is None:
            return ""
        if seconds is None:
            return f"{began} ago, and it lasts" if long else "lasts"
        if not long:
            return f"{began} ago"
        lost = "" if cut.get("ridden_through") else ", given up"
        return f"{began} ago, for {_seconds(seconds)}{lost}"

    def _ray(self) -> list[RenderableType]:
        ray = _object(self.status.get("ray"))
        if not ray:
            return []
        first = [_state(_text(ray.get("phase")).replace("_", " "))]
        if age := self._age(ray.get("since")):
            first.append(Text(f"for {age}"))
        parts = []
        if ray.get("version"):
            parts.append(f"Ray {_text(ray['version'])}")
        if ray.get("python"):
            parts.append(f"Python {_text(ray['python'])}")
        if ray.get("pid") is not None:
            parts.append(f"pid {_text(ray['pid'])}" + (" (adopted)" if ray.get("adopted") else ""))
        if restarts := _number(ray.get("restarts")):
            parts.append(f"{restarts:g} {'restart' if restarts == 1 else 'restarts'}")
        line = _joined(" ", first)
        if parts:
            line.append(f"; {', '.join(parts)}")
        return [line]

    def _streams(self) -> list[RenderableType]:
        streams = _object(self.status.get("streams"))
        volume = _object(self.status.get("bytes"))
        if not streams and not volume:
            return []
        parked = _text(streams.get("parked", 0))
        line = Text(f"{_text(streams.get('open', 0))} open, ")
        line.append(f"{parked} parked", "" if parked == "0" else _STYLES["parked"])
        return [line.append(f"; {size(volume.get('in'))} in, {size(volume.get('out'))} out")]

    def _listeners(self) -> list[RenderableType]:
        listeners = _object(self.status.get("listeners"))
        if not listeners:
            return []
        blocked = _objects(listeners.get("blocked"))
        line = Text(f"{_text(listeners.get('open', 0))} open")
        return [line.append(f", {len(blocked)} blocked", _STYLES["error"]) if blocked else line]

    def _cluster(self) -> list[RenderableType]:
        cluster = _object(self.status.get("cluster"))
        if not cluster:
            return []
        nodes = _objects(cluster.get("nodes"))
        alive = sum(node.get("state") == "ALIVE" for node in nodes)
        first = f"Ray has {alive} {'node' if alive == 1 else 'nodes'} alive"
        if age := self._age(cluster.get("as_of")):
            first += f", as of {age} ago"
        totals = []
        for name, pair in _object(cluster.get("totals")).items():
            if isinstance(pair, list) and len(pair) == 2:
                used, total = (_quantity(name, value) for value in pair)
                totals.append(f"{_label(name)} {used} of {total}")
        return [Text(first), *([Text(f"in use: {', '.join(totals)}")] if totals else [])]

    def _links(self, wide: bool) -> Iterable[RenderableType]:
        """Of a head: its workers' links, a row each."""
        workers = _objects(self.status.get("workers"))
        if not workers:
            return
        columns = ["link", "state", "for", ">lanes", ">round trip", ">cuts", ">ridden", "last cut"]
        if wide:
            columns += [">streams", ">in", ">out"]
        rows = []
        for worker in workers:
            lanes = _objects(worker.get("lanes"))
            trips = [t for lane in lanes if (t := _number(lane.get("rtt_ms"))) is not None]
            sidelined = sum(lane.get("state") != "up" for lane in lanes)
            count = f"{len(lanes)}, {sidelined} sidelined" if sidelined else str(len(lanes))
            row = [
                Text(_text(worker.get("name"))),
                _state(_text(worker.get("state"))),
                Text(self._age(worker.get("since")) or "?"),
                Text(count, _STYLES["sidelined"] if sidelined else ""),
                Text(_milliseconds(min(trips, default=None))),
                Text(_text(worker.get("cuts"))),
                Text(_text(worker.get("ridden_through"))),
                Text(self._last_cut(worker, long=wide) or "-"),
            ]
            if wide:
                volume = _object(worker.get("bytes"))
                streams = _object(worker.get("streams"))
                row.append(Text(_text(streams.get("open"))))
                row += [Text(size(volume.get(way))) for way in ("in", "out")]
            rows.append(row)
        yield Text()
        yield _table(columns, rows)

    def _clients(self) -> Iterable[RenderableType]:
        """Of a head: who is connected and is no node."""
        clients = _objects(self.status.get("clients"))
        if not clients:
            return
        columns = ["client", "as", "state", "for", ">lanes", ">cuts", ">streams", ">in", ">out"]
        rows = []
        for client in clients:
            volume = _object(client.get("bytes"))
            rows.append(
                [
                    Text(_text(client.get("name"))),
                    Text(_text(client.get("user"))),
                    _state(_text(client.get("state"))),
                    Text(self._age(client.get("since")) or "?"),
                    Text(str(len(_objects(client.get("lanes"))))),
                    Text(_text(client.get("cuts"))),
                    Text(_text(_object(client.get("streams")).get("open"))),
                    *(Text(size(volume.get(way))) for way in ("in", "out")),
                ]
            )
        yield Text()
        yield _table(columns, rows)

    def _nodes(self, wide: bool) -> Iterable[RenderableType]:
        """The plan's nodes, and those that Ray has besides."""
        roster = _objects(self.status.get("roster"))
        columns = ["node", "address", "Ray", "brings", ">listeners"]
        if wide:
            columns[2:2] = ["role", "ports"]
        rows = []
        seen = self._seen_by_address()
        for node in roster:
            address = _text(node.get("address"))
            there = seen.pop(address, {})
            role = Text(_text(node.get("role")))
            row = [
                Text(_text(node.get("name")) + " (this)" * (node.get("name") == self._name)),
                Text(address + " (direct)" * bool(node.get("advertised"))),
                _state(self._ray_of(node, there)),
                Text(_brings(_object(there.get("resources_total")), wide)),
                _listeners_of(_object(node.get("listeners"))),
            ]
            if wide:
                row[2:2] = [role, Text(_text(node.get("ports")))]
            rows.append(row)
        for address, there in seen.items():
            if there.get("state") == "ALIVE":
                brings = Text(_brings(_object(there.get("resources_total")), wide))
                between = [Text("-"), Text("-")] if wide else []
                rows.append(
                    [
                        Text("(not rayfwd's)", _DIM),
                        Text(address),
                        *between,
                        _state("alive"),
                        brings,
                        Text("-"),
                    ]
                )
        if rows:
            yield Text()
            yield _table(columns, rows)

    # -- what is looked up ----------------------------------------------------------------------

    @property
    def _name(self) -> Any:
        return self.status.get("name")

    def _seen_by_address(self) -> dict[str, Mapping[str, Any]]:
        """Ray's node table, the living before the dead at the same address."""
        out: dict[str, Mapping[str, Any]] = {}
        for node in _objects(_object(self.status.get("cluster")).get("nodes")):
            address = _text(node.get("address"))
            if address not in out or node.get("state") == "ALIVE":
                out[address] = node
        return out

    def _ray_of(self, node: Mapping[str, Any], there: Mapping[str, Any]) -> str:
        """A node's Ray in a word: what the node itself says of it, and what Ray's table says."""
        if there.get("state") == "ALIVE":
            return "alive"
        workers = _objects(self.status.get("workers"))
        told = next((w.get("ray") for w in workers if w.get("name") == node.get("name")), None)
        if node.get("name") == self._name:
            told = self.status.get("ray")
        phase = _object(told).get("phase")
        if phase is not None and phase != "up":
            return _text(phase).replace("_", " ")
        if there:
            return _text(there.get("state")).lower()
        if phase == "up":
            return "not listed" if self.status.get("cluster") else "up"
        return "-"

    def _age(self, since: Any) -> str | None:
        """How long ago `since` was: Unix seconds, or a time in ISO form. None: not known."""
        if isinstance(since, str):
            try:
                since = datetime.fromisoformat(since).timestamp()
            except (ValueError, OverflowError, OSError):
                return None
        seconds = _number(since)
        return None if seconds is None else duration(self.now - seconds)


# -- words and numbers -----------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """`3 s`, `12 min`, `5 h 10 min`, `3 d 4 h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def size(value: Any) -> str:
    """Bytes in units of 1000: `999 B`, `1.2 kB`, `3.4 GB`."""
    number = _number(value)
    if number is None:
        return "?"
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(number) < 999.95 or unit == "PB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else duration(value)


def _times(count: float) -> str:
    return "never" if not count else "once" if count == 1 else f"{count:g} times"


def _quantity(resource: str, amount: Any) -> str:
    if "memory" in resource:
        return size(amount)
    number = _number(amount)
    return "?" if number is None else f"{number:.2f}".rstrip("0").rstrip(".")


def _label(resource: str) -> str:
    return escaped(resource).replace("_", " ") if "memory" in resource else escaped(resource)


def _brings(resources: Mapping[str, Any], memory: bool) -> str:
    """`CPU 8, GPU 1, memory 12.0 GB`; what Ray adds of its own for every node is left out."""
    own = {
        name: amount
        for name, amount in resources.items()
        if not name.startswith("node:") and (memory or "memory" not in name)
    }
    names = sorted(own, key=lambda name: ("memory" in name, name not in {"CPU", "GPU"}, name))
    return ", ".join(f"{_label(name)} {_quantity(name, own[name])}" for name in names) or "-"


def _listeners_of(listeners: Mapping[str, Any]) -> Text:
    is_open, blocked = _number(listeners.get("open")), _number(listeners.get("blocked"))
    if not is_open and not blocked:
        return Text("-")
    text = Text(f"{is_open or 0:g}")
    return text.append(f", {blocked:g} blocked", _STYLES["error"]) if blocked else text


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    """Names and causes come from other machines: nothing in them may act on the terminal."""
    return "?" if value is None else escaped(str(value))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _root(problem: Mapping[str, Any], own: Any) -> tuple[str, str]:
    """Code and subject; what this node waits for has no subject but itself."""
    return _text(problem.get("code")), _text(problem.get("subject", own))


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


# -- rich ------------------------------------------------------------------------------------------


def _state(word: str, shown: str | None = None) -> Text:
    return Text(shown or word, _STYLES.get(word, ""))


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
