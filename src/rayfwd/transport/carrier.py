"""What brings a lane's bytes to the hub's socket and back, as the link knows it.

A carrier dials; a connection that stands opens a pipe, which is one byte stream to the hub. SSH by
AsyncSSH is one (`asyncssh_carrier.py`); whatever else ends in the hub's socket may be another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from rayfwd.problems import Problem
from rayfwd.session.frames import Chunk
from rayfwd.session.preamble import Preamble

CLOSED = "closed by the other side"
"""Why a pipe is over, where nobody says more."""
BY_COMMAND = "; by the command:"
"""Between why the socket is no way, and what the command says that was run instead."""


class PipeOwner(Protocol):
    """Who has the near end of a pipe."""

    def pipe_data(self, data: bytes | memoryview) -> None:
        """Bytes of the hub, in order."""

    def pipe_said(self, data: bytes) -> None:
        """What was written beside the stream: why there will be none, as a rule."""

    def pipe_writable(self) -> None:
        """It is no longer `paused`."""

    def pipe_lost(self, why: str) -> None:
        """It is over; nothing follows."""


class Pipe(Protocol):
    """A byte stream to the hub's socket."""

    @property
    def paused(self) -> bool:
        """It takes no more bytes for now."""

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Raises OSError where the far side has closed it, and that is still to be told."""

    def carry(
        self, deliver: Callable[[Sequence[bytes | memoryview]], None], resume: Callable[[], None]
    ) -> None:
        """The handshake is over: from now on these are a lane's bytes.

        What comes may go to `deliver` instead of `pipe_data`, and that there is room to `resume`,
        where the carrier has a way for them that is faster.
        """

    def close(self) -> None:
        """Send what was written, then close; it is over when the far side has confirmed it."""

    def abort(self) -> None:
        """Close at once."""


class AfterPreamble:
    """Owns a pipe to a command that a login shell runs, and passes on what follows the preamble."""

    def __init__(self, owner: PipeOwner, instead: Problem | None = None) -> None:
        """`instead`: why it is not the socket."""
        self.pipe: Pipe | None = None
        """It is aborted where the shell prints without an end."""
        self._owner = owner
        self._preamble = Preamble()
        if instead is not None:  # before whatever the command has to say
            owner.pipe_said(f"{instead.cause}{BY_COMMAND}\n".encode())

    def pipe_data(self, data: bytes | memoryview) -> None:
        if not self._preamble.over:
            try:
                data = self._preamble.feed(bytes(data))
            except ValueError as exc:
                self._preamble = Preamble()
                self._owner.pipe_lost(str(exc))
                if self.pipe is not None:
                    self.pipe.abort()
                return
        if data:
            self._owner.pipe_data(data)

    def pipe_said(self, data: bytes) -> None:
        self._owner.pipe_said(data)

    def pipe_writable(self) -> None:
        self._owner.pipe_writable()

    def pipe_lost(self, why: str) -> None:
        noise = self._preamble.quoted()
        self._owner.pipe_lost(f"{why}; {noise}" if noise else why)


class Connection(Protocol):
    """A way to the head that stands. It is the lane's alone."""

    @property
    def takes_another(self) -> bool:
        """It still stands, and another pipe can be opened when the first one is over."""

    async def open(self, owner: PipeOwner) -> Pipe:
        """A byte stream to the hub's socket. Raises ProblemError."""

    async def tune(self) -> None:
        """Once the lane stands: whatever has the head's side send small packets at once."""

    def keep_alive(self) -> None:
        """Find out that the far side has gone also while nothing is sent."""

    def close(self) -> None:
        """End it in order."""

    def abort(self) -> None:
        """End it at once."""


class Carrier(Protocol):
    """Makes connections to one head."""

    async def dial(self, urgent: asyncio.Event) -> Connection:
        """`urgent`: set while streams wait for it, perhaps from some moment of it on. Raises
        ProblemError."""

    def close(self, parked: bool = False) -> None:
        """Give up what connections share (a jump host), and they with it. It may dial again.

        `parked`: the path may be at fault, and streams wait for it; see `witness.py`.
        """
