"""What the hub's ledger says of each peer and of each user; the status passes it on as it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAccount:
    """What one peer costs the hub."""

    name: str
    """The worker's, or `client NAME`."""
    user: str
    """The login name that it came as last; empty: not since the daemon began."""
    key: str = ""
    """The SSH key that it came by (`SHA256:…`), or `--node` and the name in that key's line; empty:
    not known."""
    memory: int
    """Bytes kept for it, or of it, that nobody has taken yet."""
    lanes: int
    """Each is a file descriptor."""
    listeners: int = 0
    """That stand for it on every other machine without an overlay: file descriptors, and ports."""
    streams: int
    messages: int
    """Control messages that it sent, since the daemon began; so the rest."""
    log_lines: int
    """Lines of the head's log about it."""
    roster_writes: int
    """How often its plan was written down."""
    seconds: float
    """Processor time for the bytes that it sent."""
    shed: int
    """Streams that it had to give up, as too much was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserAccount:
    """The same of all of a user's peers together."""

    user: str
    peers: int
    memory: int
    lanes: int
    listeners: int = 0
    streams: int
