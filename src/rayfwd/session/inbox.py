"""The messages that come: cut out of the control stream's bytes, and heard one after another.

Whoever hears them may say when it is done with each (`holds`). Until then the bytes are not
acknowledged as consumed, so that a peer sends no more messages than are heard.
"""

from __future__ import annotations

from rayfwd.session.events import Event, MessageReceived
from rayfwd.session.frames import Chunk, MessageDecoder
from rayfwd.session.trace import Trace, message


class Inbox:
    """Of one session."""

    def __init__(self, held: bytes = b"") -> None:
        """`held`: the beginning of a message, as a snapshot has it."""
        self.holds = False
        """It is said by `done` when a message has been heard."""
        self._messages = MessageDecoder(held)
        self._unheard = 0
        """Messages that were told and are not heard yet."""
        self._behind = 0
        """Bytes of the next message, which came while there were some."""

    @property
    def held(self) -> bytes:
        """The beginning of a message whose rest has not come."""
        return self._messages.held

    def take(self, data: Chunk, events: list[Event], trace: Trace | None) -> int:
        """Bytes have come: adds the messages that are whole. Returns of how many bytes it can be
        said already that they are consumed."""
        found = self._messages.feed(data)
        if trace is not None:
            for each in found:
                trace(message("in", each))
        if not self.holds:
            events += map(MessageReceived, found)
            return len(data)
        self._unheard += len(found)
        if found:
            events += [MessageReceived(each) for each in found[:-1]]
            events.append(MessageReceived(found[-1], len(data)))
            return 0
        if self._unheard:
            self._behind += len(data)
            return 0
        return len(data)  # one that is longer than the window has to go on

    def done(self, event: MessageReceived) -> int:
        """A message was heard. Returns how many bytes more are consumed by that."""
        self._unheard -= 1
        credit = event.credit
        if not self._unheard:
            credit += self._behind
            self._behind = 0
        return credit
