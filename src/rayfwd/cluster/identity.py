"""The key by which the hub knows a node, in its file: `node.key` in the state directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rayfwd import codes
from rayfwd.session.frames import Frame
from rayfwd.session.handshake import Challenge, Proof
from rayfwd.session.proof import NodeKey
from rayfwd.system.files import replace_file

KEY_FILE = "node.key"
_SHORTEST = 32
"""Characters of what an earlier version kept there; less is no key of any."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a node, or a client, proves to be."""

    key: NodeKey = field(repr=False)
    older: str | None = field(default=None, repr=False)
    """The secret by which the hub may still know it, from a version that sent that."""

    @classmethod
    def make(cls) -> Identity:
        return cls(NodeKey.make())

    @classmethod
    def from_text(cls, text: str) -> Identity | None:
        """The inverse of `to_text`, and of what an earlier version kept: that has no key yet, and
        is given one. None: it is neither."""
        first, *rest = text.split("\n")
        try:
            return cls(NodeKey.from_text(first), rest[0] if rest and rest[0] else None)
        except ValueError:
            older = text.strip()
            return cls(NodeKey.make(), older) if len(older) >= _SHORTEST else None

    def to_text(self) -> str:
        """One line, or two while the older secret is needed."""
        return "\n".join([self.key.to_text(), *([] if self.older is None else [self.older]), ""])

    @property
    def public(self) -> str:
        """What the hub knows it by."""
        return self.key.public

    def prove(self, greeting: Frame, challenge: Challenge) -> Proof:
        """The answer to a challenge of the hub's to `greeting`."""
        return self.key.prove(greeting, challenge, self.older)


def kept(path: Path) -> Identity:
    """The node's, made at its first start; the file has mode 0600. Raises ProblemError."""
    try:
        text = path.read_text(encoding="ascii") if path.exists() else ""
        identity = Identity.from_text(text) or Identity.make()
        if identity.to_text() != text:
            replace_file(path, identity.to_text().encode())
    except (OSError, UnicodeError) as exc:
        raise codes.NODE_KEY_UNUSABLE.error(
            f"{path}: {exc.strerror or exc}" if isinstance(exc, OSError) else f"{path}: {exc}",
            "make it readable and its directory writable for rayfwd's user, and check that the "
            "disk is not full; or remove it, if the node may have a new key",
        ) from exc
    return identity
