"""Which ports are open on other nodes, as each of them says (pure).

A node tells the hub what has opened and closed on it, the hub tells the others. Of a node that has
said nothing, or whose link is not up, nobody knows: any port of it may be open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from rayfwd.session.messages import MOST_OPEN_PORTS, MOST_PORTS_TOLD, OpenPorts, OpenPortsOf

Ports = frozenset[int] | None
"""None: not known."""


class Announced:
    """What is known of each node, by its name."""

    def __init__(self) -> None:
        self._ports: dict[str, frozenset[int]] = {}
        self._last: dict[str, frozenset[int]] = {}

    def ports(self, name: str) -> Ports:
        """As they are now."""
        return self._ports.get(name)

    def last(self, name: str) -> frozenset[int]:
        """As they were when they were known last."""
        return self._last.get(name, frozenset())

    def hear(self, name: str, change: OpenPorts | None) -> bool:
        """What a node says of itself; None: nobody knows any more. Whether that is news."""
        before = self._ports.pop(name, None)
        after = None if change is None else applied(before, change)
        if after is not None:
            self._ports[name] = self._last[name] = after
        return after != before

    def drop(self, name: str) -> None:
        """It is no node any more."""
        self._ports.pop(name, None)
        self._last.pop(name, None)

    def keep(self, names: Collection[str]) -> None:
        """There are no other nodes any more."""
        for name in self._last.keys() - set(names):
            self.drop(name)

    def forget(self) -> None:
        """Nothing is known any more of what is open now."""
        self._ports.clear()


def applied(before: Ports, change: OpenPorts) -> Ports:
    """What is open after that; None too where there is more than a node may say."""
    if before is None and not change.anew:
        return None
    start = frozenset() if change.anew or before is None else before
    after = start.difference(change.closed) | frozenset(change.opened)
    return after if len(after) <= MOST_OPEN_PORTS else None


def change_of(before: Ports, after: Ports) -> OpenPorts | None:
    """What leads from the one to the other; None: it is not known."""
    if after is None:
        return None
    if before is None:
        return OpenPorts(True, tuple(sorted(after)), ())
    return OpenPorts(False, tuple(sorted(after - before)), tuple(sorted(before - after)))


class PortNews:
    """The head's: what each node has open, and what the workers have been told of that."""

    def __init__(self) -> None:
        self._now: dict[str, Ports] = {}
        self._told: dict[str, Ports] = {}

    def put(self, name: str, ports: Ports) -> bool:
        """As it is now with that node. Whether there is something to tell."""
        self._now[name] = ports
        return ports != self._told.get(name)

    def keep(self, names: set[str]) -> bool:
        """Of all other nodes nothing is known. Whether there is something to tell."""
        known = {name for name, ports in self._now.items() if ports is not None}
        gone = known - names
        for name in gone:
            self._now[name] = None
        return bool(gone)

    def news(self) -> Iterator[OpenPortsOf]:
        """What is to be told to all, who have been told the rest."""
        changes = {
            name: change_of(self._told.get(name), ports)
            for name, ports in self._now.items()
            if ports != self._told.get(name)
        }
        # Of a node that is gone nothing is known, and nothing is kept once that was told.
        self._now = {name: ports for name, ports in self._now.items() if ports is not None}
        self._told = dict(self._now)
        yield from _messages(changes)

    def whole(self) -> Iterator[OpenPortsOf]:
        """What is to be told to somebody who has been told nothing."""
        known = {name: ports for name, ports in self._told.items() if ports is not None}
        yield from _messages({name: change_of(None, ports) for name, ports in known.items()})


def _messages(changes: Mapping[str, OpenPorts | None]) -> Iterator[OpenPortsOf]:
    """In as many messages as it takes."""
    part: dict[str, OpenPorts | None] = {}
    size = 0
    for name, change in changes.items():
        more = 1 if change is None else 1 + len(change.opened) + len(change.closed)
        if part and size + more > MOST_PORTS_TOLD:
            yield OpenPortsOf(part)
            part, size = {}, 0
        part[name] = change
        size += more
    if part:
        yield OpenPortsOf(part)
