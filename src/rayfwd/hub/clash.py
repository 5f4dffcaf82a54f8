"""Whether a session may begin under a name whose node or client has, or had, one already."""

from __future__ import annotations

from rayfwd import codes
from rayfwd.hub.peers import HubClient, HubNode, HubPeer
from rayfwd.problems import Problem, ProblemError
from rayfwd.session.handshake import Hello

IN_USE_SECONDS = 4.0
"""Seconds since a session was heard within which another of the same node is a clone of it, not a
restart: the old lanes of a restarted worker close at once, or fall silent."""


def check_session(peer: HubNode | HubClient, hello: Hello) -> None:
    """Whether a session of it may begin in the place of the one that it has, if it has one.
    Raises ProblemError."""
    if hello.resumes:
        raise ProblemError(session_unknown())
    refusal = _clash(peer, hello)
    if refusal is not None:
        raise ProblemError(refusal)


def check_renewal(node: HubNode, hello: Hello) -> None:
    """Whether a machine with another key, which came by the SSH key of this node's line, may
    take its place. Raises ProblemError."""
    if is_live(node):
        raise codes.NAME_IN_USE.error(
            f"another machine is connected as {node.label} with the same SSH key",
            "stop rayfwd on one of the two, or give it its own key and name",
        )
    if hello.resumes or hello.session == node.session:
        raise ProblemError(session_unknown())


def _clash(peer: HubNode | HubClient, hello: Hello) -> Problem | None:
    """With the present one."""
    if peer.mux is None:
        return None
    # Its number says which of two is the later one only as long as the node's clock goes on;
    # after a while of silence the key alone says enough.
    older = int(hello.session, 16) < int(peer.session, 16)
    parked = not peer.mux.stats().lanes
    if (parked and not older) or not is_live(peer):
        return None
    if older:
        return codes.SESSION_STALE.problem(
            "the hub has a newer session of this node, and heard from it just now",
            "nothing: if the node's clock was set back, it is accepted within seconds",
        )
    return codes.NAME_IN_USE.problem(
        f"another rayfwd is connected as {peer.label} with the same key",
        "on one of the two machines, remove node.key from the state directory and set another "
        "name: they share one state directory (a cloned disk?)",
    )


def is_live(peer: HubPeer) -> bool:
    """It was heard a moment ago."""
    mux = peer.mux
    return mux is not None and mux.now() - mux.session.last_heard < IN_USE_SECONDS


def session_unknown() -> Problem:
    return codes.SESSION_UNKNOWN.problem(
        "the hub does not know this session: it was restarted, or it gave the session up",
        "nothing: a new session begins by itself",
    )
