"""The log: one line an event on standard error, key=value on a terminal and JSON elsewhere.

Events are short fixed names with fields (`lane_lost lane=1`). What libraries write through
`logging` joins the same stream as the event `library_message`. Values whose key names a secret
are blanked, control characters are escaped and long values are cut, so that nothing a peer sends
can forge a line or flood the log.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger, WrappedLogger

from rayfwd.config import LogConfig
from rayfwd.redact import REDACTED, is_secret_flag, names_a_secret, redact_text

__all__ = ["VALUE_LIMIT", "FilteringBoundLogger", "escaped", "get_logger", "setup"]

VALUE_LIMIT = 2000
"""Characters of one value that are kept; a traceback may have `TRACEBACK_LIMIT`."""

TRACEBACK_LIMIT = 16000
ITEM_LIMIT = 200
"""Items of one list or mapping that are kept."""
DEPTH_LIMIT = 4

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}

_LIBRARIES_AT_WARNING = ("asyncssh", "asyncio")
"""Libraries that say at level info what our own events say already."""


def setup(config: LogConfig, stream: TextIO | None = None) -> None:
    """Send every event of this process to `stream` (default: standard error).

    May be called again; the last call holds.
    """
    out = sys.stderr if stream is None else stream
    level = _LEVELS[config.level]
    terminal = _is_terminal(out)
    text = config.format == "text" or (config.format == "auto" and terminal)
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            _add_time,
            _add_name,
            structlog.processors.format_exc_info,
            _clean,
            _TextRenderer(terminal and _colours_wanted(os.environ)) if text else _render_json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        context_class=dict,
        logger_factory=_LineLoggerFactory(out),
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


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose events carry `logger=name`; may be made before `setup`."""
    return cast(FilteringBoundLogger, structlog.get_logger(name))


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


class _LineLoggerFactory:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, *args: Any) -> _LineLogger:
        return _LineLogger(self._stream, str(args[0]) if args else None)


class _Bridge(logging.Handler):
    """Turns a record of `logging` into an event."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields: dict[str, Any] = {"message": record.getMessage()}
            if record.exc_info and record.exc_info[0] is not None:
                fields["exc_info"] = record.exc_info
            level = _filtering_level(record.levelno)
            get_logger(record.name).log(level, "library_message", **fields)
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
        time, level = str(event.pop("timestamp")), str(event.pop("level"))
        name = escaped(str(event.pop("event")))
        fields = [
            f"{self._paint('36', escaped(key))}={_quoted(value)}" for key, value in event.items()
        ]
        shown = [
            self._paint("2", time),
            self._paint(_COLOURS.get(level, "0"), f"{level:<7}"),
            self._paint("1", name),
        ]
        return " ".join(shown + fields)

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours else text


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
    return "".join(c if c.isprintable() else _SHORT_ESCAPES.get(c) or _code(c) for c in text)


def _code(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
