"""The roster: what it keeps across restarts, whom it refuses, and what damage does to it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayfwd.cluster.plan import NodePlan, head_plan
from rayfwd.config import LogConfig
from rayfwd.hub.roster import Roster, read, settle
from rayfwd.problems import ProblemError
from rayfwd.system import logs

NETWORK = "127.77.0.0/16"
KEY = "k" * 32
OTHER_KEY = "o" * 32
OWN = head_plan("h", NETWORK, 20000, 70, {"gcs": 6379, "dashboard": 8265, "client": 10001})


@pytest.fixture
def events() -> Iterator[Any]:
    """A function that gives the events logged so far."""
    out = io.StringIO()
    logs.setup(LogConfig(format="json"), out)
    yield lambda: [json.loads(line) for line in out.getvalue().splitlines()]
    logs.setup(LogConfig(), io.StringIO())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "roster.json"


def roster(path: Path, own: NodePlan = OWN, network: str = NETWORK, base: int = 20000) -> Roster:
    return Roster(path, own, network, base)


def code_of(caught: pytest.ExceptionInfo[ProblemError]) -> str:
    return caught.value.problem.code.name


def test_a_new_one_has_the_head_only(path: Path) -> None:
    assert roster(path).plans() == (OWN,)
    assert not path.exists()


def test_a_worker_keeps_its_plan_across_restarts(path: Path) -> None:
    first = roster(path)
    a = first.join("a", KEY, 92, None)
    b = first.join("b", OTHER_KEY, 92, "203.0.113.7")
    second = roster(path)
    assert second.plans() == (OWN, a, b)
    assert second.join("b", OTHER_KEY, 92, "203.0.113.7") == b
    assert second.join("a", KEY, 92, None) == a


def test_joining_again_writes_nothing(path: Path) -> None:
    kept = roster(path)
    kept.join("a", KEY, 92, None)
    before = path.stat()
    kept.join("a", KEY, 92, None)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_file_is_private_and_holds_no_key(path: Path) -> None:
    roster(path).join("a", KEY, 92, None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert KEY not in text
    assert hashlib.sha256(KEY.encode()).hexdigest() in text
    assert json.loads(text)["schema"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["roster.json"], "no temporary file is left"


def test_a_name_is_taken_by_another_key(path: Path) -> None:
    kept = roster(path)
    plan = kept.join("a", KEY, 92, None)
    with pytest.raises(ProblemError) as caught:
        kept.join("a", OTHER_KEY, 92, None)
    assert code_of(caught) == "name_taken"
    assert "rayfwd forget --keep-token a" in caught.value.problem.remedy
    assert kept.plans() == (OWN, plan)


@pytest.mark.parametrize("name", ["h", "head"])
def test_the_heads_names_are_taken(path: Path, name: str) -> None:
    with pytest.raises(ProblemError) as caught:
        roster(path).join(name, KEY, 92, None)
    assert code_of(caught) == "name_taken"


def test_an_address_is_taken(path: Path) -> None:
    kept = roster(path)
    kept.join("a", KEY, 92, "203.0.113.7")
    with pytest.raises(ProblemError) as caught:
        kept.join("b", KEY, 92, "203.0.113.7")
    assert code_of(caught) == "address_taken"
    assert str(caught.value.problem) == (
        "node a already has the address 203.0.113.7, and two nodes cannot share an "
        "address; "
        "correct ray.advertise (`rayfwd join --advertise`) on one of them"
    )


def test_the_plan_is_full(path: Path) -> None:
    with pytest.raises(ProblemError) as caught:
        roster(path, base=32000, own=head_plan("h", NETWORK, 32000, 70, {})).join(
            "a", KEY, 900, None
        )
    assert code_of(caught) == "plan_full"


@pytest.mark.parametrize(
    ("name", "key", "ports", "advertise"),
    [
        ("a b", KEY, 92, None),
        ("a" * 5000, KEY, 92, None),
        ("a", "short", 92, None),
        ("a", KEY, 7, None),
        ("a", KEY, 10001, None),
        ("a", KEY, 92, "name.example.org"),
        ("a", KEY, 92, "127.77.0.1"),
        *(("a", KEY, 92, address) for address in ("0.0.0.0", "0.0.0.1", "255.255.255.255")),
        *(("a", KEY, 92, address) for address in ("240.0.0.1", "169.254.169.254", "224.0.0.1")),
    ],
)
def test_what_no_rayfwd_asks_for_is_refused(
    path: Path, name: str, key: str, ports: int, advertise: str | None
) -> None:
    kept = roster(path)
    with pytest.raises(ProblemError) as caught:
        kept.join(name, key, ports, advertise)
    assert code_of(caught) == "join_bad"
    assert len(str(caught.value)) < 300
    assert kept.plans() == (OWN,)


def test_forgetting_frees_name_address_and_ports(path: Path) -> None:
    kept = roster(path)
    a = kept.join("a", KEY, 92, None)
    assert kept.forget("a")
    assert not kept.forget("a")
    assert roster(path).plans() == (OWN,)
    b = kept.join("b", OTHER_KEY, 92, None)
    assert (b.address, b.base) == (a.address, a.base)
    assert kept.join("a", OTHER_KEY, 92, None).address != a.address


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"schema": 1}', b'{"schema": "1", "nodes": []}', b"\xff\x00" * 9]
)
def test_a_damaged_file_is_copied_aside(path: Path, damage: bytes, events: Any) -> None:
    path.write_bytes(damage)
    kept = roster(path)
    assert kept.plans() == (OWN,)
    (aside,) = path.parent.glob("roster.json.damaged-*")
    assert aside.read_bytes() == damage
    (event,) = [e for e in events() if e["event"] == "roster_damaged"]
    assert (event["level"], event["file"], event["aside"]) == ("error", str(path), str(aside))
    kept.join("a", KEY, 92, None)
    assert len(roster(path).plans()) == 2
    assert len([e for e in events() if e["event"] == "roster_damaged"]) == 1


def test_what_can_be_read_of_a_damaged_file_is_kept(path: Path, events: Any) -> None:
    kept = roster(path)
    kept.join("a", KEY, 92, None)
    b = kept.join("b", KEY, 92, None)
    data = json.loads(path.read_text())
    data["nodes"][0]["plan"]["base"] = "x"
    data["nodes"].append(data["nodes"][1])
    path.write_text(json.dumps(data))
    assert roster(path).plans() == (OWN, b)
    (event,) = [e for e in events() if e["event"] == "roster_damaged"]
    assert event["kept"] == ["b"]
    assert "node b is there twice" in event["damage"]


def test_a_newer_file_is_left_alone(path: Path) -> None:
    path.write_text('{"schema": 2, "nodes": []}')
    with pytest.raises(ProblemError) as caught:
        roster(path)
    assert code_of(caught) == "roster_newer"
    assert path.read_text() == '{"schema": 2, "nodes": []}'


def test_a_file_that_cannot_be_read(path: Path) -> None:
    path.mkdir()
    with pytest.raises(ProblemError) as caught:
        roster(path)
    assert code_of(caught) == "roster_unreadable"


def test_a_change_that_cannot_be_written_is_no_change(path: Path) -> None:
    kept = roster(path)
    path.mkdir()
    (path / "x").touch()
    with pytest.raises(ProblemError) as caught:
        kept.join("a", KEY, 92, None)
    assert code_of(caught) == "roster_unwritable"
    assert kept.plans() == (OWN,)
    assert [p.name for p in path.parent.iterdir()] == ["roster.json"]


def test_another_network_moves_everyone_but_the_advertised_once(path: Path, events: Any) -> None:
    kept = roster(path)
    a = kept.join("a", KEY, 92, None)
    b = kept.join("b", KEY, 92, "203.0.113.7")
    own = head_plan("h", "127.78.0.0/16", 20000, 70, {"gcs": 6379})
    moved = roster(path, own, "127.78.0.0/16").plans()
    assert [p.address for p in moved] == ["127.78.0.1", "127.78.0.2", "203.0.113.7"]
    assert [p.base for p in moved] == [20000, a.base, b.base]
    assert [e["nodes"] for e in events() if e["event"] == "roster_moved"] == [["a"]]
    assert roster(path, own, "127.78.0.0/16").plans() == moved
    assert len([e for e in events() if e["event"] == "roster_moved"]) == 1, "said once"


def test_a_larger_head_moves_only_whom_it_overlaps(path: Path) -> None:
    kept = roster(path)
    kept.join("a", KEY, 92, None)
    b = kept.join("b", KEY, 92, None)
    own = head_plan("h", NETWORK, 20000, 100, {"gcs": 6379})
    _, new_a, new_b = roster(path, own).plans()
    assert new_b == b
    assert new_a.address == "127.77.0.2"
    assert new_a.base >= b.base + b.size


def test_a_moved_service_of_the_heads_moves_whom_it_hits(path: Path) -> None:
    a = roster(path).join("a", KEY, 92, None)
    own = head_plan("h", NETWORK, 20000, 70, {"gcs": a.base + 3})
    assert roster(path, own).plans()[1].base == a.base + 4


def test_a_raised_port_base_moves_everyone_above_it(path: Path) -> None:
    kept = roster(path)
    kept.join("a", KEY, 92, None)
    kept.join("b", KEY, 92, None)
    own = head_plan("h", NETWORK, 25000, 70, {})
    bases = [p.base for p in roster(path, own, base=25000).plans()]
    assert bases == [25000, 25078, 25178]


def test_workers_for_which_nothing_is_left_are_dropped_and_named(path: Path, events: Any) -> None:
    kept = roster(path)
    kept.join("a", KEY, 92, None)
    kept.join("b", KEY, 92, None)
    own = head_plan("h", NETWORK, 32500, 70, {})
    assert [p.name for p in roster(path, own, base=32500).plans()] == ["h", "a"]
    assert [e["nodes"] for e in events() if e["event"] == "roster_dropped"] == [["b"]]


def test_a_head_renamed_to_a_workers_name(path: Path, events: Any) -> None:
    roster(path).join("a", KEY, 92, None)
    own = head_plan("a", NETWORK, 20000, 70, {})
    assert roster(path, own).plans() == (own,)
    assert [e["nodes"] for e in events() if e["event"] == "roster_dropped"] == [["a"]]


def test_reading_and_settling_write_nothing(path: Path) -> None:
    roster(path).join("a", KEY, 92, None)
    text = path.read_bytes()
    records, damage = read(path)
    own = head_plan("h", "127.78.0.0/16", 20000, 70, {})
    settled = settle(records, own, "127.78.0.0/16", 20000)
    assert damage is None
    assert settled.moved == ("a",)
    assert path.read_bytes() == text
    assert [p.name for p in path.parent.iterdir()] == ["roster.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes for another user")
def test_root_keeps_the_files_owner(path: Path) -> None:
    kept = roster(path)
    kept.join("a", KEY, 92, None)
    os.chown(path, 12345, 12346)
    kept.forget("a")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12346)


def test_a_link_in_its_place_is_neither_read_nor_copied(path: Path, tmp_path: Path) -> None:
    """Whoever owns the directory could have root read and copy any file so."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(secret)
    with pytest.raises(ProblemError) as caught:
        roster(path)
    assert code_of(caught) == "roster_unreadable"
    assert [p.name for p in path.parent.glob("roster*")] == [path.name]


def test_a_damaged_one_is_set_aside_for_its_reader_alone(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("{")
    path.chmod(0o644)
    roster(path)
    (aside,) = path.parent.glob("*.damaged-*")
    assert (aside.read_text(), aside.stat().st_mode & 0o777) == ("{", 0o600)
