"""The log: one line an event on standard error, key=value on a terminal and JSON elsewhere.

Where standard error is systemd's journal, an event's fields go there as the entry's fields.

Events are short fixed names with fields (`lane_lost lane=1`; docs/events.md has them all). What
libraries write through `logging` joins the same stream as the event `library_message`. Values
whose key names a secret are blanked, control characters are escaped, long values are cut and
events that come again and again are bounded, so that nothing a peer sends can forge a line or
flood the log.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, cast

from rayfwd.system import journal
from rayfwd.system.eventlog import EventLog
from rayfwd.system.lean import without
from rayfwd.system.redact import REDACTED, is_secret_flag, names_a_secret, redact_text

with without("rich"):  # for tracebacks in colour, which we do not print; a tenth of a start
    import structlog
    from structlog.typing import WrappedLogger

__all__ = [
    "VALUE_LIMIT",
    "escaped",
    "get_logger",
    "lines_about",
    "setup",
]

VALUE_LIMIT = 2000
"""Characters of one value that are kept; a traceback may have `TRACEBACK_LIMIT`."""

TRACEBACK_LIMIT = 16000
ITEM_LIMIT = 200
"""Items of one list or mapping that are kept."""
DEPTH_LIMIT = 4

REPEAT_LIMIT = 500
"""Events of one name that are written in `REPEAT_SECONDS`."""
REPEAT_SECONDS = 30.0
ABOUT_LIMIT = 300
"""Events about one node, of whatever names, that are written in that time: what a node tells of is
logged under as many names as there are codes."""
MOST_KEPT = 4096
"""Names, and nodes, of which it is remembered how often they came."""

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}

_LIBRARIES_AT_WARNING = ("asyncssh", "asyncio")
"""Libraries that say at level info what our own events say already."""


class LogSettings(Protocol):
    """What is configured of the log: `[log]` of the file."""

    @property
    def level(self) -> Literal["debug", "info", "warning", "error"]:
        """From which severity on events are written."""

    @property
    def format(self) -> Literal["auto", "text", "json"]:
        """How they are written."""


def setup(
    config: LogSettings,
    stream: TextIO | None = None,
    journal_socket: Path = journal.SOCKET,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Send every event of this process to `stream` (default: standard error).

    With the format `auto`, a stream that leads to systemd's journal makes way for
    `journal_socket`. May be called again; the last call holds.
    """
    out = sys.stderr if stream is None else stream
    level = _LEVELS[config.level]
    terminal = _is_terminal(out)
    text = config.format == "text" or (config.format == "auto" and terminal)
    renderer: Callable[[WrappedLogger, str, _EventDict], Any]
    close_journal()
    if config.format == "auto" and _is_journal(out):
        _journals.append(journal.Journal(journal_socket))
        renderer = _render_journal
    else:
        coloured = terminal and _colours_wanted(os.environ)
        renderer = _TextRenderer(coloured) if text else _render_json
    structlog.configure(
        processors=[
            _Bound(clock),
            structlog.stdlib.add_log_level,
            _add_time,
            _add_name,
            structlog.processors.format_exc_info,
            _clean,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        logger_factory=_LoggerFactory(out, _journals[0] if _journals else None),
        cache_logger_on_first_use=False,  # loggers made at import time follow a later set-up
    )
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Bridge)]:
        root.removeHandler(handler)
    root.addHandler(_Bridge())
    root.setLevel(level)
    for name in _LIBRARIES_AT_WARNING:
        library_level = logging.INFO if level <= logging.DEBUG else max(level, logging.WARNING)
        logging.getLogger(name).setLevel(library_level)
    logging.captureWarnings(True)


def get_logger(name: str) -> EventLog:
    """A logger whose events carry `logger=name`; may be made before `setup`."""
    return cast(EventLog, structlog.get_logger(name))


class _LineLogger:
    """Writes a line. A stream that is gone or full never harms the daemon."""

    def __init__(self, stream: TextIO, name: str | None) -> None:
        self._stream = stream
        self.name = name

    def msg(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        safe = line.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._stream.write(safe + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream was closed
            pass

    debug = info = warning = error = critical = exception = log = msg


class _JournalLogger:
    """Writes an entry of the journal; where there is no journald, a line that has it all."""

    def __init__(self, sink: journal.Journal, lines: _LineLogger) -> None:
        self._sink = sink
        self._lines = lines
        self.name = lines.name

    def msg(self, entry: dict[str, str]) -> None:
        if not self._sink.send(entry):
            self._lines.msg(f"<{entry['PRIORITY']}>{escaped(entry['MESSAGE'])}")

    debug = info = warning = error = critical = exception = log = msg


class _LoggerFactory:
    def __init__(self, stream: TextIO, sink: journal.Journal | None) -> None:
        self._stream = stream
        self._sink = sink

    def __call__(self, *args: Any) -> _LineLogger | _JournalLogger:
        lines = _LineLogger(self._stream, str(args[0]) if args else None)
        return lines if self._sink is None else _JournalLogger(self._sink, lines)


_journals: list[journal.Journal] = []
"""The one that is in use, if any."""


def close_journal() -> None:
    """What waits for journald has a moment to go; before this process logs otherwise, or becomes
    another."""
    while _journals:
        _journals.pop().close()


def _is_journal(stream: TextIO) -> bool:
    try:
        return journal.is_stream(stream.fileno(), os.environ)
    except (OSError, ValueError):  # no file at all, or closed
        return False


class _Bridge(logging.Handler):
    """Turns a record of `logging` into an event."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields: dict[str, Any] = {"message": record.getMessage()}
            if record.exc_info and record.exc_info[0] is not None:
                fields["exc_info"] = record.exc_info
            level = _filtering_level(record.levelno)
            structlog.get_logger(record.name).log(level, "library_message", **fields)
        except Exception:  # as logging's own handlers do: a bad record must not stop the caller
            self.handleError(record)


def _filtering_level(level: int) -> int:
    """The nearest of the levels that structlog's filter knows, rounded down."""
    known = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
    return max((k for k in known if k <= level), default=logging.DEBUG)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def _colours_wanted(env: Mapping[str, str]) -> bool:
    """https://no-color.org: any NO_COLOR that is not empty means none."""
    return not env.get("NO_COLOR") and env.get("TERM") != "dumb"


_EventDict = MutableMapping[str, Any]


class _Bound:
    """Lets so many events of one name through in a while, and so many about one node; what is left
    out is counted and said. At level debug all are let through: who sets it wants to see them.

    The first that is too many becomes `events_suppressed`; the next that is let through has a
    field `suppressed`, how many were left out.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._names: dict[str, tuple[float, int]] = {}
        """When a name's while began, and how many came in it; the same of nodes."""
        self._nodes: dict[str, tuple[float, int]] = {}

    def __call__(self, _logger: WrappedLogger, method: str, event: _EventDict) -> _EventDict:
        if method == "debug":
            return event
        node = event.get("seen_by") or event.get("node")
        if isinstance(node, str):
            node = node.partition("/")[0]  # of a thing of it
            bounded = self._bounded(self._nodes, node, ABOUT_LIMIT, event, {"node": node})
            if bounded is not event:
                return bounded
            _count_line(node)
        name = str(event.get("event"))
        return self._bounded(self._names, name, REPEAT_LIMIT, event, {"name": name})

    def _bounded(
        self,
        seen: dict[str, tuple[float, int]],
        what: str,
        limit: int,
        event: _EventDict,
        said: Mapping[str, str],
    ) -> _EventDict:
        now = self._clock()
        began, count = seen.pop(what, (now, 0))
        if now - began >= REPEAT_SECONDS:
            if count > limit:
                event["suppressed"] = event.get("suppressed", 0) + count - limit
            began, count = now, 0
        seen[what] = began, count + 1
        if len(seen) > MOST_KEPT:
            del seen[next(iter(seen))]  # what has not come for longest
        if count < limit:
            return event
        if count > limit:
            raise structlog.DropEvent
        return {
            "event": "events_suppressed",
            **said,
            "limit": limit,
            "seconds": REPEAT_SECONDS,
        }


_lines: dict[str, int] = {}
"""How many lines were written about a node."""


def _count_line(node: str) -> None:
    _lines[node] = _lines.pop(node, 0) + 1
    if len(_lines) > MOST_KEPT:
        del _lines[next(iter(_lines))]


def lines_about(node: str) -> int:
    """How many lines of the log were about this node, since this process began."""
    return _lines.get(node, 0)


def _add_time(_logger: WrappedLogger, _method: str, event: _EventDict) -> _EventDict:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    event["timestamp"] = now.replace("+00:00", "Z")
    return event


def _add_name(logger: WrappedLogger, _method: str, event: _EventDict) -> _EventDict:
    if name := getattr(logger, "name", None):
        event["logger"] = name
    return event


def _clean(_logger: WrappedLogger, _method: str, event: _EventDict) -> _EventDict:
    return {key: _cleaned(key, value) for key, value in event.items()}


def _cleaned(key: str, value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value if not names_a_secret(key) or value is None else REDACTED
    if names_a_secret(key):
        return REDACTED
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if depth >= DEPTH_LIMIT and not isinstance(value, str):
        return "…"
    if isinstance(value, Mapping):
        items = list(value.items())[:ITEM_LIMIT]
        cleaned = {str(k): _cleaned(str(k), v, depth + 1) for k, v in items}
        return cleaned | ({"…": len(value) - ITEM_LIMIT} if len(value) > ITEM_LIMIT else {})
    if isinstance(value, (list, tuple, set, frozenset)):
        return _cleaned_list(list(value), depth)
    limit = TRACEBACK_LIMIT if key == "exception" else VALUE_LIMIT
    return _cut(redact_text(str(value)), limit, keep_end=key == "exception")


def _cleaned_list(values: list[Any], depth: int) -> list[Any]:
    out: list[Any] = []
    previous: Any = None
    for value in values[:ITEM_LIMIT]:
        after_flag = isinstance(previous, str) and is_secret_flag(previous)
        out.append(REDACTED if after_flag else _cleaned("", value, depth + 1))
        previous = value
    if len(values) > ITEM_LIMIT:
        out.append(f"… {len(values) - ITEM_LIMIT} more")
    return out


def _cut(text: str, limit: int, keep_end: bool) -> str:
    if len(text) <= limit:
        return text
    note = f"… {len(text) - limit} more characters"
    return f"{note} {text[-limit:]}" if keep_end else f"{text[:limit]}{note}"


def _render_json(_logger: WrappedLogger, _method: str, event: _EventDict) -> str:
    head = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return json.dumps({**head, **event}, default=str)  # ASCII only: no raw separators, no controls


class _TextRenderer:
    """`time level event key=value …`, in colours where wanted."""

    def __init__(self, colours: bool) -> None:
        self._colours = colours

    def __call__(self, _logger: WrappedLogger, _method: str, event: _EventDict) -> str:
        when, level = str(event.pop("timestamp")), str(event.pop("level"))
        name = escaped(str(event.pop("event")))
        fields = [
            f"{self._paint('36', escaped(key))}={_quoted(value)}" for key, value in event.items()
        ]
        shown = [
            self._paint("2", when),
            self._paint(_COLOURS.get(level, "0"), f"{level:<7}"),
            self._paint("1", name),
        ]
        return " ".join(shown + fields)

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours else text


def _render_journal(_logger: WrappedLogger, _method: str, event: _EventDict) -> Any:
    """The entry's fields. Its time is the journal's own; what is None has no field."""
    del event["timestamp"]
    level, name = str(event.pop("level")), str(event.pop("event"))
    message = " ".join(
        [
            escaped(name),
            *(f"{escaped(k)}={_quoted(v)}" for k, v in event.items() if k not in _NOT_IN_MESSAGE),
        ]
    )
    if "exception" in event:
        message = journal.bounded(message, journal.FIELD_LIMIT // 4)
        room = journal.FIELD_LIMIT - len(message.encode("utf-8", "backslashreplace")) - 1
        exception = journal.printable(str(event["exception"]))
        message += "\n" + journal.bounded(exception, room, keep_end=True)
    entry = {
        "MESSAGE": journal.bounded(message),
        "PRIORITY": str(journal.PRIORITIES[level]),
        "SYSLOG_IDENTIFIER": "rayfwd",
        "EVENT": journal.bounded(journal.printable(name)),
    }
    for key, value in event.items():
        if value is not None:
            long = key == "exception"
            limit = journal.LONG_FIELD_LIMIT if long else journal.FIELD_LIMIT
            text = journal.printable(_plain(value))
            entry[journal.field_name(key)] = journal.bounded(text, limit, keep_end=long)
    return (entry,), {}


_NOT_IN_MESSAGE = frozenset({"logger", "exception"})


def _plain(value: Any) -> str:
    """A value as a field of its own holds it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _quoted(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    text = str(value)
    if text and not re.search(r"[\s\"'=\\]", text) and text.isprintable():
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped(quoted)}"'


_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escaped(text: str) -> str:
    """Everything that a terminal would act on, or that would end the line, as an escape."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else _SHORT_ESCAPES.get(c) or journal.code_of(c) for c in text
    )
