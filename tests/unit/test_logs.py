"""The log: one line an event, nothing forged, no secret, the same from every library."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfwd.config import LogConfig
from rayfwd.system import logs
from rayfwd.system.redact import REDACTED, names_a_secret, redact_command, redact_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def any_logger(name: str) -> Any:
    """One that takes events which are not declared."""
    return logs.get_logger(name)


@pytest.fixture(autouse=True)
def _afterwards() -> Iterator[None]:
    yield
    logs.setup(LogConfig(), io.StringIO())


Format = Literal["auto", "text", "json"]


def written(
    event: str, fields: dict[str, Any], form: Format = "json", out: io.StringIO | None = None
) -> str:
    stream = out or io.StringIO()
    logs.setup(LogConfig(format=form, level="debug"), stream)
    any_logger("part").info(event, **fields)
    return stream.getvalue()


def fields(**given: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(written("e", given))
    return parsed


def test_json() -> None:
    line = written("lane_lost", {"lane": 1, "why": "ü", "rtt": 0.1234567891, "up": None})
    assert line.endswith("}\n")
    assert line.isascii()
    event = json.loads(line)
    assert list(event)[:3] == ["timestamp", "level", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("timestamp"))
    assert event == {
        "level": "info",
        "event": "lane_lost",
        "logger": "part",
        "lane": 1,
        "why": "ü",
        "rtt": 0.123457,
        "up": None,
    }


def test_text() -> None:
    line = written("lane_lost", {"lane": 1, "why": 'a "b"', "x": "", "ok": True}, "text")
    time, rest = line.split(" ", 1)
    assert time.endswith("Z")
    assert rest == 'info    lane_lost lane=1 why="a \\"b\\"" x="" ok=true logger=part\n'


def test_auto_is_json_without_a_terminal_and_text_on_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert written("e", {}, "auto").startswith("{")
    assert " e " in written("e", {}, "auto", Terminal())


@pytest.mark.parametrize(
    ("env", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours(env: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b[" in written("e", {}, "text", Terminal())) is coloured


def test_no_colours_without_a_terminal() -> None:
    assert "\x1b" not in written("e", {}, "text")


@given(st.text(), st.sampled_from(["text", "json"]))
def test_one_event_is_one_line_whatever_it_holds(value: str, form: Format) -> None:
    # Never a name that the call has itself, such as `event`.
    line = written("e", {"v": value, f"{value}k": 1}, form)
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    if form == "json" and not names_a_secret(value):
        assert json.loads(line)["v"] == redact_text(value)


def test_a_terminal_gets_no_control_characters() -> None:
    line = written("e", {"v": "a\nb\x1b[2J\x9b\u202e\r\t\x00"}, "text")
    assert line.rstrip("\n").endswith('v="a\\nb\\x1b[2J\\x9b\\u202e\\r\\t\\x00" logger=part')


def test_long_values_are_cut() -> None:
    text = fields(v="x" * 5000)["v"]
    assert text == "x" * logs.VALUE_LIMIT + "… 3000 more characters"
    assert len(fields(v=list(range(1000)))["v"]) == 201
    assert len(fields(v={str(i): i for i in range(1000)})["v"]) == 201
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    assert fields(v=deep)["v"] == [[[["…"]]]]
    assert fields(v=b"secret")["v"] == "<6 bytes>"


def test_secrets_by_their_key() -> None:
    event = fields(
        token="T1",
        node_key="T2",
        password="T3",
        client_secret=["T4"],
        key=5,
        env={"RAY_AUTH_TOKEN": "T6", "RAY_AUTH_TOKEN_PATH": "/p", "A": {"api-key": "T7"}},
        monkey="bananas",
        key_fingerprint="SHA256:x",
    )
    assert event["token"] == event["node_key"] == event["password"] == REDACTED
    assert event["client_secret"] == event["key"] == REDACTED
    assert event["env"] == {
        "RAY_AUTH_TOKEN": REDACTED,
        "RAY_AUTH_TOKEN_PATH": "/p",
        "A": {"api-key": REDACTED},
    }
    assert (event["monkey"], event["key_fingerprint"]) == ("bananas", "SHA256:x")


@pytest.mark.parametrize(
    "text",
    [
        "ray start --redis-password=SECRET --port=1",
        "ray start --redis-password SECRET --port=1",
        "RAY_AUTH_TOKEN=SECRET ray start",
        "RAY_AUTH_TOKEN='SECRET word' ray start",
        '{"token": "SECRET"}',
        "Authorization: Bearer SECRET",
        "bad token: SECRET",
    ],
)
def test_secrets_inside_text(text: str) -> None:
    assert "SECRET" not in redact_text(text)
    assert REDACTED in redact_text(text)
    assert "SECRET" not in written("e", {"command": text})


@pytest.mark.parametrize(
    "text", ["ray start --port=6379", "the token is missing", "--monkey=1", "host key is not known"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text


def test_secrets_in_a_command_given_as_words() -> None:
    event = fields(command=["ray", "start", "--redis-password", "SECRET", "--port=1"])
    assert event["command"] == ["ray", "start", "--redis-password", REDACTED, "--port=1"]


def test_a_command_has_the_values_of_its_secret_flags_blanked() -> None:
    said = ["ray", "--token", "S", "--api-key=S", "--key-file=k", "--MYTOKEN", "S", "--port=1", "x"]
    assert redact_command(said) == [
        *("ray", "--token", REDACTED, f"--api-key={REDACTED}", "--key-file=k"),
        *("--MYTOKEN", REDACTED, "--port=1", "x"),
    ]


def test_levels() -> None:
    out = io.StringIO()
    logs.setup(LogConfig(format="json", level="warning"), out)
    log = any_logger("part")
    log.info("no")
    log.debug("no")
    log.warning("w")
    log.error("x")
    assert [json.loads(line)["level"] for line in out.getvalue().splitlines()] == [
        "warning",
        "error",
    ]


def test_a_logger_made_before_the_set_up_follows_it() -> None:
    log = any_logger("early")
    for _ in range(2):
        out = io.StringIO()
        logs.setup(LogConfig(format="json"), out)
        log.info("e")
        assert json.loads(out.getvalue())["logger"] == "early"


def test_libraries_join_the_log() -> None:
    out = io.StringIO()
    logs.setup(LogConfig(format="json"), out)
    logging.getLogger("asyncssh.sftp").info("not wanted")
    logging.getLogger("asyncio").debug("not wanted")
    logging.getLogger("asyncssh").warning("peer said %s", "x\ny")
    try:
        raise ZeroDivisionError("oops")
    except ZeroDivisionError:
        logging.getLogger("asyncio").exception("Task failed")
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert (first["event"], first["logger"], first["level"], first["message"]) == (
        "library_message",
        "asyncssh",
        "warning",
        "peer said x\ny",
    )
    assert (second["logger"], second["level"]) == ("asyncio", "error")
    assert second["exception"].endswith("ZeroDivisionError: oops")


def test_libraries_speak_up_where_debug_is_asked_for() -> None:
    out = io.StringIO()
    logs.setup(LogConfig(format="json", level="debug"), out)
    logging.getLogger("asyncssh").info("wanted")
    logging.getLogger("asyncssh").debug("too much")
    assert [json.loads(line)["message"] for line in out.getvalue().splitlines()] == ["wanted"]


def test_setting_up_twice_says_things_once() -> None:
    out = io.StringIO()
    for _ in range(2):
        logs.setup(LogConfig(format="json"), out)
    logging.getLogger("x").warning("once")
    assert len(out.getvalue().splitlines()) == 1


def test_warnings_of_python_join_the_log() -> None:
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # another test's set-up holds on to another stream
        logs.setup(LogConfig(format="json"), out)
        warnings.warn("odd", stacklevel=1)
        logging.captureWarnings(False)
    assert "odd" in json.loads(out.getvalue())["message"]


def test_an_exception_keeps_its_end() -> None:
    out = io.StringIO()
    logs.setup(LogConfig(format="json"), out)
    try:
        raise ValueError("y" * 50000 + "THE END")
    except ValueError:
        any_logger("part").error("fault", exc_info=True)
    assert json.loads(out.getvalue())["exception"].endswith("THE END")
    assert len(out.getvalue()) < 20000


def test_a_stream_that_is_gone_harms_nobody() -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

    closed = io.StringIO()
    for stream in (Full(), closed):
        logs.setup(LogConfig(format="json"), stream)
        closed.close()
        any_logger("part").info("e")


def test_a_stream_that_knows_ascii_only() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    logs.setup(LogConfig(format="text"), stream)
    any_logger("part").info("e", v="ü")
    assert b"v=\\xfc" in raw.getvalue()


def test_what_comes_again_and_again_is_bounded_and_counted() -> None:
    out = io.StringIO()
    now = 1000.0
    logs.setup(LogConfig(format="json"), out, clock=lambda: now)
    log = any_logger("part")
    many = logs.REPEAT_LIMIT + 40
    for _ in range(many):
        log.warning("lane_lost")
    log.info("other")
    now += logs.REPEAT_SECONDS
    for _ in range(2):
        log.warning("lane_lost")
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events] == [
        *["lane_lost"] * logs.REPEAT_LIMIT,
        "events_suppressed",
        "other",
        "lane_lost",
        "lane_lost",
    ]
    said = events[logs.REPEAT_LIMIT]
    assert (said["name"], said["level"]) == ("lane_lost", "warning")
    assert [e.get("suppressed") for e in events[-2:]] == [40, None]


def test_of_one_node_so_many_events_are_written_whatever_their_names() -> None:
    out, now = io.StringIO(), [1000.0]
    logs.setup(LogConfig(format="json"), out, clock=lambda: now[0])
    log = any_logger("part")
    for number in range(2 * logs.ABOUT_LIMIT):
        log.warning(f"code_{number}", node=f"w1/{number}", seen_by="w1")
    log.warning("lane_lost", node="w2")
    now[0] += logs.REPEAT_SECONDS
    log.warning("lane_lost", node="w1")
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(events) == logs.ABOUT_LIMIT + 3
    said = events[logs.ABOUT_LIMIT]
    assert (said["event"], said["node"]) == ("events_suppressed", "w1")
    assert [e.get("suppressed") for e in events[-2:]] == [None, logs.ABOUT_LIMIT]
    assert logs.lines_about("w1") >= logs.ABOUT_LIMIT


def test_what_is_remembered_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_KEPT", 100)
    bound = logs._Bound(lambda: 1000.0)
    for number in range(1000):
        bound(None, "warning", {"event": f"name_{number}", "node": f"node-{number}"})
    assert len(bound._names) == len(bound._nodes) == 100
    assert len(logs._lines) <= 101


def test_at_level_debug_every_event_is_written() -> None:
    out = io.StringIO()
    logs.setup(LogConfig(level="debug", format="json"), out, clock=lambda: 1000.0)
    for _ in range(2 * logs.REPEAT_LIMIT):
        any_logger("part").debug("frame_traced")
    assert len(out.getvalue().splitlines()) == 2 * logs.REPEAT_LIMIT
