"""Control messages: what goes over the wire, what is no message, and what is cut to be one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pytest

from rayfwd.ray.cluster_report import MOST_DEAD, ClusterReport
from rayfwd.ray.nodes import NodeSeen
from rayfwd.session import messages
from rayfwd.session.frames import MAX_MESSAGE
from rayfwd.session.messages import TYPES, ConditionTold, Handlers, Message, decode, encode

PROTOCOL = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()

TOLD = ConditionTold("ray_died", "error", "w1/raylet", "it is gone", "look", "w1")

EXAMPLES: list[Message] = [
    messages.Nodes(({"name": "head"}, {"name": "w1"})),
    messages.NodesChanged(({"name": "w2"},), ("w1",)),
    messages.HeadVersions("2.60.0", "3.11.7"),
    messages.HeadVersions(None, None),
    messages.HeadRay("up", "0123456789abcdef"),
    messages.Cluster({"nodes": []}),
    messages.Conditions((TOLD, TOLD)),
    messages.Conditions(()),
    messages.Auth("token", "sesame"),
    messages.Auth("off", None),
    messages.Ray("up", "2.60.0", None),
    messages.DialBack(7, (20046, 20047), "0123456789abcdef" * 2),
    messages.DialledBack(7, {20046: "answered", 20047: "refused"}),
    messages.OpenPorts(False, (29500, 41000), ()),
    messages.OpenPortsOf({"w1": messages.OpenPorts(False, (29500,), (41000,)), "w2": None}),
    messages.DialRefused("w1", 41000, 3),
    messages.SayAgain(),
    messages.Leaving(),
]


def test_there_is_an_example_of_each() -> None:
    assert {example.TYPE for example in EXAMPLES} == set(TYPES)


@pytest.mark.parametrize("message", EXAMPLES, ids=repr)
def test_messages_go_over_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message
    body = json.loads(encode(message))
    assert body["type"] == message.TYPE
    assert decode(json.dumps({**body, "of a later version": 5}).encode()) == message


def test_an_earlier_version_is_understood() -> None:
    """As 0.1.0 writes them."""
    said = b'{"type": "ray", "phase": "up", "version": null, "python": null}'
    assert decode(said) == messages.Ray("up", None, None)
    said = b'{"type": "dialled_back", "id": 1, "results": {"20046": "answered"}}'
    assert decode(said) == messages.DialledBack(1, {20046: "answered"})
    said = b'{"type": "ray_auth", "mode": "off", "token": null}'
    assert decode(said) == messages.Auth("off", None)


@pytest.mark.parametrize("body", [{}, {"type": None}, {"type": ["nodes"]}, {"type": "later"}])
def test_an_unknown_type_is_left_out(body: Any) -> None:
    assert decode(json.dumps(body).encode()) is None


def test_the_token_is_in_no_repr() -> None:
    assert "sesame" not in repr(messages.Auth("token", "sesame"))


def bad_bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each type: fields that are not there, and fields that are something else."""
    optional = {"head_versions", "ray"}, {"ray_auth": {"token"}, "head_ray": {"start"}}
    for example in EXAMPLES:
        body = example.to_wire()
        for key in body.keys() - {"type"}:
            missing = {k: v for k, v in body.items() if k != key}
            if example.TYPE not in optional[0] and key not in optional[1].get(example.TYPE, set()):
                yield f"{example.TYPE}: ", missing
            for other in (5.5, [5], {"x": [5]}, True):
                yield f"{example.TYPE}: ", {**body, key: other}
    row = TOLD.to_wire()
    for key in row:
        bad = [{k: v for k, v in row.items() if k != key}]
        if key != "severity":  # another version's is taken for its code's own
            bad.append({**row, key: 5})
        for each in bad:
            yield f"conditions: {key}", {"type": "conditions", "conditions": [each]}
    bad_code = {"type": "conditions", "conditions": [{**row, "code": "sudo rm"}]}
    yield "conditions: 'sudo rm' is no code", bad_code


def _is_one(kind: str, body: Mapping[str, Any]) -> bool:
    """What is said of its contents is known elsewhere."""
    if kind == "dial_back: ":
        return body.get("ports") == [5]
    if kind == "open_ports: ":
        return body.get("anew") is True or [5] in (body.get("opened"), body.get("closed"))
    return kind == "cluster: " and isinstance(body.get("report"), dict)


@pytest.mark.parametrize(("why", "body"), [b for b in bad_bodies() if not _is_one(*b)])
def test_what_is_no_message(why: str, body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(why)}"):
        decode(json.dumps(body).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000])
def test_what_is_no_object(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode(data)


def test_long_texts_are_cut_by_who_is_told() -> None:
    body = {"type": "ray", "phase": "x" * 1000}
    assert decode(json.dumps(body).encode()) == messages.Ray("x" * 64, None, None)
    row = {**TOLD.to_wire(), "cause": "y" * 5000, "seen_by": "z" * 5000}
    told = decode(json.dumps({"type": "conditions", "conditions": [row] * 60}).encode())
    assert isinstance(told, messages.Conditions)
    assert told.conditions == (replace(TOLD, cause="y" * 2000, seen_by="z" * 200),) * 50


def test_a_handler_gets_its_type_and_nothing_else() -> None:
    heard: list[tuple[str, str]] = []

    def hear(message: messages.HeadRay, node: str) -> None:
        heard.append((message.phase, node))

    handlers = Handlers[[str]]().on(messages.HeadRay, hear)
    for example in EXAMPLES:
        handlers(example, "w1")
    assert heard == [("up", "w1")]
    with pytest.raises(AssertionError, match="head_ray has a handler"):
        handlers.on(messages.HeadRay, hear)


# -- the document


WORDS = {
    "str": "text",
    "str | None": "text or null",
    "int": "number",
    "bool": "true or false",
    "tuple": "list",
    "Mapping": "object",
}


def in_words(of: type) -> list[str]:
    """The fields of a message, as docs/protocol.md has them."""
    hints = get_type_hints(of)

    def word(name: str) -> str:
        origin = get_origin(hints[name])
        collection = getattr(origin, "__name__", "") if origin in (tuple, Mapping) else ""
        return WORDS[collection or getattr(hints[name], "__name__", str(hints[name]))]

    return [f"`{f.name}`: {word(f.name)}" for f in fields(of)]


def test_the_document_has_every_message_and_no_other() -> None:
    _, _, table = PROTOCOL.partition("| `type` | from | fields | which says |\n|---|---|---|---|\n")
    rows = [line.split(" | ", 3) for line in table.partition("\n\n")[0].splitlines()]
    documented = [(name.strip("| `"), by, said.strip(" |")) for name, by, said, *_ in rows]
    assert documented == [
        (name, of.SENDER, ", ".join(in_words(of)) or "none") for name, of in TYPES.items()
    ]


def test_the_document_has_every_field_of_a_condition() -> None:
    _, _, table = PROTOCOL.partition("| field | |\n|---|---|\n")
    rows = [line.strip("| ").split(" | ")[0] for line in table.partition("\n\n")[0].splitlines()]
    assert rows == in_words(ConditionTold)


# -- a report that is too long


def node(number: int, state: str, resources: int, **more: Any) -> NodeSeen:
    names = {f"custom_resource_{i:02d}": 1.0 for i in range(resources)}
    if resources:  # as Ray has them of itself
        names |= {"CPU": 8.0, "GPU": 1.0, "memory": 22174260992.0, "node:127.77.0.2": 1.0}
        names |= {"object_store_memory": 9503254732.0, "accelerator_type:A100": 1.0}
    lost = "Unexpected termination: health check failed due to missing too many heartbeats"
    base = NodeSeen(f"{number:056x}", "127.77.0.2", number == 0, state, names, 5.0, message=lost)
    return replace(base, **more)


def told(report: ClusterReport) -> tuple[ClusterReport, tuple[str, ...]]:
    """What a worker hears of a report, and what it does not."""
    message, left_out = report.message()
    assert len(encode(message)) <= MAX_MESSAGE
    heard = decode(encode(message))
    assert isinstance(heard, messages.Cluster)
    return ClusterReport.from_wire(heard.report), left_out


TOTALS = {"CPU": (1.0, 16.0)}
LIVING = (node(0, "ALIVE", 24), node(1, "ALIVE", 24))


def test_a_short_report_is_told_whole() -> None:
    dead = [node(number, "DEAD", 24, ended=9.0) for number in range(2, 2 + MOST_DEAD)]
    report = ClusterReport(5.0, TOTALS, (*LIVING, *dead))
    assert told(report) == (report, ())


def test_of_dead_nodes_the_last_are_told() -> None:
    """GCS keeps a thousand; as messages they would be over 1 MiB."""
    dead = [node(number, "DEAD", 24, ended=2000.0 - number) for number in range(2, 1002)]
    report = ClusterReport(5.0, TOTALS, (*LIVING, *dead))
    assert len(encode(messages.Cluster(report.to_wire()))) > MAX_MESSAGE
    heard, left_out = told(report)
    assert heard == replace(report, nodes=(*LIVING, *dead[:MOST_DEAD]))
    assert left_out == ("dead nodes but the last 100",)


def test_of_dead_nodes_whose_end_is_not_told_the_later_rows_are() -> None:
    dead = tuple(node(number, "DEAD", 0) for number in range(2, 202))
    heard, _ = told(ClusterReport(5.0, TOTALS, (*LIVING, *dead)))
    assert heard.nodes == (*LIVING, *dead[-MOST_DEAD:])


@pytest.mark.parametrize(
    ("alive", "dead", "totals", "left_out", "has"),
    [
        ((2, 24), (100, 1000), 1, ["the resources of dead nodes"], "aartd"),
        ((800, 20), (100, 1000), 1, ["the resources of dead nodes", "dead nodes"], "art"),
        (
            (1500, 40),
            (100, 1000),
            1,
            ["the resources of dead nodes", "dead nodes", "the resources of nodes"],
            "at",
        ),
        (
            (2, 24),
            (0, 0),
            50_000,
            [
                "the resources of dead nodes",
                "dead nodes",
                "the resources of nodes",
                "the totals of resources",
            ],
            "a",
        ),
    ],
)
def test_what_matters_least_is_left_out_first(
    alive: tuple[int, int], dead: tuple[int, int], totals: int, left_out: list[str], has: str
) -> None:
    rows = [node(number, "ALIVE", alive[1]) for number in range(alive[0])]
    rows += [node(number, "DEAD", dead[1], message="x" * 5000) for number in range(dead[0])]
    all_totals = {f"custom_resource_{i}": (0.0, 1.0) for i in range(totals)}
    heard, without = told(ClusterReport(5.0, all_totals, tuple(rows)))
    assert without == tuple(left_out)
    living = [row for row in heard.nodes if row.state == "ALIVE"]
    assert len(living) == alive[0], "what lives is told of, whatever it has"
    assert bool(living[0].resources_total) == ("r" in has)
    assert (len(heard.nodes) > len(living)) == ("d" in has)
    assert bool(heard.totals) == ("t" in has)
