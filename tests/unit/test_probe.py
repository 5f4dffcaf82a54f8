"""The dialling of ports: what each way of failing is called, and what is said of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from rayfwd import codes
from rayfwd.cluster import probe
from rayfwd.cluster.plan import NodePlan
from rayfwd.daemon.advertise import AdvertiseCheck, DialBackAttempts
from rayfwd.problems import ProblemError
from rayfwd.session import messages
from rayfwd.session.messages import Message
from tests.unit.cluster import free_place
from tests.unit.loops import run

NONCE = "0123456789abcdef" * 2
PLAN = NodePlan("gpu-1", "worker", "203.0.113.7", 20046, 40, advertised=True)


def test_listeners_answer_with_their_nonce_and_leave_no_trace() -> None:
    async def body() -> None:
        place = free_place()
        ports = [place.port, free_place().port]
        async with probe.HeldPorts(place.address, ports, NONCE) as held:
            assert not held.translated
            results = await probe.dial_all(place.address, ports, NONCE)
            assert set(results.values()) == {probe.ANSWERED}
            assert set(results) == set(ports)
            other = "f" * 32
            assert await probe.dial(place.address, ports[0], other) == probe.STRANGER
        assert await probe.dial(place.address, ports[0], NONCE) == probe.REFUSED
        # As Ray binds: a connection in TIME_WAIT would be in its way.
        for port in ports:
            with socket.socket() as plain:
                plain.bind((place.address, port))

    run(body)


def test_an_address_that_no_interface_has_is_listened_for_everywhere() -> None:
    async def body() -> None:
        place = free_place()
        async with probe.HeldPorts("192.0.2.1", [place.port], NONCE) as held:
            assert held.translated
            assert await probe.dial(place.address, place.port, NONCE) == probe.ANSWERED

    run(body)


def test_a_port_in_use_is_named() -> None:
    async def body() -> None:
        place = free_place()
        with socket.create_server(place), pytest.raises(ProblemError) as caught:
            async with probe.HeldPorts(place.address, [free_place().port, place.port], NONCE):
                pass
        assert caught.value.problem.code == codes.PORT_IN_USE
        assert str(place.port) in caught.value.problem.cause

    run(body)


@pytest.mark.parametrize(
    ("said", "outcome", "greeting"),
    [
        (b"220 mail\r\n" + b"x" * 40, probe.STRANGER, probe.ANSWERED),
        (b"", probe.STRANGER, probe.RESET),
    ],
)
def test_other_programs(said: bytes, outcome: str, greeting: str) -> None:
    async def body() -> None:
        place = free_place()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(said)
            writer.close()

        server = await asyncio.start_server(handle, *place)
        assert await probe.dial(place.address, place.port, NONCE) == outcome
        assert await probe.greets(place.address, place.port) == greeting
        server.close()
        assert await probe.greets(place.address, place.port) == probe.REFUSED

    run(body)


def test_a_server_that_waits_for_its_client_is_silent() -> None:
    async def body() -> None:
        place = free_place()
        with socket.create_server(place):
            assert await probe.greets(place.address, place.port, 0.2) == probe.SILENT

    run(body)


def test_a_full_backlog_is_as_good_as_dropped() -> None:
    """Nobody accepts and the queue is full: SYNs are dropped, as by a firewall."""

    async def body() -> None:
        place = free_place()
        with socket.socket() as server:
            server.bind(place)
            server.listen(0)
            with socket.create_connection(place):
                assert await probe.greets(place.address, place.port, 0.3) == probe.DROPPED

    run(body)


def results(outcome: str, *others: tuple[str, range]) -> dict[int, str]:
    found = dict.fromkeys(probe.sample(PLAN), outcome)
    for other, ports in others:
        found |= {port: other for port in ports if port in found}
    return found


@pytest.mark.parametrize(
    ("seen", "code", "said"),
    [
        (results("answered"), None, ""),
        (results("dropped"), "advertise_dropped", "20046 (the raylet), 20047 (the object manager)"),
        (results("refused"), "advertise_refused", "20054-20093 (workers) are refused"),
        (results("stranger"), "advertise_wrong_machine", "another program or machine answers"),
        (results("unroutable"), "advertise_unroutable", "no route"),
        (
            results("answered", ("dropped", range(20060, 20094))),
            "advertise_dropped",
            "20060-20093 (workers) are dropped (no answer in 3 s); 12 other ports answer",
        ),
        # The one that tells most, however few there are.
        (
            results("refused", ("stranger", range(20047, 20048))),
            "advertise_wrong_machine",
            "20047 (the object manager)",
        ),
    ],
)
def test_what_is_said_of_a_dial_back(seen: dict[int, str], code: str | None, said: str) -> None:
    problem = probe.judge_dial_back(PLAN, seen)
    assert (problem.code.name if problem else None) == code
    if problem is not None:
        assert said in problem.cause
        assert "203.0.113.7" in problem.cause
        assert "ray.advertise_check = false" in problem.remedy


def test_what_is_said_of_a_self_dial() -> None:
    assert probe.judge_self_dial(PLAN, results("answered")) is None
    problem = probe.judge_self_dial(PLAN, results("dropped"), translated=True)
    assert problem is not None
    assert problem.code == codes.ADVERTISE_SELF_UNREACHABLE
    assert "NAT" in problem.cause
    assert "from 203.0.113.7/32 to ports 20046-20093" in problem.remedy
    assert "ip saddr 203.0.113.7 tcp dport 20046-20093 accept" in problem.remedy


def test_a_large_block_is_dialled_in_part() -> None:
    plan = NodePlan("w", "worker", "203.0.113.7", 20046, 5000, advertised=True)
    ports = probe.sample(plan)
    assert len(ports) == messages.MOST_PORTS
    assert set(plan.services.values()) <= set(ports) <= set(plan.ports)
    assert {plan.first_worker_port, plan.last_worker_port} <= set(ports)


class Ends:
    """A worker's check and a head's dial-back, joined."""

    def __init__(self, plan: NodePlan, can: bool = True, answers: bool = True) -> None:
        self.plan = plan
        self.heard: list[Message] = []
        self.dial_back = DialBackAttempts()
        self.answers = answers
        features = frozenset({"dial_back"}) if can else frozenset[str]()
        self.check = AdvertiseCheck(self.to_head, lambda: features)

    def to_head(self, message: Message) -> bool:
        self.heard.append(message)
        if isinstance(message, messages.DialBack) and self.answers:
            self.dial_back.asked(self.plan, message, self.to_worker)
        return True

    def to_worker(self, message: Message) -> bool:
        came = messages.decode(messages.encode(message))
        assert isinstance(came, messages.DialledBack)
        self.check.answered(came)
        return True


def here() -> NodePlan:
    """A node whose advertised address is this process's own."""
    return NodePlan("w", "worker", free_place().address, 20046, 8, advertised=True)


def test_the_check_end_to_end() -> None:
    async def body() -> None:
        ends = Ends(here())
        await ends.check.run(ends.plan)
        assert [message.TYPE for message in ends.heard] == ["dial_back"]
        await ends.dial_back.close()

    run(body)


def test_another_machines_address_is_found_out() -> None:
    """The hub dials an address where nobody listens for it."""

    async def body() -> None:
        ends = Ends(here())
        ends.plan = NodePlan("w", "worker", "127.0.0.99", 20046, 8, advertised=True)
        with pytest.raises(ProblemError) as caught:
            await ends.check.run(here())
        assert caught.value.problem.code == codes.ADVERTISE_REFUSED
        await ends.dial_back.close()

    run(body)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayfwd.daemon.advertise.ANSWER_WAIT", 0.2)

    async def body() -> None:
        ends = Ends(here(), answers=False)
        with pytest.raises(ProblemError) as caught:
            await ends.check.run(ends.plan)
        assert caught.value.problem.code == codes.ADVERTISE_UNCHECKED

    run(body)


def test_an_older_hub_is_not_asked() -> None:
    async def body() -> None:
        ends = Ends(here(), can=False)
        await ends.check.run(ends.plan)
        assert ends.heard == []

    run(body)


GOOD = {"type": "dial_back", "id": 1, "ports": [20046], "nonce": NONCE}


def bad_requests() -> Iterator[dict[str, Any]]:
    wrong: dict[str, tuple[Any, ...]] = {
        "id": (None, 0, -1, True, 1 << 60, "1", 1.5),
        "nonce": (None, "", "zz", NONCE.upper(), NONCE + "0", 5),
        "ports": (None, [], [22], [20045], [20046.0], [True], "20046", [20046] * 300, {}),
    }
    for key, values in wrong.items():
        for value in values:
            yield {**GOOD, key: value}
        yield {k: v for k, v in GOOD.items() if k != key}


@pytest.mark.parametrize("request_", list(bad_requests()))
def test_a_head_dials_nothing_but_the_nodes_own_ports(request_: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        DialBackAttempts().asked(PLAN, messages.DialBack.from_wire(request_), lambda message: True)


def test_a_head_dials_no_node_that_is_reached_through_the_link() -> None:
    plan = NodePlan("gpu-1", "worker", "127.77.0.2", 20046, 40)
    with pytest.raises(ValueError, match="advertises"):
        DialBackAttempts().asked(plan, messages.DialBack.from_wire(GOOD), lambda message: True)


@pytest.mark.parametrize(
    "answer",
    [
        *(None, [], {}, {"20046": "answered"}, {"x": "answered", "20047": "answered"}),
        {"20046": "fine", "20047": "answered"},
        {"20046": [], "20047": "answered"},
    ],
)
def test_results_that_are_none(answer: Any) -> None:
    with pytest.raises(ValueError):
        probe.read_results(answer, [20046, 20047])
