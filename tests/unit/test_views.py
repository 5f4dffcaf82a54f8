"""How a link looks to the rules that watch it: two real sessions joined by sockets."""

from __future__ import annotations

import pytest

from rayfwd.daemon.views import lanes_of, link_seen
from rayfwd.session import lane as lane_module
from rayfwd.session.lane import LaneClass
from rayfwd.transport.linkstats import LinkStats
from tests.unit.cluster import BULK, INTERACTIVE
from tests.unit.loops import run_on_fake_clock as run
from tests.unit.loops import until
from tests.unit.test_mux import Owner, pair

DATA = bytes(1 << 20)
"""Long: it goes by a bulk lane, if there is one."""


@pytest.mark.parametrize("kinds", [(INTERACTIVE, BULK), (BULK, INTERACTIVE), (INTERACTIVE,)])
def test_what_was_carried_is_told_of_bulk_lanes(kinds: tuple[LaneClass, ...]) -> None:
    async def main() -> None:
        async with pair(*kinds) as p:
            mux, before = p.worker.mux, link_seen(p.worker.mux, LinkStats())
            lanes = {lane.lane_class: lane for lane in mux.session.lanes.values()}
            judged, other = lanes.get(BULK, lanes[INTERACTIVE]), lanes[INTERACTIVE]
            assert before.confirmed == 0
            p.worker.open(Owner()).send(b"question")
            p.worker.open(Owner()).send(DATA)
            await until(lambda: other.confirmed and judged.confirmed and judged.rtt and other.rtt)
            seen = link_seen(mux, LinkStats())
            assert seen.confirmed == judged.confirmed
            assert seen.confirmed_at == judged.answered_at
            assert seen.round_trip == other.newest_rtt

    run(main)


def test_no_link_at_all() -> None:
    seen = link_seen(None, LinkStats())
    assert (seen.confirmed, seen.confirmed_at, seen.round_trip) == (None, None, None)
    assert not seen.backlog


def test_a_lane_whose_answers_are_late_is_shown_sidelined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "OVERDUE_AFTER", 0.05)

    async def main() -> None:
        async with pair(INTERACTIVE, BULK) as p:

            def states() -> list[str]:
                return [row.state for row in lanes_of(p.worker.mux)]

            await until(lambda: all(row.rtt_ms for row in lanes_of(p.worker.mux)))
            assert states() == ["up", "up"]
            transport = p.hub.lanes[0].transport
            assert transport is not None
            transport.pause_reading()
            await until(lambda: states() == ["sidelined", "up"])
            transport.resume_reading()
            await until(lambda: states() == ["up", "up"])

    run(main)
