"""Conditions: when they show, what explains them, what is said of them, and their document."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rayfwd import codes
from rayfwd.cli import explain
from rayfwd.cluster.plan import NodePlan
from rayfwd.daemon.exchange import ConditionExchange
from rayfwd.problems import Code, Group, ProblemError
from rayfwd.session import messages
from rayfwd.session.frames import MAX_MESSAGE
from rayfwd.session.messages import MOST_SENT, TEXT_BYTES
from rayfwd.watch import conditions, machine_watch
from rayfwd.watch.board import Board
from rayfwd.watch.conditions import Condition, Finding, node_of, worst
from rayfwd.watch.links import LINKS_INTERVAL, SLOW_SAMPLES, THIN_SECONDS, LinkRules, LinkSeen
from rayfwd.watch.machine_watch import MachineSeen
from tests.unit.loops import log_events, of

DOCUMENT = (Path(__file__).parents[2] / "docs" / "conditions.md").read_text()


def members(*groups: Group) -> set[str]:
    return {code.name for code in codes.ALL.values() if code.group in groups}


def causes(code: Code) -> list[str]:
    """What explains it, as the document has it."""
    by = {f"`{cause}`" for cause in code.caused_by if isinstance(cause, Code)}
    if code.heads_explains:
        by.add(f"`{code}`")
    if Group.PORTS in code.caused_by:
        by |= {f"`{name}`" for name in members(Group.PORTS)}
    names = {Group.LINK_FAULT: "the link's", Group.RAY: "Ray's"}
    return [name for group, name in names.items() if group in code.caused_by] + sorted(by)


def meta(code: Code) -> str:
    """The line below a code's heading."""
    if not code.counted:
        return "*A command's error message, or why a session ended; never in the status.*"
    often = "after two checks in a row" if code.min_samples == 2 else ""
    lasts = f"after {code.for_seconds:g} s" if code.for_seconds else ""
    when = ", and ".join(part for part in (often, lasts) if part)
    parts = [
        code.severity.capitalize(),
        f"shows {when or 'at once'}",
    ]
    if by := causes(code):
        parts.append("explained by " + ", ".join(by))
    return f"*{'; '.join(parts)}.*"


# -- the document


def test_a_code_is_found_under_its_name() -> None:
    for name, code in codes.ALL.items():
        assert getattr(codes, name.upper()) is code
        assert codes.named(name) is code


def test_a_code_of_another_version_is_an_error_that_shows_at_once() -> None:
    code = codes.named("of_another_version")
    assert (code.name, code.severity, code.for_seconds) == ("of_another_version", "error", 0.0)
    assert code is codes.named("of_another_version")
    assert code not in codes.ALL.values()


def test_every_code_has_a_section_and_there_is_none_besides() -> None:
    assert explain.sections(DOCUMENT).keys() == codes.ALL.keys()


@pytest.mark.parametrize("code", codes.ALL.values(), ids=str)
def test_a_section_says_when_it_shows_and_what_to_do(code: Code) -> None:
    first, what, *do = explain.sections(DOCUMENT)[code.name].split("\n\n")
    assert first == meta(code)
    assert len(what) > 20
    assert re.fullmatch(r"\*\*Do:\*\* .+", do[0], re.DOTALL)
    assert len(do) == 1


def errors_of(part: str) -> list[str]:
    """The codes of a part of the document that are errors, in its order."""
    text = DOCUMENT.partition(f"\n## {part}\n")[2].partition("\n## ")[0]
    return [name for name in explain.sections(f"\n{text}") if codes.named(name).severity == "error"]


def test_the_document_says_which_codes_are_the_links_and_which_are_rays() -> None:
    links = {*errors_of("The link"), "ssh_lost", "lane_lost", "link_parked"}
    assert links == members(Group.LINK_FAULT, Group.LINK_GONE)
    rays = errors_of("Ray on a node")
    rays = rays[: rays.index("ray_token_wrong") + 1]
    rays.remove("advertise_unchecked")
    more = {"keeper_absent", "keeper_silent", "ray_start_failed", "ray_died"}
    assert {*rays, *more} == members(Group.RAY)


def test_what_explains_is_in_the_table() -> None:
    for code in codes.ALL.values():
        for cause in code.caused_by:
            assert isinstance(cause, Group) or codes.ALL[cause.name] is cause


@pytest.mark.parametrize("code", codes.ALL)
@pytest.mark.parametrize("columns", [60, 200])
def test_an_explanation_is_text_for_a_terminal(
    code: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sign of Markdown's is left, every line fits, and a link names the file."""
    monkeypatch.setenv("COLUMNS", str(columns))
    said = explain.explanation(code)
    assert max(map(len, said.splitlines())) < min(columns, 101)
    patterns = ("/tmp/ray/session_*", "worker-*.err")
    assert not re.search(r"[*`]|\]\(|\n\n\n", re.sub("|".join(map(re.escape, patterns)), "", said))
    pages = re.findall(r"\]\((.*?\.md)", explain.sections(DOCUMENT)[code])
    assert re.findall(r"docs/([\w-]+\.md)", said) == pages


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.run(argparse.Namespace(code="ray_died")) == 0
    said = capsys.readouterr().out
    assert said.startswith("ray_died\n\nError; shows at once")
    assert "Do: Read raylet.out" in said
    assert explain.run(argparse.Namespace(code=None)) == 0
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert rows["link_slow"] == "warning"
    assert "daemon_not_running" not in rows


@pytest.mark.parametrize(
    ("code", "near"),
    [
        ("ray_dyed", "ray_died"),
        ("link_lost", "link_slow"),
        ("disk_full", "disk_nearly_full"),
        ("canary", "canary_failed"),
        ("%%", "lists the codes"),
    ],
)
def test_explain_what_there_is_not(code: str, near: str) -> None:
    with pytest.raises(ProblemError) as caught:
        explain.explanation(code)
    assert caught.value.problem.code == codes.CONDITION_UNKNOWN
    assert near in caught.value.problem.remedy


# -- over time


@dataclass
class Desk:
    """A board with a clock that is turned."""

    now: float = 0.0

    def __post_init__(self) -> None:
        self.wakes: list[tuple[float, Callable[[], None]]] = []
        self.changes = 0
        self.board = Board(self._changed, "head", self._later, lambda: self.now)
        self.board.head = "head"

    def _changed(self) -> None:
        self.changes += 1

    def _later(self, seconds: float, wake: Callable[[], None]) -> None:
        assert seconds > 0
        self.wakes.append((self.now + seconds, wake))

    def until(self, now: float) -> None:
        """Let time pass, and be woken in it."""
        while self.wakes and min(at for at, _ in self.wakes) <= now:
            at, wake = min(self.wakes, key=lambda pair: pair[0])
            self.wakes.remove((at, wake))
            self.now = max(self.now, at)
            wake()
        self.now = now

    def put(self, watcher: str, *rows: tuple[str, str] | Finding) -> None:
        self.board.put_all(watcher, [r if isinstance(r, Finding) else finding(*r) for r in rows])

    @property
    def shown(self) -> list[str]:
        """`code subject`, and behind it the root's."""
        return [
            f"{c.code} {c.subject}"
            + (f" < {' '.join(c.explained_by.split(':')[:2])}" if c.explained_by else "")
            for c in self.board.conditions
        ]


ROOT = Code("root")
TWIG = Code("twig", caused_by=(ROOT,))
MADE = {
    code.name: code
    for code in (
        Code("now"),
        Code("held", "warning", for_seconds=10.0),
        Code("twice", min_samples=2),
        Code("both", for_seconds=10.0, min_samples=2),
        ROOT,
        TWIG,
        Code("leaf", caused_by=(ROOT, TWIG), heads_explains=True),
        Code("aside", "note"),
    )
}
"""Codes whose times are easily reckoned with."""


def finding(name: str, subject: str, cause: str = "cause", **fields: Any) -> Finding:
    return Finding(
        subject, (MADE.get(name) or codes.named(name)).problem(cause, "remedy"), **fields
    )


@pytest.mark.parametrize(
    ("code", "looks", "shows_at"),
    [
        ("now", [0], 0),
        ("of another version", [0], 0),
        ("held", [0], 10),
        ("twice", [0, 3], 3),
        ("both", [0, 3], 10),
        ("both", [0, 12], 12),
        ("both", [0], None),
        ("twice", [0], None),
    ],
)
def test_when_it_shows(code: str, looks: list[float], shows_at: float | None) -> None:
    desk = Desk()
    when = None
    for moment in range(40):
        desk.until(moment)
        if moment in looks:
            desk.put("a", (code, "w1"))
        if desk.shown and when is None:
            when = moment
    assert when == shows_at


def test_what_another_node_has_confirmed_shows_at_once() -> None:
    """It is told once: nobody here looks a second time."""
    desk = Desk()
    with log_events() as log:
        for code in ("held", "twice", "both"):
            desk.put(code, finding(code, "w1", seen_by="head", confirmed=True))
    assert desk.shown == ["held w1", "twice w1", "both w1"]
    assert [e["event"] for e in log] == ["held", "twice", "both"]


@pytest.mark.parametrize("name", ["held", "twice", "both"])
def test_what_blocks_readiness_shows_at_once(name: str) -> None:
    desk = Desk()
    desk.put("a", finding(name, "w1", blocks_ready=True))
    assert [(c.code.name, c.blocks_ready) for c in desk.board.conditions] == [(name, True)]
    assert not desk.board.pending("a")


def test_a_part_of_the_status_names_its_conditions() -> None:
    desk = Desk()
    desk.put("ray", ("now", "w1"), ("held", "w1"))
    desk.put("told:w1", finding("now", "w1", seen_by="w1"), finding("leaf", "w1", seen_by="w1"))
    desk.put("a", finding("root", "w1", seen_by="w1"))
    ids = [c.id for c in desk.board.conditions]
    assert len(set(ids)) == 4
    assert desk.board.ids_of("ray") == ("now:w1:head",)
    assert desk.board.ids_of("told:w1") == ("now:w1:w1", "leaf:w1:w1")
    (leaf,) = (c for c in desk.board.conditions if c.code.name == "leaf")
    assert leaf.explained_by == "root:w1:w1"
    assert desk.board.ids_of("nobody") == ()


def test_what_ends_before_it_shows_is_never_told() -> None:
    desk = Desk()
    with log_events() as log:
        desk.put("a", ("held", "w1"), ("twice", "w1"))
        assert desk.board.pending("a")
        desk.until(9)
        desk.put("a")
        assert not desk.board.pending("a")
        desk.until(60)
        desk.put("a", ("twice", "w1"))  # not the second in a row
    assert log == []
    assert desk.changes == 0


def test_raised_once_and_cleared_once() -> None:
    desk = Desk()
    with log_events() as log:
        desk.put("a", ("now", "w1"))
        since = desk.board.conditions[0].since
        desk.until(5)
        desk.put("a", finding("now", "w1", "another number"))
        assert desk.board.conditions[0].problem.cause == "another number"
        assert desk.board.conditions[0].since == since
        desk.put("b", ("aside", "w2"))
        desk.put("a")
        desk.put("b")
    assert [(e["event"], e["log_level"], e["node"]) for e in log] == [
        ("now", "error", "w1"),
        ("aside", "info", "w2"),
        ("problem_over", "info", "w1"),
        ("problem_over", "info", "w2"),
    ]
    assert desk.changes == 5


def test_what_somebody_else_logs_is_not_logged() -> None:
    desk = Desk()
    with log_events() as log:
        desk.board.put_all("a", [finding("now", "w1")], quiet=True)
        assert desk.shown == ["now w1"]
        desk.board.put_all("a", [], quiet=True)
    assert log == []


def test_a_node_that_has_gone() -> None:
    desk = Desk()
    desk.put("a", ("now", "w1"), ("now", "w1/bulk"), ("now", "w2"))
    desk.put("link", ("root", "w1"))
    with log_events() as log:
        desk.board.drop({"w1"}, but=("link",))
    assert desk.shown == ["now w2", "root w1"]
    assert [e["node"] for e in of(log, "problem_over")] == ["w1", "w1/bulk"]


# -- what explains what


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ([finding("leaf", "w1"), finding("root", "w1")], ["root w1", "leaf w1 < root w1"]),
        # Down to the first cause.
        (
            [finding("leaf", "w1"), finding("twig", "w1"), finding("root", "w1")],
            ["root w1", "leaf w1 < root w1", "twig w1 < root w1"],
        ),
        # The head's explains everybody's, another node's nobody else's.
        ([finding("leaf", "w1"), finding("root", "head")], ["root head", "leaf w1 < root head"]),
        ([finding("leaf", "w1"), finding("root", "w2")], ["leaf w1", "root w2"]),
        ([finding("leaf", "head"), finding("root", "w1")], ["leaf head", "root w1"]),
        # Of a lane or a listener: its node.
        (
            [finding("leaf", "w1/bulk"), finding("root", "w1")],
            ["root w1", "leaf w1/bulk < root w1"],
        ),
        # The same code: the head's explains the workers'.
        ([finding("leaf", "w1"), finding("leaf", "head")], ["leaf head", "leaf w1 < leaf head"]),
        ([finding("leaf", "w1"), finding("leaf", "w2")], ["leaf w1", "leaf w2"]),
        # A node speaks for itself, and the head for all.
        (
            [finding("leaf", "w1"), finding("root", "w1", seen_by="w1")],
            ["root w1", "leaf w1 < root w1"],
        ),
        ([finding("leaf", "w1"), finding("root", "w1", seen_by="w2")], ["leaf w1", "root w1"]),
        # What explains nothing.
        ([finding("leaf", "w1"), finding("root", "w1", explains=False)], ["leaf w1", "root w1"]),
    ],
)
def test_the_root_is_shown_first(found: list[Finding], shown: list[str]) -> None:
    desk = Desk()
    desk.put("a", *found)
    assert desk.shown == shown


def test_a_symptom_outlives_its_root_for_a_while() -> None:
    desk = Desk()
    with log_events() as log:
        desk.put("a", ("root", "w1"))
        desk.put("b", ("leaf", "w1"))
        desk.until(100)
        desk.put("a")
        desk.until(100 + conditions.LINGER_SECONDS - 1)
        assert desk.shown == ["leaf w1 < root w1"]
        desk.until(100 + conditions.LINGER_SECONDS + 1)
        assert desk.shown == ["leaf w1"]
        desk.put("b")
    assert [(e["event"], e["log_level"], e.get("explained_by")) for e in log] == [
        ("root", "error", None),
        ("leaf", "info", "root w1"),
        ("problem_over", "info", None),
        ("leaf", "error", None),
        ("problem_over", "info", None),
    ]


def test_the_worst_is_a_root() -> None:
    desk = Desk()
    assert worst(desk.board.conditions) is None
    desk.put("a", ("aside", "w1"), ("held", "w1"), ("root", "w2"), ("leaf", "w2"))
    first = worst(desk.board.conditions)
    assert first is not None
    assert (first.code.name, first.subject) == ("root", "w2")


# -- between nodes


def condition(code: str, severity: Any = "error", cause: str = "cause") -> Condition:
    return Condition(codes.named(code).problem(cause, "remedy"), severity, "w1", 5.0, "w1")


def over_the_wire(message: messages.Conditions) -> messages.Conditions:
    came = messages.decode(messages.encode(message))
    assert isinstance(came, messages.Conditions)
    return came


def test_conditions_go_over_the_wire() -> None:
    message = over_the_wire(conditions.message([condition("ray_died")])[0])
    (told,) = conditions.from_message(message, None)
    problem = codes.RAY_DIED.problem("cause", "remedy")
    assert told == Finding("w1", problem, "w1", "error", confirmed=True)
    (told,) = conditions.from_message(message, "w2")
    assert told.seen_by == "w2", "a worker speaks for itself"


@pytest.mark.parametrize("head", [False, True])
def test_what_a_node_begins_with_is_told_to_nobody(head: bool) -> None:
    board = Board(lambda: None, "w1")
    exchange = ConditionExchange("w1", board, head)
    starting = (codes.RAY_STARTING, codes.LINK_STARTING, codes.HUB_STARTING)
    board.put_all(
        "a", [Finding("w1", c.problem("cause", "x"), blocks_ready=True) for c in starting]
    )
    board.put_all(
        "b", [Finding("w1", codes.RAY_NOT_FOUND.problem("cause", "x"), blocks_ready=True)]
    )
    told = exchange.message()
    assert told is not None
    (seen,) = conditions.from_message(told, None)
    assert seen.problem.code is codes.RAY_NOT_FOUND
    assert not seen.blocks_ready, "it does not block whoever is told of it"


def test_too_much_to_tell_is_the_worst_of_it() -> None:
    rows = [condition("link_parked", "note", "x" * 5000)] * 200 + [condition("ray_died")]
    message, left_out = conditions.message(rows)
    assert left_out == ("all but the 50 worst", "the ends of long texts")
    told = conditions.from_message(over_the_wire(message), None)
    assert told[0].problem.code == codes.RAY_DIED
    assert len(told) == MOST_SENT
    assert conditions.message(rows[-3:-1])[1] == ("the ends of long texts",)
    assert conditions.message(rows[-1:])[1] == ()


@pytest.mark.parametrize("character", ["x", "\u00e4", "\u65e5", "\U0001f600", "\ud83d", "\0", '"'])
def test_whatever_is_said_is_no_message_that_is_too_long(character: str) -> None:
    """Its length as JSON counts: a character may take twelve bytes there."""
    text = character * 5000
    row = Condition(codes.RAY_DIED.problem(text, text), "error", f"w1/{text}", 5.0, text)
    message, _ = conditions.message([row] * 60)
    assert len(messages.encode(message)) < MAX_MESSAGE
    told = conditions.from_message(over_the_wire(message), None)
    assert len(told) == MOST_SENT
    for seen in told:
        assert row.problem.cause.startswith(seen.problem.cause)  # with escapes in it
        assert len(seen.problem.cause) >= TEXT_BYTES // 12
        assert node_of(seen.subject) == "w1"


def test_what_is_not_told_is_said_once() -> None:
    """In a log that would have it at each change else."""
    board = Board(lambda: None, "w1")
    exchange = ConditionExchange("w1", board, False)
    with log_events() as log:
        for number in range(3):
            rows = [
                Finding(f"w1/{n}", codes.RAY_DIED.problem(f"look {number}", "x")) for n in range(60)
            ]
            board.put_all("a", rows)
            assert exchange.message() is not None
    assert [entry["left_out"] for entry in of(log, "message_cut")] == ["all but the 50 worst"]


# -- links


def trips(*spans: tuple[float, float | None]) -> list[tuple[float, float | None]]:
    """A round-trip time every 2 s, over spans of (seconds, milliseconds)."""
    out: list[tuple[float, float | None]] = []
    for seconds, value in spans:
        out += [
            (2.0 * (len(out) + i), None if value is None else value / 1000)
            for i in range(int(seconds / 2))
        ]
    return out


@pytest.mark.parametrize(
    ("spans", "slow"),
    [
        ([(3600, 40)], []),
        ([(60, 1), (20, 400)], [(64, 78)]),
        ([(60, 1), (4, 400), (10, 1), (4, 400), (10, 1)], []),  # never for long enough
        ([(60, 1), (20, 400), (20, 1)], [(64, 78)]),
        ([(60, 1), (20, 100)], []),  # a hundred times as long, and still short
        ([(60, 200), (20, 700)], []),  # half a second more, and less than five times as long
        ([(60, 200), (20, 1200)], [(64, 78)]),
        ([(10, 1), (30, 400)], []),  # no past to speak of
        ([(60, 1), (4, 400), (10, None), (4, 400)], []),  # it went, and came back
        ([(60, 1), (7200, 400)], [(64, 654)]),  # what lasts is usual one day
        ([(60, 1), (300, 400)], [(64, 358)]),
    ],
)
def test_slow(spans: list[tuple[float, float | None]], slow: list[tuple[float, float]]) -> None:
    rules = LinkRules()
    found = [
        now
        for now, trip in trips(*spans)
        if any(
            s.problem.code == codes.LINK_SLOW for s in rules.sample({"w1": LinkSeen({}, trip)}, now)
        )
    ]
    assert found == [float(t) for first, last in slow for t in range(int(first), int(last) + 1, 2)]


@pytest.mark.parametrize("phase", [0.0, 0.4, 0.8, 1.2, 1.6])
@pytest.mark.parametrize("seed", range(4))
def test_slow_is_named_in_time_however_exact_looks_are(phase: float, seed: int) -> None:
    """A look is woken some milliseconds early or late; none of them costs another look."""
    rules, chance = LinkRules(), random.Random(seed)
    begins = 60.0 + phase
    for sample in range(60):
        now = LINKS_INTERVAL * sample + chance.uniform(-0.02, 0.02)
        trip = 0.001 if now < begins else 0.4
        if rules.sample({"w1": LinkSeen({}, trip)}, now):
            break
    assert now - begins <= SLOW_SAMPLES * LINKS_INTERVAL + 0.05


MB = 1_000_000


def loads(*spans: tuple[float, float | None]) -> Iterable[tuple[float, LinkSeen]]:
    """A link every 2 s, over spans of (seconds, bytes a second of a full link; None: not full)."""
    now, arrived = 0.0, 0
    for seconds, rate in spans:
        for _ in range(int(seconds / 2)):
            now += 2.0
            arrived += int(2 * rate) if rate is not None else 1000
            yield now, LinkSeen({}, 0.001, confirmed=arrived, backlog=rate is not None)


@pytest.mark.parametrize(
    ("spans", "thin"),
    [
        ([(600, 40 * MB)], None),
        ([(20, 40 * MB), (20, MB), (20, 40 * MB)], (24, 40)),
        ([(4, 40 * MB), (40, MB)], None),  # no past to speak of
        ([(20, 40 * MB), (20, 5 * MB)], None),  # shared by many, and fast all the same
        ([(20, 3 * MB), (20, MB)], None),  # a third is within reason
        ([(20, 3 * MB), (20, MB // 2)], (24, 40)),
        ([(20, 40 * MB), (20, None), (20, MB), (10, 40 * MB)], (46, 60)),  # hours may be between
        # Never for long enough; what is sent in between, and fits, says nothing.
        ([(20, 40 * MB), (2, MB), (4, 40 * MB), (2, MB), (20, None)], None),
        ([(20, 40 * MB), (2, MB), (4, None), (2, MB), (4, None), (2, MB)], None),
        # Nothing arrives at all: that lane is about to be dropped.
        ([(20, 40 * MB), (20, 0)], None),
        # Nothing more to send: said for a minute on.
        ([(20, 40 * MB), (20, MB), (90, None)], (24, 100)),
        ([(20, 40 * MB), (7200, MB)], (24, 620)),  # what lasts is usual one day
    ],
)
def test_thin(spans: list[tuple[float, float | None]], thin: tuple[float, float] | None) -> None:
    rules = LinkRules()
    found = []
    for now, link in loads(*spans):
        for one in rules.sample({"w1": link}, now):
            assert one.problem.code == codes.LINK_THROUGHPUT_LOW
            found.append(now)
    assert (tuple(found[:1] + found[-1:]) or None) == thin


def test_thin_where_what_arrives_is_known_only_now_and_then() -> None:
    """A queue of seconds makes the answers of the other end rarer than looks."""
    rules, found = LinkRules(), []
    for now in range(2, 60, 2):
        steps = (now - 24) // 6 * 6  # of 0.5 MB/s, every third look
        arrived = 40 * MB * now if now <= 24 else 960 * MB + steps * MB // 2
        if rules.sample({"w1": LinkSeen({}, 0.001, "", arrived, True)}, float(now)):
            found.append(now)
    assert found == list(range(30, 60, 2))


@pytest.mark.parametrize("phase", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("step", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_thin_is_seen_from_when_its_answers_came(step: float, phase: float) -> None:
    """The first look after it still finds what came fast, and no answer for seconds after that."""
    rules, begins = LinkRules(), 24.0
    answers = [number / 10 for number in range(int(begins * 10) + 1)]
    answers += [begins + step * number for number in range(1, int(20 / step))]
    arrived = {at: int(6 * MB * at - max(0.0, at - begins) * 5.5 * MB) for at in answers}
    for sample in range(20):
        now = phase + 2.0 * sample
        at = max(a for a in answers if a <= now)
        if rules.sample({"w1": LinkSeen({}, 0.001, "", arrived[at], True, at)}, now):
            break
    assert THIN_SECONDS <= now - begins <= THIN_SECONDS + step + LINKS_INTERVAL


def test_a_lane_less_is_not_thin() -> None:
    """Its bytes no longer count; and while there is none, nothing can be said."""
    rules = LinkRules()
    for now in range(2, 30, 2):
        assert rules.sample({"w1": LinkSeen({}, None, "", 80 * MB * now, True)}, float(now)) == []
    later: list[tuple[int, int | None]] = [(30, 5 * MB), (32, None), (34, 6 * MB), (36, 100 * MB)]
    for now, there in later:
        assert rules.sample({"w1": LinkSeen({}, None, "", there, True)}, float(now)) == []


@pytest.mark.parametrize(
    ("lost_at", "flaps"),
    [
        ([10, 20, 30], None),
        ([10, 20, 30, 40], (40, 100)),
        ([10, 50, 90, 128], (128, 188)),
        ([10, 60, 110, 160], None),
        ([10, 20, 30, 40, 80], (40, 140)),
    ],
)
def test_flapping(lost_at: list[float], flaps: tuple[float, float] | None) -> None:
    rules = LinkRules()
    count = 7  # of before
    found = []
    for now in range(0, 300, 2):
        count += now in lost_at
        losses = {"bulk": count, "interactive": 3}
        for one in rules.sample({"w1": LinkSeen(losses, None, "reset")}, float(now)):
            assert (one.subject, one.problem.code) == ("w1/bulk", codes.LANE_FLAPPING)
            assert "most recently because: reset" in one.problem.cause
            found.append(now)
    assert (found[0], found[-1]) == flaps if flaps else found == []


# -- the machine


FINE = MachineSeen(
    listeners=100, others=2, limit=1024, disks={"/tmp/ray": (50, 100)}, listening=(22, 20054),
    workers=range(20054, 20062),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({}, None, ""),
        ({"limit": -1, "listeners": 10_000}, None, ""),
        ({"limit": 256}, "descriptors_low", "may open 256 files, but the plan needs 292"),
        ({"others": 20}, "descriptors_low", "20 other nodes"),
        ({"disks": {"/tmp/ray": (6, 100)}}, None, ""),
        ({"disks": {"/tmp/ray": (4_000_000, 100_000_000)}}, "disk_nearly_full", "96 % full (4 MB"),
        ({"disks": {}}, None, ""),
        ({"listening": range(20053, 20070)}, "ray_worker_ports_exhausted", "all 8 ports"),
        ({"listening": range(20054, 20061)}, None, ""),
        ({"listening": range(20053, 20070), "workers": range(0)}, None, ""),
    ],
)
def test_what_the_machine_is_short_of(changes: dict[str, Any], code: str | None, said: str) -> None:
    found = machine_watch.judge(replace(FINE, **changes))
    assert [problem.code.name for problem in found] == ([code] if code else [])
    assert not code or said in found[0].cause


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    import socket

    plan = NodePlan("w1", "worker", "127.77.0.2", 20046, 8)
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen_ = machine_watch.sample(5, [plan, plan], plan, [f"{tmp_path}/not/there"], True)
        assert server.getsockname()[1] in seen_.listening
    ((free, total),) = seen_.disks.values()
    assert 0 < free < total
    assert seen_.limit > 100
    assert list(seen_.workers) == list(range(20054, 20062))
    assert not machine_watch.sample(5, [plan], plan, [], False).workers
