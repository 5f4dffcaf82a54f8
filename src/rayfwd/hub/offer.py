"""What the head offers to those who come to its hub, and what the hub asks the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rayfwd.session.messages import Message
from rayfwd.session.target import Opening, Target
from rayfwd.transport.mux import MuxStream, StreamOwner


@dataclass(frozen=True, slots=True)
class HubOffer:
    """What the head offers to whoever is welcomed, the plan apart."""

    ray: str | None = None
    python: str | None = None
    """Version of the head's Ray, and of its Python; None: not known yet."""
    features: frozenset[str] = frozenset()
    """What this head can do besides."""
    ray_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    """Ray's token, as a WELCOME hands it over; None: not decided yet."""
    client_ports: frozenset[int] = frozenset()
    """The head's ports that clients may reach."""
    listens: bool = True
    """A listener stands here for every port of a node; False: the overlay does."""
    page: Target | None = None
    """Where the head's page in the browser is, which clients may see; None: nowhere."""


class HubOwner(Protocol):
    """The head, as far as its hub asks it something. Nothing is asked before `Hub.start` or
    `Hub.take_over`."""

    def offer(self) -> HubOffer:
        """As it is now."""

    def accept(self, stream: MuxStream, opening: Opening) -> StreamOwner | None:
        """Take a stream to the head itself, or reset it and return None."""

    def message(self, node: str, message: Message) -> None:
        """A worker's control message. Raises ValueError where what it says is none."""

    def hub_changed(self) -> None:
        """A node came, went or changed."""
