"""Which streams the hub has joined to which: for the process that comes after this one."""

from __future__ import annotations

from collections.abc import Mapping

from rayfwd.hub.stream_relay import StreamRelay
from rayfwd.session.snapshot import Tree
from rayfwd.transport.mux import Mux


def splices(muxes: Mapping[str, Mux]) -> list[Tree]:
    """The streams that are joined, by node and number; each pair once. One whose other end is over
    already stands alone."""
    names = {mux: name for name, mux in muxes.items()}
    found: dict[frozenset[tuple[str, int]], Tree] = {}
    for name, mux in muxes.items():
        for number, owner in mux.owners.items():
            if isinstance(owner, StreamRelay):
                ends = [(name, number)]
                far = owner.other.stream if owner.other is not None else None
                if far is not None and far.mux in names and far.mux.has(far.number):
                    ends.append((names[far.mux], far.number))
                found[frozenset(ends)] = {"ends": ends}
    return list(found.values())


def splice(muxes: Mapping[str, Mux], tree: Tree) -> None:
    """Join two streams of sessions that were taken over. Where one of them was not, the other is
    left without an owner."""
    near, far = StreamRelay(), StreamRelay()
    near.other, far.other = far, near
    found = []
    for relay, (name, number) in zip((near, far), tree["ends"], strict=False):
        mux = muxes.get(name)
        if mux is None or not mux.has(number):
            return
        found.append((relay, mux, number))
    for relay, mux, number in found:
        relay.own(mux.own(number, relay))
    for relay in (near, far):
        other = relay.other.stream if relay.other is not None else None
        if other is not None and not other.must_wait:
            relay.pass_on()
