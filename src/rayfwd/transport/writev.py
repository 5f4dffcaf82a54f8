"""Writes many chunks at once, without joining what the socket takes of them.

asyncio's `writelines` joins them first, until Python 3.12, and of a transport that is gone it
watches the descriptor on from 3.12 to 3.13.5, which may be another connection's by then (CPython's
gh-136234).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from rayfwd.session.frames import Chunk, skip_bytes

JOIN_BYTES = 1 << 14
"""Bytes that are joined after all: to copy them is cheaper than to tell the kernel of each."""
PIECES = os.sysconf("SC_IOV_MAX")
"""Pieces that the kernel takes at a time (writev(2))."""


def write(transport: asyncio.Transport, chunks: Sequence[Chunk]) -> None:
    """As `transport.write` of all of them.

    An error is the transport's to find, which then tells its protocol.
    """
    if len(chunks) == 1:
        transport.write(chunks[0])
    elif sum(map(len, chunks)) < JOIN_BYTES:
        transport.write(b"".join(chunks))
    elif (sock := transport.get_extra_info("socket")) is None:
        transport.writelines(chunks)  # pipes, which join nothing
    elif not transport.is_closing():
        sent = 0
        if not transport.get_write_buffer_size():
            try:
                sent = os.writev(sock.fileno(), chunks[:PIECES])
            except OSError:
                pass
        for chunk in skip_bytes(chunks, sent):
            if transport.is_closing():
                break  # the chunk before has met an error
            transport.write(chunk)
