"""The journal: an event's fields as an entry's fields, over a real datagram socket."""

from __future__ import annotations

import array
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfwd.config import LogConfig
from rayfwd.system import journal, logs
from rayfwd.system.redact import REDACTED

Entry = dict[str, str]


def parsed(data: bytes) -> Entry:
    """An entry, read as journald does; a name may be there once."""
    fields: Entry = {}
    at = 0
    while at < len(data):
        end = data.index(b"\n", at)
        line = data[at:end]
        if b"=" in line:
            name, _, value = line.partition(b"=")
            at = end + 1
        else:
            name = line
            (size,) = struct.unpack_from("<Q", data, end + 1)
            value = data[end + 9 : end + 9 + size]
            assert data[end + 9 + size : end + 10 + size] == b"\n"
            at = end + 10 + size
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name)
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


class Journald:
    """Its socket, and what came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(str(path))

    def entry(self) -> Entry:
        size = struct.calcsize("i")
        data, found, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(size))
        if not found:
            return parsed(data)
        assert data == b""
        descriptor = array.array("i", found[0][2])[0]
        with open(descriptor, "rb") as file:
            with pytest.raises(PermissionError):
                os.write(descriptor, b"x")  # sealed, as journald asks
            assert os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:")
            file.seek(0)
            return parsed(file.read())

    def entries(self) -> list[Entry]:
        found = []
        while True:
            try:
                found.append(self.entry())
            except BlockingIOError:
                return found

    def wait_for(self, number: int) -> list[Entry]:
        """So many entries at least, and what comes right after them."""
        found: list[Entry] = []
        deadline = time.monotonic() + 10
        while len(found) < number:
            assert time.monotonic() < deadline, f"{len(found)} of {number} entries"
            time.sleep(0.01)
            found += self.entries()
        return found + self.all_that_waited()

    def all_that_waited(self) -> list[Entry]:
        """What is there, and what still follows it from the journal's thread."""
        found = self.entries()
        deadline = time.monotonic() + 10
        while any(thread.name == "journal" for thread in threading.enumerate()):
            assert time.monotonic() < deadline, f"{len(found)} entries, and no end"
            time.sleep(0.01)
            found += self.entries()
        return found + self.entries()

    def close(self) -> None:
        self.socket.close()
        self.path.unlink()


@pytest.fixture
def journald() -> Iterator[Journald]:
    with tempfile.TemporaryDirectory(prefix="rf", dir="/tmp") as name:
        made = Journald(Path(name) / "socket")
        yield made
        if made.path.exists():
            made.close()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[io.TextIOWrapper]:
    """A standard error that systemd has connected to its journal."""
    with open(tmp_path / "stderr", "w+", encoding="utf-8") as file:
        found = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        yield file
        logs.setup(LogConfig(), io.StringIO())


@pytest.fixture
def log(journald: Journald, stream: io.TextIOWrapper) -> Any:
    logs.setup(LogConfig(level="debug"), stream, journald.path)
    return logs.get_logger("link")


def test_fields_are_fields(log: Any, journald: Journald, stream: io.TextIOWrapper) -> None:
    log.warning("lane_lost", lane="bulk-1", cause='a "b" c', up_seconds=0.1234567891, gone=None)
    assert journald.entries() == [
        {
            "MESSAGE": r'lane_lost lane=bulk-1 cause="a \"b\" c" up_seconds=0.123457 gone=null',
            "PRIORITY": "4",
            "SYSLOG_IDENTIFIER": "rayfwd",
            "EVENT": "lane_lost",
            "LOGGER": "link",
            "LANE": "bulk-1",
            "CAUSE": 'a "b" c',
            "UP_SECONDS": "0.123457",
        }
    ]
    assert Path(stream.name).read_text() == ""


@pytest.mark.parametrize(
    ("level", "priority"),
    [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2")],
)
def test_priorities(log: Any, journald: Journald, level: str, priority: str) -> None:
    getattr(log, level)("e")
    assert journald.entry()["PRIORITY"] == priority


def test_what_is_no_text(log: Any, journald: Journald) -> None:
    log.info("e", nodes=["a", "ü"], ok=True, number=3, totals={"CPU": 1.5})
    entry = journald.entry()
    assert json.loads(entry["NODES"]) == ["a", "ü"]
    assert (entry["OK"], entry["NUMBER"]) == ("true", "3")
    assert json.loads(entry["TOTALS"]) == {"CPU": 1.5}


def test_names_that_the_journal_has_itself(log: Any, journald: Journald) -> None:
    names = {"message": "m", "priority": 9, "unit": "u", "code": "c", "_x": 1, "9": 2, "a-ü": 3}
    log.info("e", **names)
    entry = journald.entry()
    assert entry["MESSAGE"].startswith("e message=m ")
    assert entry["PRIORITY"] == "6"
    assert entry["RAYFWD_MESSAGE"] == "m"
    assert entry["RAYFWD_PRIORITY"] == "9"
    assert entry["RAYFWD_UNIT"] == "u"
    assert entry["CODE"] == "c"
    assert (entry["X"], entry["FIELD"], entry["A__"]) == ("1", "2", "3")


@given(st.text(max_size=100))
def test_every_name_is_one_that_journald_takes(name: str) -> None:
    assert re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", journal.field_name(name))


@given(st.text(), st.booleans(), st.integers(8, 20))
def test_bounds_are_bytes_and_characters_stay_whole(text: str, keep_end: bool, limit: int) -> None:
    cut = journal.bounded(text, limit, keep_end)
    assert len(cut.encode()) <= limit
    if len(text.encode()) <= limit:
        assert cut == text
    else:
        rest = cut.strip("…")
        assert text.endswith(rest) if keep_end else text.startswith(rest)


@given(st.text())
def test_one_event_is_one_entry_whatever_it_holds(value: str) -> None:
    fields = [("MESSAGE", journal.printable(value)), ("V", value)]
    read = parsed(journal.encode(fields))
    assert read["V"] == value
    assert all(c.isprintable() or c in "\n\t" for c in read["MESSAGE"])


def test_nothing_acts_on_a_terminal_and_nothing_forges_a_field(
    log: Any, journald: Journald
) -> None:
    log.info("e", v="a\nPRIORITY=0\x1b[2J\x9b\u202e\t\x00")
    (entry,) = journald.entries()
    assert entry["PRIORITY"] == "6"
    assert entry["MESSAGE"] == r'e v="a\nPRIORITY=0\x1b[2J\x9b\u202e\t\x00"'
    assert entry["V"] == "a\nPRIORITY=0\\x1b[2J\\x9b\\u202e\t\\x00"


def test_no_colour_and_no_secret(log: Any, journald: Journald) -> None:
    log.info("e", token="T1", env={"RAY_AUTH_TOKEN": "T2"}, command="x --redis-password=T3")
    entry = journald.entry()
    assert not re.search(r"T\d|\x1b", str(entry))
    assert entry["TOKEN"] == REDACTED


def test_a_traceback_is_read_in_the_message_and_whole_in_its_field(
    log: Any, journald: Journald
) -> None:
    try:
        raise ValueError("y" * 6000 + " THE END")
    except ValueError:
        log.error("rayfwd_fault", node="w1", exc_info=True)
    entry = journald.entry()
    first, *lines = entry["MESSAGE"].splitlines()
    assert first == "rayfwd_fault node=w1"
    assert lines[-1].endswith("THE END")
    assert len(f"MESSAGE={entry['MESSAGE']}".encode()) < 4096
    assert entry["EXCEPTION"].startswith("Traceback")
    assert entry["EXCEPTION"].endswith("THE END")
    assert len(entry["EXCEPTION"].encode()) <= journal.LONG_FIELD_LIMIT


def test_no_field_is_longer_than_journalctl_shows(log: Any, journald: Journald) -> None:
    log.info("e", text="ü" * 9000, rows=[["x" * 1000] * 150] * 100)
    (entry,) = journald.entries()
    assert all(len(f"{name}={value}".encode()) < 4096 for name, value in entry.items())


def test_the_number_of_fields_is_bounded(log: Any, journald: Journald) -> None:
    log.info("e", **{f"f{i}": i for i in range(500)})
    entry = journald.entry()
    assert len(entry) == journal.ENTRY_FIELDS
    assert entry["EVENT"] == "e"


def test_a_large_entry_goes_as_a_sealed_file(journald: Journald) -> None:
    sink = journal.Journal(journald.path)
    try:
        assert sink.send({"MESSAGE": "m", "V": "x" * 3_000_000})
        assert len(journald.entry()["V"]) == 3_000_000
    finally:
        sink.close()


def test_a_full_journal_holds_nothing_up_and_loses_nothing(log: Any, journald: Journald) -> None:
    for number in range(500):
        log.info("e", number=number, filler="x" * 2000)
    log.info("e", number=500)
    came = journald.wait_for(501)
    assert [e.get("NUMBER") for e in came] == [*map(str, range(500)), None]
    assert came[-1]["EVENT"] == "events_suppressed"
    assert not any(journal.LOST in e for e in came)
    log.info("f")
    (entry,) = journald.wait_for(1)
    assert entry["EVENT"] == "f"


def test_what_the_journal_takes_too_late_is_counted(
    log: Any, journald: Journald, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "BACKLOG_LIMIT", 100_000)
    put = journal.Journal._put
    tried_again = threading.Semaphore(0)

    def noted(self: journal.Journal, data: bytes, flags: int = 0) -> bool:
        if not (taken := put(self, data, flags)) and not flags:
            tried_again.release()
        return taken

    monkeypatch.setattr(journal.Journal, "_put", noted)
    for number in range(400):
        log.info("e", number=number, filler="x" * 2000)
    for _ in range(2):
        assert tried_again.acquire(timeout=10)
    came = journald.all_that_waited()
    kept = len(came)
    assert [e["NUMBER"] for e in came] == [str(n) for n in range(kept)]
    assert 20 <= kept < 60
    log.info("e", number=400)
    (entry,) = journald.wait_for(1)
    assert entry["NUMBER"] == "400"
    assert entry["RAYFWD_LOST"] == str(400 - kept)
    log.info("e")
    (entry,) = journald.wait_for(1)
    assert "RAYFWD_LOST" not in entry


def test_a_finalizer_that_logs_meanwhile_holds_nothing_up(
    log: Any, journald: Journald, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = journal.encode

    def interrupted(fields: Any) -> bytes:
        monkeypatch.setattr(journal, "encode", encode)
        log.info("inner")
        return encode(fields)

    monkeypatch.setattr(journal, "encode", interrupted)
    log.info("outer")
    log.info("later")
    outer, later = journald.entries()
    assert (outer["EVENT"], later["EVENT"]) == ("outer", "later")
    assert later["RAYFWD_LOST"] == "1"


def test_the_last_words_of_a_process_are_written(journald: Journald) -> None:
    script = f"""
from pathlib import Path
from rayfwd.system import journal
journal.CLOSE_SECONDS = 10  # the reader may be slow, on a busy machine
sink = journal.Journal(Path({str(journald.path)!r}))
for number in range(200):
    sink.send({{"NUMBER": str(number)}})
"""
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        came = journald.wait_for(200)
        assert process.wait(10) == 0
    assert [e["NUMBER"] for e in came] == [str(n) for n in range(200)]


def test_what_waits_is_written_before_a_process_becomes_another(
    journald: Journald, stream: io.TextIOWrapper
) -> None:
    script = f"""
import os
from pathlib import Path
from rayfwd.system import journal
from rayfwd.system import logs
from rayfwd.config import LogConfig
from rayfwd.daemon import handover
journal.CLOSE_SECONDS = 10
logs.setup(LogConfig(), journal_socket=Path({str(journald.path)!r}))
log = logs.get_logger("daemon")
if os.environ.setdefault("RUN", "first") == "second":
    log.warning("rayfwd_restarted")
else:
    os.environ["RUN"] = "second"
    for number in range(200):
        log.warning("lane_lost", number=number)
    handover.exec_again(None)
"""
    with subprocess.Popen([sys.executable, "-c", script], stderr=stream) as process:
        came = journald.wait_for(201)
        assert process.wait(10) == 0
    assert [e["EVENT"] for e in came] == [*["lane_lost"] * 200, "rayfwd_restarted"]


def test_a_journald_that_hangs_does_not_keep_a_process(
    journald: Journald, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "CLOSE_TIMEOUT", 0.2)
    sink = journal.Journal(journald.path)
    for number in range(200):
        assert sink.send({"NUMBER": str(number), "FILLER": "x" * 2000})
    began = time.monotonic()
    sink.close()
    assert time.monotonic() - began < 2
    assert not [t for t in threading.enumerate() if t.name == "journal"]
    assert 0 < len(journald.entries()) < 200


def test_a_journald_that_goes_while_entries_wait(
    log: Any, journald: Journald, stream: io.TextIOWrapper
) -> None:
    for number in range(100):
        log.info("e", number=number)
    journald.close()
    deadline = time.monotonic() + 10
    while [t for t in threading.enumerate() if t.name == "journal"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    log.info("f")
    assert Path(stream.name).read_text() == "<6>f\n"


def test_without_journald_it_is_a_line_again(
    log: Any, journald: Journald, stream: io.TextIOWrapper
) -> None:
    journald.close()
    log.warning("lane_lost", cause="a\nb")
    assert Path(stream.name).read_text() == '<4>lane_lost cause="a\\nb"\n'


def test_a_journald_that_comes_back_is_found(log: Any, journald: Journald) -> None:
    log.info("a")
    journald.close()
    log.info("b")
    again = Journald(journald.path)
    try:
        log.info("c")
        assert again.entry()["EVENT"] == "c"
    finally:
        again.socket.close()


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_format_that_was_asked_for_is_kept(
    form: Any, journald: Journald, stream: io.TextIOWrapper
) -> None:
    logs.setup(LogConfig(format=form), stream, journald.path)
    logs.get_logger("x").info("descriptors_there")
    assert journald.entries() == []
    assert "descriptors_there" in Path(stream.name).read_text()


@pytest.mark.parametrize("value", ["", "x", "1:", ":", "1:2", "-1:3", "1:2:3"])
def test_a_stream_that_is_not_the_journal(value: str) -> None:
    assert not journal.is_stream(sys.__stderr__.fileno(), {"JOURNAL_STREAM": value})  # type: ignore[union-attr]
    assert not journal.is_stream(999_999, {"JOURNAL_STREAM": "1:2"})


def test_libraries_and_a_second_set_up(journald: Journald, stream: io.TextIOWrapper) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for _ in range(3):
            logs.setup(LogConfig(), stream, journald.path)
    import logging

    logging.getLogger("asyncssh").warning("peer said %s", "x")
    (entry,) = journald.entries()
    assert entry["EVENT"] == "library_message"
    assert entry["RAYFWD_MESSAGE"] == "peer said x"
