"""How a node proves whose key it has, and never sends it (pure).

The hub challenges with a nonce of its own making, once a connection. The node signs that nonce
together with the very frame that it said who it is with, so that a signature is of use on that
connection only, and for that name, session and lane only.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from rayfwd.session.frames import Frame
from rayfwd.session.handshake import Challenge, Proof

_CONTEXT = b"rayfwd proves a node's key, 1\0"
"""What no other signature by this key begins with."""
_PREFIX = "ed25519:"


class NodeKey:
    """The private key of a node or a client."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @classmethod
    def make(cls) -> NodeKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_text(cls, text: str) -> NodeKey:
        """The inverse of `to_text`. Raises ValueError."""
        if not text.startswith(_PREFIX):
            raise ValueError("not the private key of a node")
        seed = bytes.fromhex(text.removeprefix(_PREFIX))
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def to_text(self) -> str:
        """One word, to be kept where nobody else reads it."""
        return _PREFIX + self._private.private_bytes_raw().hex()

    @property
    def public(self) -> str:
        """By which a hub knows it: 64 hexadecimal digits."""
        return self._private.public_key().public_bytes_raw().hex()

    def prove(self, greeting: Frame, challenge: Challenge, older: str | None = None) -> Proof:
        """The answer to a challenge. `greeting` is what was said first, as it was sent; `older` is
        the secret by which the hub may know the node from a version that had no such key."""
        what = statement(greeting, challenge)
        mac = None if older is None else _mac(hashlib.sha256(older.encode()).digest(), what)
        return Proof(self._private.sign(what).hex(), mac)


@dataclass(frozen=True, slots=True)
class Claim:
    """By which key somebody says who it is."""

    key: str
    """A public key if it is `proven`; else the secret itself, of a version that sends it."""
    proven: bool = False
    _statement: bytes = field(default=b"", repr=False)
    _mac: str | None = field(default=None, repr=False)

    @property
    def sha256(self) -> str:
        """Of the key, in hexadecimal digits."""
        return hashlib.sha256(self.key.encode(errors="surrogatepass")).hexdigest()

    def knows(self, sha256: str) -> bool:
        """Whether it has the secret of that digest too, by which it was known in earlier times."""
        if hmac.compare_digest(self.sha256, sha256):
            return True
        if self._mac is None:
            return False
        return hmac.compare_digest(self._mac, _mac(bytes.fromhex(sha256), self._statement))


def statement(greeting: Frame, challenge: Challenge) -> bytes:
    """What is signed: its kind, all of it, and the hub's nonce."""
    digest = hashlib.sha256(greeting.payload).digest()
    return _CONTEXT + bytes([greeting.kind]) + bytes.fromhex(challenge.nonce) + digest


def check(public: str, greeting: Frame, challenge: Challenge, proof: Proof) -> Claim | None:
    """What a proof shows; None: it is none."""
    what = statement(greeting, challenge)
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(proof.signature), what)
    except (ValueError, InvalidSignature):
        return None
    return Claim(public, True, what, proof.older)


def _mac(key: bytes, what: bytes) -> str:
    return hmac.new(key, what, hashlib.sha256).hexdigest()
