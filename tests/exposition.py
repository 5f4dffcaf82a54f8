"""What a daemon exposes, held against docs/metrics.md and the dashboard."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.promql import Query, QueryError, Series

DOCS = Path(__file__).parents[1] / "docs"
Row = tuple[str, frozenset[str]]
"""A metric's type and labels."""

_SUFFIXES = {"histogram": ("_bucket", "_count", "_sum")}


def documented() -> dict[str, Row]:
    """The table, by the metric's name."""
    rows = re.findall(r"(?m)^\| `(\w+)` \| (\w+) \|([^|]*)\|", (DOCS / "metrics.md").read_text())
    table = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(table) == len(rows), "a metric is documented twice"
    return table


def exposed(text: str) -> dict[str, Row]:
    """The metrics of an exposition that have a sample, named as the table names them."""
    found: dict[str, Row] = {}
    for family in text_string_to_metric_families(text):
        if family.samples:
            labels = frozenset(label for sample in family.samples for label in sample.labels)
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = (family.type, labels)
    return found


def series(*texts: str) -> Series:
    """Every sample's name with its labels and the values that they have."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = found[sample.name]
                for label, value in sample.labels.items():
                    labels[label].add(value)
    return {n: {k: frozenset(v) for k, v in labels.items()} for n, labels in found.items()}


def dashboard() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DOCS / "rayfwd-dashboard.json").read_text())
    return data


def dashboard_mistakes(there: Series) -> list[str]:
    """What of the dashboard's queries and legends the series there are do not answer."""
    wrong = []
    queries = 0
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            queries += 1
            try:
                query = Query(target["expr"], there)
            except QueryError as exc:
                wrong.append(f"{panel['title']}: {exc}")
                continue
            for label in re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"]):
                if label not in query.labels:
                    wrong.append(f"{panel['title']}: the result of {query.text} has no {label}")
            if not all("instance" in [m[0] for m in s.matchers] for s in query.selectors):
                wrong.append(f"{panel['title']}: {query.text} does not heed the choice of nodes")
    assert queries > 20
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert match is not None, variable
            if match[2] not in Query(match[1], there).labels:
                wrong.append(f"{variable['name']}: no label {match[2]}")
    return wrong
