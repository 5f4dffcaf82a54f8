"""The first frames on a lane: HELLO from worker or client, WELCOME or REFUSE from the hub, and
before these CHALLENGE and PROOF (pure).

The payloads are JSON objects. Unknown keys are ignored, so that a later version may add some;
what a version needs is checked here, and nothing that comes in can raise anything but
`ProtocolError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from rayfwd import codes
from rayfwd.problems import Code, Problem
from rayfwd.session.frames import Frame, Kind, ProtocolError, encode
from rayfwd.session.lane import LaneClass

PROTOCOL_VERSION = 1
Role = Literal["worker", "client", "peer"]
"""A client is no node: it has no address, no ports and no name that is kept. A peer is a worker
that speaks to another one, and not to the hub."""
SOURCE = "source"
"""A feature of a node: it understands an OPEN that says whose it is."""
OVERLAY = "overlay"
"""A feature of both: a node has the overlay, and opens no listeners for other nodes' ports; a hub
knows of this, and gives its plan by it."""
PROOF = "proof"
"""A feature of a node: its `key` is a public key, and it answers a CHALLENGE."""
DIRECT = "direct"
"""A feature of both: a stream may be a lane of the session that two workers have between them."""
ASKED = "asked"
"""A feature of both: an OPEN may ask whether its target listens."""
CHANGES = "changes"
"""A feature of both: of the plans of other nodes control messages tell, at first of all and then of
those that change; a WELCOME has the head's and the node's own."""
MAX_HANDSHAKE = 1 << 16
"""Bytes of a HELLO, at most. A WELCOME may hold the plans of many nodes and be a full frame."""


_HEXADECIMAL = re.compile(r"[0-9a-f]*").fullmatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a worker, or a client, says of itself on each lane; a link sets what differs by lane."""

    node: str
    key: str
    """The public key by which the hub knows the node, made once; a client's is of its process.
    Without the feature `PROOF` it is a secret instead, which is all that shows who it is."""
    session: str = "0"
    """Number of the session: hexadecimal, larger for each new session of the node."""
    resumes: bool = False
    """The session was welcomed before: the hub must know it."""
    lane: LaneClass = LaneClass.INTERACTIVE
    version: str
    worker_ports: int
    """A client has none: 0, which a hub that knows no clients refuses. So a peer."""
    role: Role = "worker"
    advertise: str | None = None
    ride_through: float = 120.0
    ray: str | None = None
    python: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    """What the node's configuration declares to Ray."""
    features: frozenset[str] = frozenset()
    """What this node can do besides, by name."""
    ephemeral: bool = False
    """Its name is given back as soon as its session is over."""

    def encode(self) -> bytes:
        body = {
            "node": self.node,
            "key": self.key,
            "session": self.session,
            "resumes": self.resumes,
            "lane": self.lane.value,
            "version": self.version,
            "worker_ports": self.worker_ports,
            "role": self.role,
            "advertise": self.advertise,
            "ride_through": self.ride_through,
            "ray": self.ray,
            "python": self.python,
            "resources": dict(self.resources),
            "features": sorted(self.features),
            "ephemeral": self.ephemeral,
        }
        return encode(Kind.HELLO, 0, PROTOCOL_VERSION, json.dumps(body).encode())

    @classmethod
    def decode(cls, frame: Frame) -> Hello:
        """Raises ProtocolError with one of the codes of a refusal."""
        body = _body(frame, Kind.HELLO)
        try:
            role = _role(body.get("role", "worker"))
            hello = cls(
                node=_text(body, "node", 63),
                key=_key(body),
                session=_text(body, "session", 64),
                resumes=body["resumes"] is True,
                lane=LaneClass(body["lane"]),
                version=_text(body, "version", 64),
                worker_ports=_number(body, "worker_ports", int(role == "worker"), 20000),
                role=role,
                advertise=_optional_text(body, "advertise"),
                ride_through=float(_number(body, "ride_through", 1, 86400)),
                ray=_optional_text(body, "ray"),
                python=_optional_text(body, "python"),
                resources=_resources(body.get("resources", {})),
                features=_features(body.get("features", [])),
                ephemeral=body.get("ephemeral") is True,
            )
            int(hello.session, 16)
        except (KeyError, ValueError, TypeError) as exc:
            raise ProtocolError(codes.HELLO_MALFORMED, f"HELLO: {exc!r}") from exc
        return hello


@dataclass(frozen=True, slots=True)
class Challenge:
    """What the hub asks of whoever can prove its key."""

    nonce: str
    """64 hexadecimal digits, never used before."""

    def encode(self) -> bytes:
        return _encode(Kind.CHALLENGE, {"nonce": self.nonce})

    @classmethod
    def decode(cls, frame: Frame) -> Challenge:
        """Raises ProtocolError."""
        body = _body(frame, Kind.CHALLENGE)
        try:
            return cls(_digits(body, "nonce", 64))
        except (KeyError, ValueError) as exc:
            raise ProtocolError(codes.WELCOME_MALFORMED, f"CHALLENGE: {exc!r}") from exc


@dataclass(frozen=True, slots=True)
class Proof:
    """The answer to it."""

    signature: str
    """Ed25519, 128 hexadecimal digits."""
    older: str | None = None
    """HMAC-SHA256, 64 hexadecimal digits: shows the secret that an earlier version was known by."""

    def encode(self) -> bytes:
        return _encode(Kind.PROOF, {"signature": self.signature, "older": self.older})

    @classmethod
    def decode(cls, frame: Frame) -> Proof:
        """Raises ProtocolError."""
        body = _body(frame, Kind.PROOF)
        try:
            older = None if body.get("older") is None else _digits(body, "older", 64)
            return cls(_digits(body, "signature", 128), older)
        except (KeyError, ValueError) as exc:
            raise ProtocolError(codes.HELLO_MALFORMED, f"PROOF: {exc!r}") from exc


@dataclass(frozen=True, slots=True)
class Vouch:
    """What `rayfwd attach` knows of the SSH key, and says before the HELLO that it passes on."""

    node: str | None
    """Whose the key is, by its line in authorized_keys; None: that names nobody."""
    secret: str = field(repr=False)
    """64 hexadecimal digits: the hub's, which its user alone can read."""
    key: str | None = None
    """The key's fingerprint, as `ssh-keygen -l` has it; None: sshd does not tell."""

    def encode(self) -> bytes:
        return _encode(Kind.VOUCH, {"node": self.node, "secret": self.secret, "key": self.key})

    @classmethod
    def decode(cls, frame: Frame) -> Vouch:
        """Raises ProtocolError."""
        body = _body(frame, Kind.VOUCH)
        try:
            node = None if body.get("node") is None else _text(body, "node", 63)
            return cls(node, _digits(body, "secret", 64), _optional_text(body, "key"))
        except (KeyError, ValueError) as exc:
            raise ProtocolError(codes.HELLO_MALFORMED, f"VOUCH: {exc!r}") from exc


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the hub answers: the session stands, and this is the plan."""

    version: str
    node: Mapping[str, Any]
    """The worker's own plan; of a client, empty."""
    nodes: tuple[Mapping[str, Any], ...]
    """The plans of all nodes, the head's first; with the feature `CHANGES` the head's and the
    node's own, to a client the head's alone."""
    network: str
    ride_through: float
    ray: str | None = None
    python: str | None = None
    features: frozenset[str] = frozenset()
    """What this hub can do besides, by name."""
    ray_auth: Mapping[str, Any] | None = field(default=None, repr=False)
    """Whether the cluster's Ray asks for a token, and which; None: an older hub does not say."""

    def encode(self) -> bytes:
        body = {
            "version": self.version,
            "node": dict(self.node),
            "nodes": [dict(node) for node in self.nodes],
            "network": self.network,
            "ride_through": self.ride_through,
            "ray": self.ray,
            "python": self.python,
            "features": sorted(self.features),
            "ray_auth": None if self.ray_auth is None else dict(self.ray_auth),
        }
        return _encode(Kind.WELCOME, body)

    @classmethod
    def decode(cls, frame: Frame) -> Welcome:
        """Raises ProtocolError."""
        body = _body(frame, Kind.WELCOME)
        try:
            nodes = body["nodes"]
            if not isinstance(body["node"], dict) or not isinstance(nodes, list):
                raise TypeError("node or nodes")
            return cls(
                version=_text(body, "version", 64),
                node=body["node"],
                nodes=tuple(dict(node) for node in nodes),
                network=_text(body, "network", 64),
                ride_through=float(_number(body, "ride_through", 1, 86400)),
                ray=_optional_text(body, "ray"),
                python=_optional_text(body, "python"),
                features=_features(body.get("features", [])),
                ray_auth=_optional_object(body, "ray_auth"),
            )
        except (KeyError, ValueError, TypeError) as exc:
            raise ProtocolError(codes.WELCOME_MALFORMED, f"WELCOME: {exc!r}") from exc


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the hub does not take a lane."""

    problem: Problem

    def encode(self) -> bytes:
        body = {key: text[:2000] for key, text in self.problem.to_wire().items()}
        return encode(Kind.REFUSE, 0, PROTOCOL_VERSION, json.dumps(body).encode())

    @classmethod
    def decode(cls, frame: Frame) -> Refusal:
        """Raises ProtocolError. A refusal by another protocol version is still understood."""
        try:
            body = json.loads(frame.payload)
            code = codes.named(_text(body, "code", 64))
            return cls(code.problem(_text(body, "cause", 2000), _text(body, "remedy", 2000)))
        except (KeyError, ValueError, TypeError, RecursionError) as exc:
            raise ProtocolError(codes.REFUSAL_MALFORMED, f"REFUSE: {exc!r}") from exc


def _encode(kind: Kind, body: Mapping[str, Any]) -> bytes:
    return encode(kind, 0, PROTOCOL_VERSION, json.dumps(body).encode())


def _malformed(kind: Kind) -> Code:
    of_the_hub = kind in {Kind.WELCOME, Kind.CHALLENGE}
    return codes.WELCOME_MALFORMED if of_the_hub else codes.HELLO_MALFORMED


def _body(frame: Frame, kind: Kind) -> dict[str, Any]:
    if frame.kind is not kind:
        raise ProtocolError(codes.HANDSHAKE_EXPECTED, f"{frame.kind.name} instead of {kind.name}")
    if frame.offset != PROTOCOL_VERSION:
        raise ProtocolError(
            codes.PROTOCOL_VERSION,
            f"protocol {frame.offset}, but this side speaks {PROTOCOL_VERSION}",
        )
    try:
        body = json.loads(frame.payload)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(_malformed(kind), f"{kind.name}: {exc}") from exc
    if not isinstance(body, dict):
        raise ProtocolError(_malformed(kind), f"{kind.name} is no JSON object")
    return body


def _text(body: Mapping[str, Any], key: str, longest: int) -> str:
    value = body[key]
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise ValueError(f"{key} must be text of 1 to {longest} characters")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        # JSON can say it, but no file and no terminal can take it. The value is not shown: it
        # may be the node's key.
        raise ValueError(f"{key} must be text without half characters")
    return value


def _digits(body: Mapping[str, Any], key: str, length: int) -> str:
    value = body[key]
    if not isinstance(value, str) or len(value) != length or not _HEXADECIMAL(value):
        raise ValueError(f"{key} must be {length} hexadecimal digits")
    return value


def _key(body: Mapping[str, Any]) -> str:
    """A public key has one spelling only, by which it is known."""
    proves = PROOF in _features(body.get("features", []))
    return _digits(body, "key", 64) if proves else _text(body, "key", 128)


def _optional_text(body: Mapping[str, Any], key: str) -> str | None:
    return None if body.get(key) is None else _text(body, key, 64)


def _optional_object(body: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    value = body.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be an object")
    return value


def _role(value: Any) -> Role:
    if value not in ("worker", "client", "peer"):
        raise ValueError('role must be "worker", "client" or "peer"')
    return cast(Role, value)


def _features(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError("features must be a list of at most 64 names")
    return frozenset(_text({"a feature": name}, "a feature", 64) for name in value)


def _number(body: Mapping[str, Any], key: str, least: float, most: float) -> int:
    value = body[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{key} must be a number from {least} to {most}")
    return int(value)


def _resources(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > 256:
        raise ValueError("resources must be an object of at most 256 keys")
    for name in value:
        _text({"the name of a resource": name}, "the name of a resource", 128)
    return {name: float(_finite(amount)) for name, amount in value.items()}


def _finite(amount: Any) -> int | float:
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not abs(amount) < 1e18:
        raise ValueError("a resource must be a number")
    return amount
