"""What comes before the first frame where a login shell runs `rayfwd attach`: noise, then a marker.

Files like .bashrc and .zshenv print whatever they like into the stream. Once `rayfwd attach` has
the hub it writes the marker, and frames begin right behind it. Pure.
"""

# The standard library only: `rayfwd attach` is started for every lane.

from __future__ import annotations

MARKER = b"\x00rayfwd attach\x00\n"
NOISE = 1 << 16
"""Bytes of noise that are skipped."""
QUOTED = 200
"""Characters of it that are quoted."""


class Preamble:
    """Takes bytes until the marker has come."""

    def __init__(self) -> None:
        self.over = False
        """The marker has come: what follows is frames."""
        self._noise = bytearray()

    def feed(self, data: bytes) -> bytes:
        """What is behind the marker; nothing before it has come. Raises ValueError where there is
        more noise than anybody's shell prints."""
        if self.over:
            return data
        # Looked for where the marker may end in this piece.
        begin = max(0, len(self._noise) - len(MARKER))
        self._noise += data
        at = self._noise.find(MARKER, begin)
        if at >= 0:
            rest = bytes(self._noise[at + len(MARKER) :])
            self.over = True
            self._noise.clear()
            return rest
        if len(self._noise) > NOISE:
            raise ValueError(f"over {NOISE} bytes came, and {self.quoted()}")
        return b""

    def quoted(self) -> str:
        """What has come instead of the marker, in words; nothing where nothing has."""
        if not self._noise:
            return ""
        text = self._noise.decode(errors="replace").strip()
        return f"its shell printed {text[:QUOTED]!r}{'…' if len(text) > QUOTED else ''} instead"
