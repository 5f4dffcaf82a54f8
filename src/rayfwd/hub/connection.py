"""A connection to the hub's socket."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, cast

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.hub.doctor_answers import Checkup
from rayfwd.hub.peers import HubPeer
from rayfwd.problems import Problem
from rayfwd.session.checks import CheckReply, read_hello
from rayfwd.session.frames import Chunk, Frame, Kind, ProtocolError, first_frame
from rayfwd.session.handshake import (
    MAX_HANDSHAKE,
    PROOF,
    Challenge,
    Hello,
    Proof,
    Refusal,
    Vouch,
    Welcome,
)
from rayfwd.session.lane import LaneClass
from rayfwd.session.proof import Claim, check
from rayfwd.system import ownership, passing
from rayfwd.transport.mux import Mux
from rayfwd.transport.pipes import PipeTransport
from rayfwd.transport.readpacing import pace
from rayfwd.transport.writev import write

HELLO_TIMEOUT = 10.0
"""Seconds that a connection may take to say hello."""
CLOSE_TIMEOUT = 5.0
"""Seconds for the peer to take what is left to say to it, before the connection is cut."""
WRITE_BUFFER = 1 << 18
"""Bytes that may wait in a lane's transport before the session is asked for no more."""
TAKEN = b"\0"
"""The word to `rayfwd attach` that its pipes were taken: the first byte of no frame."""


class Owner(Protocol):
    """Who decides what becomes of a connection, and is told of it."""

    def came(self, lane: HubConnection) -> None:
        """It is there, and has said nothing yet."""

    def challenged(self, lane: HubConnection) -> None:
        """It has said hello, and is asked to prove its key."""

    def greeted(self, lane: HubConnection, hello: Hello, claim: Claim) -> None:
        """A hello, and by which key: welcome it as a lane, or refuse it."""

    def vouched(self, vouch: Vouch) -> bool:
        """Whether it is this hub's own `rayfwd attach` that says so."""

    def asked(self, lane: HubConnection, hello: Hello, claim: Claim) -> None:
        """The first question of a doctor: `examine` it, or refuse it."""

    def refused(self, lane: HubConnection, refusal: Problem) -> None:
        """It is told so, and closed."""

    def went(self, lane: HubConnection) -> None:
        """It was greeted, or it is gone."""

    def lane_lost(self, lane: HubConnection, why: str) -> None:
        """A lane of a session that goes on is gone."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What was said first, and the challenge that is to be answered before it counts."""

    frame: Frame
    hello: Hello
    challenge: Challenge


class HubConnection(asyncio.Protocol):
    """A connection to the hub's socket: first the handshake, then a lane of a session."""

    def __init__(
        self, owner: Owner, passed: dict[int, list[int]], by_hub: str | None = None
    ) -> None:
        """`passed`: descriptors that come with its first bytes (`system/passing.py`). `by_hub`: the
        node whose it is, where it is a stream through a hub."""
        self._owner = owner
        self._passed = passed
        self.by_hub = by_hub
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._mux: Mux | None = None
        self._checkup: Checkup | None = None
        self._greeting: Greeting | None = None
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._why_aborted = ""
        self._waiting: asyncio.Transport | None = None
        """Of a connection whose bytes go by pipes: the socket at which `rayfwd attach` waits."""
        self.vouched: str | None = None
        """The node whose SSH key it came by, where that key's line names one."""
        self.key = ""
        """That key, or the name in its line, as the ledger has it; empty: not known."""
        self.ssh_key: str | None = None
        """The fingerprint of that key; None: sshd has not told it."""
        self.lane_class = ""
        self.node = ""
        """What its HELLO says, as the log has it."""
        self.peer: HubPeer | None = None
        self.uid = -1
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(WRITE_BUFFER)
        pace.begin(self._transport)
        self.uid = ownership.peer_credentials(self._transport.get_extra_info("socket"))[1]
        self._timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT, self._no_hello)
        self._owner.came(self)

    def data_received(self, data: bytes) -> None:
        if self._mux is not None:
            began = time.perf_counter()
            self._mux.lane_data(self._number, data)
            if self.peer is not None:
                self.peer.seconds += time.perf_counter() - began
            pace.after_read(self._transport, len(data))
            return
        if self._transport is None or self._transport.is_closing():
            return
        if self._checkup is not None:
            self._checkup.received(data)
            return
        self._take_pipes(self._transport)
        self._buffer += data
        try:
            self._take_frame()
        except ProtocolError as exc:
            self.refuse(exc.code.problem(str(exc), "run the same version of rayfwd on both sides"))

    def _take_frame(self) -> None:
        """The hello, or the proof that it was asked for. Raises ProtocolError."""
        frame = first_frame(self._buffer, MAX_HANDSHAKE)
        if frame is None:
            return
        if frame.kind is Kind.VOUCH and self._greeting is None and not self.key:
            self._take_vouch(Vouch.decode(frame))
        elif self._greeting is None:
            self._greeted(frame)
        else:
            self._proved(self._greeting, frame)

    def _take_vouch(self, vouch: Vouch) -> None:
        """Raises ProtocolError, for what follows it."""
        if not self._owner.vouched(vouch):
            cause = (
                f"this connection claims to belong to {vouch.node}, and this hub did not "
                "confirm that"
            )
            remedy = (
                "let sshd run this machine's `rayfwd attach --node`, as the user that runs the hub"
            )
            self.refuse(codes.VOUCH_WRONG.problem(cause, remedy))
            return
        self.vouched, self.ssh_key = vouch.node, vouch.key
        self.key = vouch.key or f"--node {vouch.node}"
        self._take_frame()

    def _greeted(self, frame: Frame) -> None:
        """Have it prove its key, where it can. Raises ProtocolError."""
        hello = read_hello(frame) if frame.kind is Kind.CHECK else Hello.decode(frame)
        self.node = f"client {hello.node}" if hello.role == "client" else hello.node
        if PROOF not in hello.features:
            self._believed(frame, hello, Claim(hello.key))
            return
        assert self._transport is not None, "it has just said something"
        self._greeting = Greeting(frame, hello, Challenge(secrets.token_hex(32)))
        self._owner.challenged(self)
        self._transport.write(self._greeting.challenge.encode())
        self._take_frame()

    def _proved(self, greeting: Greeting, frame: Frame) -> None:
        """Raises ProtocolError."""
        hello, challenge = greeting.hello, greeting.challenge
        if frame.kind is Kind.CLOSE:
            self.close()  # it takes back what it said hello for
            return
        claim = check(hello.key, greeting.frame, challenge, Proof.decode(frame))
        if claim is None:
            self.refuse(
                codes.PROOF_WRONG.problem(
                    f"{hello.node[:63]!r} did not prove that it has its private key",
                    "run the same version of rayfwd on both sides; if the versions are the same, "
                    "somebody pretends to be this node",
                )
            )
            return
        self._believed(greeting.frame, hello, claim)

    def _believed(self, frame: Frame, hello: Hello, claim: Claim) -> None:
        if frame.kind is Kind.CHECK:
            self._owner.asked(self, hello, claim)
        else:
            self._owner.greeted(self, hello, claim)

    def _take_pipes(self, waiting: asyncio.Transport) -> None:
        """Where `rayfwd attach` passes what it was given by sshd, go on over that. It waits at its
        end of the socket, and whichever of the two ends takes the other with it.

        Of our own user and root alone: whoever has a descriptor as well may make it one that waits
        at any moment, and then all of this process would."""
        sock = waiting.get_extra_info("socket")
        pipes = self._passed.pop(sock.fileno(), []) if sock is not None else []
        ours = self.uid in {0, os.geteuid()}
        if len(pipes) != passing.MOST or not (ours and all(map(passing.is_stream, pipes))):
            passing.close_all(pipes)
            return
        waiting.write(TAKEN)
        self._transport = PipeTransport(self, *pipes)
        self._transport.set_write_buffer_limits(WRITE_BUFFER)
        pace.begin(self._transport)
        waiting.set_protocol(_Waiting(self._transport))
        self._waiting = waiting

    @property
    def proven(self) -> Greeting | None:
        """What it has said first, where it was asked to prove its key."""
        return self._greeting

    def pause_writing(self) -> None:
        self.paused = True
        if self._checkup is not None:
            self._checkup.pause_writing()

    def resume_writing(self) -> None:
        self.paused = False
        if self._mux is not None:
            self._mux.flush()
        if self._checkup is not None:
            self._checkup.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._owner.went(self)
        if self._checkup is not None:
            self._checkup.gone()
        transport, self._transport = self._transport, None
        if self._waiting is not None:
            self._waiting.close()
        if isinstance(exc, BrokenPipeError | ConnectionResetError) and transport is not None:
            self._take_last(transport)
        if self._mux is not None and not self._mux.ended:
            self._owner.lane_lost(self, self._why_aborted or str(exc or "closed by the worker"))
            self._mux.lane_lost(self._number)

    def _take_last(self, transport: asyncio.Transport) -> None:
        """Read what came before the peer closed. A write that meets a closed socket ends a
        transport at once, and what is unread may be the worker's CLOSE."""
        mux, sock = self._mux, transport.get_extra_info("socket")
        descriptor = sock.fileno() if sock is not None else -1  # pipes were read to their end
        with suppress(OSError):  # it is not blocking, and still open here
            while mux is not None and descriptor >= 0 and (data := os.read(descriptor, 1 << 18)):
                mux.lane_data(self._number, data)

    def _no_hello(self) -> None:
        self.refuse(
            codes.HELLO_MISSING.problem(
                f"no HELLO within {HELLO_TIMEOUT:.0f} s",
                "nothing: rayfwd sends a HELLO at once, so it was another program",
            )
        )

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def refuse(self, refusal: Problem) -> None:
        """Say why not, and close."""
        self._stop_timer()
        self._owner.refused(self, refusal)
        if self._transport is not None:
            self._transport.write(Refusal(refusal).encode())
            self.close()

    def hold(self) -> None:
        """What it has said is being seen to; what it says meanwhile waits for `go_on`."""
        self._stop_timer()
        if self._transport is not None:
            self._transport.pause_reading()

    def go_on(self) -> bool:
        """False: it has gone meanwhile."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.resume_reading()
        return True

    def welcome(self, welcome: Welcome, peer: HubPeer, mux: Mux, hello: Hello) -> None:
        """Become a lane; bytes that followed the hello are the session's."""
        self._stop_timer()
        self._owner.went(self)
        assert self._transport is not None, "a lane that has gone is not welcomed"
        self._transport.write(welcome.encode())
        self._mux = mux
        self.peer, self.lane_class = peer, hello.lane.value
        if isinstance(self._transport, PipeTransport) and hello.lane is LaneClass.BULK:
            self._transport.widen()
        self._number = mux.add_lane(self, hello.lane)
        if self._buffer:
            rest = bytes(self._buffer)
            self._buffer.clear()
            mux.lane_data(self._number, rest)

    def examine(self, answer: CheckReply, plan: NodePlan | None) -> None:
        """CheckReply a doctor's questions, which make no lane of it."""
        self._stop_timer()
        assert self._transport is not None, "it has just asked"
        self._checkup = Checkup(self._transport, answer, plan, self.refuse)
        if self._buffer:
            rest = bytes(self._buffer)
            self._buffer.clear()
            self._checkup.received(rest)

    # -- as the transport of a lane ------------------------------------------------------

    def write(self, chunks: Sequence[Chunk]) -> None:
        if self._transport is not None:
            write(self._transport, chunks)

    def close(self) -> None:
        """In order, and soon: who does not read is cut."""
        if self._transport is not None:
            self._transport.close()
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self.abort, "closed")

    def abort(self, why: str) -> None:
        if self._transport is not None:
            self._why_aborted = why
            self._transport.abort()


class _Waiting(asyncio.Protocol):
    """The socket at which `rayfwd attach` waits until its pipes are done with."""

    def __init__(self, pipes: PipeTransport) -> None:
        self._pipes = pipes

    def connection_lost(self, exc: Exception | None) -> None:
        self._pipes.abort()
