"""Writes many pieces at once, without joining what the socket takes of them.

asyncio's `writelines` joins them first, until Python 3.12, and of a transport that is gone it
watches the descriptor on from 3.12 to 3.13.5, which may be another connection's by then (CPython's
gh-136234).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from rayfwd.session.frames import Piece, behind

JOIN_BYTES = 1 << 14
"""Bytes that are joined after all: to copy them is cheaper than to tell the kernel of each."""
PIECES = os.sysconf("SC_IOV_MAX")
"""Pieces that the kernel takes at a time (writev(2))."""


def write(transport: asyncio.Transport, pieces: Sequence[Piece]) -> None:
    """As `transport.write` of all of them.

    An error is the transport's to find, which then tells its protocol.
    """
    if len(pieces) == 1:
        transport.write(pieces[0])
    elif sum(map(len, pieces)) < JOIN_BYTES:
        transport.write(b"".join(pieces))
    elif not transport.is_closing():
        sent = 0
        if not transport.get_write_buffer_size():
            try:
                sent = os.writev(transport.get_extra_info("socket").fileno(), pieces[:PIECES])
            except OSError:
                pass
        for piece in behind(pieces, sent):
            if transport.is_closing():
                break  # the piece before has met an error
            transport.write(piece)
