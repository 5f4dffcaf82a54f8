"""What of ours dials Ray goes where no stranger can listen, or nowhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.problems import Problem, ProblemError
from rayfwd.session.target import Target
from rayfwd.transport import listeners as listeners_module
from rayfwd.transport.endpoints import Endpoints
from rayfwd.transport.listeners import Listeners
from tests.unit.cluster import free_place
from tests.unit.loops import log_events, of, run, until
from tests.unit.other_user import NOBODY, child, needs_root
from tests.unit.ports import free_port
from tests.unit.test_sockdiag import LISTEN


def node_at(place: Target, name: str = "gpu-2", advertised: bool = False) -> NodePlan:
    return NodePlan(name, "worker", place.address, place.port, 8, advertised)


@asynccontextmanager
async def at_work() -> AsyncIterator[Listeners]:
    listeners = Listeners(lambda _target, relay: relay.refuse())
    running = asyncio.create_task(listeners.run())
    await asyncio.sleep(0)
    try:
        yield listeners
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def refused(endpoints: Endpoints, node: NodePlan, own: NodePlan | None = None) -> Problem:
    with pytest.raises(ProblemError) as caught:
        endpoints.to(node, node.base, own)
    return caught.value.problem


def test_another_node_by_a_listener_of_ours_that_is_open() -> None:
    async def main() -> None:
        place = free_place()
        async with at_work() as listeners:
            endpoints = Endpoints(listeners)
            assert refused(endpoints, node_at(place)).code == codes.LISTENER_BLOCKED
            listeners.set_wanted({place: place})
            await until(lambda: listeners.open)
            assert endpoints.to(node_at(place), place.port, None) == place
            listeners.set_wanted({})
            await until(lambda: not listeners.open)
            assert refused(endpoints, node_at(place)).code == codes.LISTENER_BLOCKED

    run(main)


def test_one_that_is_reached_directly() -> None:
    async def main() -> None:
        async with at_work() as listeners:
            there = node_at(Target("192.0.2.7", 20000), advertised=True)
            assert Endpoints(listeners).to(there, 20000, None) == ("192.0.2.7", 20000)

    run(main)


@needs_root
def test_not_where_somebody_was_first_and_he_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners_module, "RETRY_FIRST", 0.05)
    reconcile, tries = Listeners._reconcile, 0

    async def counted(self: Listeners) -> None:
        nonlocal tries
        tries += 1
        await reconcile(self)

    monkeypatch.setattr(Listeners, "_reconcile", counted)

    async def main() -> None:
        place = free_place()
        async with at_work() as listeners:
            with log_events() as log, child(LISTEN, *place, uid=NOBODY) as squatter:
                squatter.says()
                listeners.set_wanted({place: place})
                await until(lambda: listeners.blocked)
                problem = refused(Endpoints(listeners), node_at(place))
                assert problem.code == codes.LISTENER_BLOCKED
                assert "by user nobody (python" in problem.cause
                assert f"pid {squatter.pid})" in problem.cause
                before = tries
                await until(lambda: tries > before + 3)
                assert len(of(log, "listener_blocked")) == 1
            await until(lambda: listeners.open)
            assert Endpoints(listeners).to(node_at(place), place.port, None) == place

    run(main)


class TestOurOwnAddress:
    def test_where_nobody_listens_or_we_do(self) -> None:
        async def main() -> None:
            place = free_place()
            own = node_at(place)
            async with at_work() as listeners:
                endpoints = Endpoints(listeners)
                assert endpoints.to(own, place.port, own) == place
                with child(LISTEN, *place) as ray:
                    ray.says()
                    assert endpoints.to(own, place.port, own) == place
                    assert os.geteuid() != NOBODY

        run(main)

    @needs_root
    @pytest.mark.parametrize("at", ["the address", "all addresses"])
    def test_not_where_another_user_does(self, at: str) -> None:
        async def main() -> None:
            place = Target(free_place().address, free_port("0.0.0.0"))
            own = node_at(place)
            listen = place if at == "the address" else Target("0.0.0.0", place.port)
            async with at_work() as listeners:
                with child(LISTEN, *listen, uid=NOBODY) as squatter:
                    squatter.says()
                    problem = refused(Endpoints(listeners), own, own)
                    assert problem.code == codes.PORT_IN_USE
                    assert "user nobody" in problem.cause

        run(main)
