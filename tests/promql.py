"""Enough of PromQL to hold a dashboard's queries against an exposition.

A query is parsed by PromQL's own grammar, as far as the dashboard uses it; anything else is an
error. What comes of it is the selectors in it and the labels that its result has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

TARGET_LABELS = frozenset({"instance", "job"})
"""Prometheus itself adds these to every series."""

AGGREGATIONS = frozenset({"sum", "min", "max", "avg", "count"})
OVER_COUNTERS = frozenset({"rate", "increase"})
FUNCTIONS = OVER_COUNTERS | {"histogram_quantile", "time", "vector"}
BINARY = (
    frozenset({"or"}),
    frozenset({"and", "unless"}),
    frozenset({"==", "!=", "<=", "<", ">=", ">"}),
    frozenset({"+", "-"}),
    frozenset({"*", "/", "%"}),
)

_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>\d+(?:\.\d+)?)|(?P<word>[a-zA-Z_:][\w:]*)'
    r"|(?P<range>\[\$__\w+\])|(?P<op>==|!=|<=|>=|=~|!~|[-+*/%<>=(){},]))"
)

Series = Mapping[str, Mapping[str, frozenset[str]]]
"""Of an exposition: a sample's name to its labels to the values that they have."""


@dataclass
class Selector:
    name: str
    matchers: list[tuple[str, str, str]] = field(default_factory=list)
    ranged: bool = False


@dataclass
class Result:
    """What an expression gives: its labels, and the one selector that it is, if it is one."""

    labels: frozenset[str]
    selector: Selector | None = None


class QueryError(Exception):
    """A query that is wrong, or that nothing answers."""


class Query:
    """A query, parsed against the series there are. Raises QueryError."""

    def __init__(self, text: str, series: Series) -> None:
        self.text = text
        self.selectors: list[Selector] = []
        self._series = series
        self._tokens = self._split(text)
        self._at = 0
        self.labels = self._binary(0).labels
        if self._at < len(self._tokens):
            raise self._wrong(f"{self._tokens[self._at]} is not expected")

    def _wrong(self, why: str) -> QueryError:
        return QueryError(f"{self.text}: {why}")

    def _split(self, text: str) -> list[str]:
        tokens, at = [], 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise self._wrong(f"{text[at:]!r} is not PromQL")
            tokens.append(match.group().strip())
            at = match.end()
        return tokens

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, expected: str | None = None) -> str:
        token = self._peek()
        if not token or (expected is not None and token != expected):
            raise self._wrong(f"{expected or 'more'} is expected, not {token or 'the end'}")
        self._at += 1
        return token

    def _binary(self, level: int) -> Result:
        if level == len(BINARY):
            return self._unary()
        left = self._binary(level + 1)
        while self._peek() in BINARY[level]:
            self._take()
            on, grouped = self._matching()
            right = self._binary(level + 1)
            left = Result(self._joined(left, right, on, grouped))
        return left

    def _matching(self) -> tuple[frozenset[str] | None, frozenset[str]]:
        if self._peek() != "on":
            return None, frozenset()
        self._take()
        on, grouped = self._names(), frozenset[str]()
        if self._peek() == "group_left":
            self._take()
            grouped = self._names()
        return on, grouped

    def _joined(
        self, left: Result, right: Result, on: frozenset[str] | None, grouped: frozenset[str]
    ) -> frozenset[str]:
        if on is not None:
            for side in (left, right):
                if not on <= side.labels:
                    raise self._wrong(f"on ({', '.join(sorted(on))}): a side lacks one")
            if not grouped <= right.labels:
                raise self._wrong("group_left: the right side lacks one")
            return left.labels | grouped
        # Two vectors match by all their labels; one without any is a number here.
        if left.labels and right.labels and left.labels != right.labels:
            raise self._wrong(f"{sorted(left.labels)} never match {sorted(right.labels)}")
        return left.labels or right.labels

    def _unary(self) -> Result:
        if self._peek() == "-":
            self._take()
            return Result(self._unary().labels)
        return self._primary()

    def _primary(self) -> Result:
        token = self._take()
        if token == "(":
            inner = self._binary(0)
            self._take(")")
            return inner
        if token[0].isdigit():
            return Result(frozenset())
        if not re.match(r"[a-zA-Z_:]", token):
            raise self._wrong(f"{token} is not expected")
        if token in AGGREGATIONS:
            return self._aggregation()
        if self._peek() == "(":
            return self._function(token)
        return self._selector(token)

    def _aggregation(self) -> Result:
        by: frozenset[str] = frozenset()
        if self._peek() == "by":
            self._take()
            by = self._names()
        self._take("(")
        inner = self._binary(0)
        self._take(")")
        if missing := by - inner.labels:
            raise self._wrong(f"by ({', '.join(sorted(missing))}): there is no such label")
        return Result(by)

    def _function(self, name: str) -> Result:
        if name not in FUNCTIONS:
            raise self._wrong(f"{name} is no function known here")
        self._take("(")
        args = []
        while self._peek() != ")":
            args.append(self._binary(0))
            if self._peek() != ")":
                self._take(",")
        self._take(")")
        if name in {"time", "vector"}:
            return Result(frozenset())
        last = args[-1]
        if name in OVER_COUNTERS:
            if last.selector is None or not last.selector.ranged:
                raise self._wrong(f"{name} is of a selector with a range")
            if not re.search(r"_(total|count|sum|bucket)$", last.selector.name):
                raise self._wrong(f"{name} of {last.selector.name}, which is no counter")
        if name == "histogram_quantile":
            if "le" not in last.labels:
                raise self._wrong("histogram_quantile: le is lost")
            return Result(last.labels - {"le"})
        return Result(last.labels)

    def _selector(self, name: str) -> Result:
        found = Selector(name)
        self.selectors.append(found)
        if name not in self._series:
            raise self._wrong(f"there is no metric {name}")
        labels = frozenset(self._series[name]) | TARGET_LABELS
        if self._peek() == "{":
            self._take()
            while self._peek() != "}":
                found.matchers.append(self._matcher(name, labels))
                if self._peek() != "}":
                    self._take(",")
            self._take("}")
        if self._peek().startswith("["):
            self._take()
            found.ranged = True
        return Result(labels, found)

    def _matcher(self, name: str, labels: frozenset[str]) -> tuple[str, str, str]:
        label, op, value = self._take(), self._take(), self._take()
        if op not in {"=", "!=", "=~", "!~"} or not value.startswith('"'):
            raise self._wrong(f"{label}{op}{value} is no matcher")
        if label not in labels:
            raise self._wrong(f"{name} has no label {label}")
        text = value[1:-1]
        if (
            op in {"=", "!="}
            and label not in TARGET_LABELS
            and text not in self._series[name][label]
        ):
            raise self._wrong(f"{name} never has {label}={value}")
        return label, op, text

    def _names(self) -> frozenset[str]:
        self._take("(")
        names = set()
        while self._peek() != ")":
            names.add(self._take())
            if self._peek() != ")":
                self._take(",")
        self._take(")")
        return frozenset(names)
