"""What was freed is kept for the next read, instead of going back to the kernel each time."""

from __future__ import annotations

import ctypes

KEPT_BYTES = 16 << 20
"""Bytes that are free at the heap's end and kept, at most: what a fast sender has under way swells
and shrinks by some megabytes. By default glibc gives all of it back that is more than half a
megabyte, and asks for it again, a page fault for 4 KiB: 60,000 for a GB, or a tenth of the time
that a GB takes a daemon."""
FROM_HEAP_BYTES = 4 << 20
"""Bytes below which memory comes from the heap, more than a read takes. It has to be said, since
glibc adapts it no more once KEPT is said (mallopt(3))."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>


def keep_freed() -> None:
    """For the whole process, from now on. Where there is no glibc nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, FROM_HEAP_BYTES)
