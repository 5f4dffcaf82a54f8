"""The control messages: what each says, as a JSON object and back (pure).

Keys that are not known are left out, and so is a message of an unknown type: a later version may
add some. What a version needs is checked here; nothing that comes in raises anything but
`ValueError`. docs/protocol.md has the same table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Concatenate, Final, Generic, Literal, ParamSpec, TypeVar, cast

Sender = Literal["hub", "worker", "both"]

LONGEST_WORD: Final = 64
"""Characters of a phase, a version or a code; what is longer is cut."""
LONGEST_NAME: Final = 200
"""Characters of a subject, which is a node and a thing of it; what is longer is cut."""
LONGEST_TEXT: Final = 2000
"""Characters of a cause or a remedy; what is longer is cut."""
NAME_BYTES: Final = 600
TEXT_BYTES: Final = 4000
"""Bytes of these as JSON, where a character may take twelve; what is longer is cut as it is made,
so that `MOST_SENT` conditions are no message that is too long, whatever they say."""
MOST_SENT: Final = 50
"""Conditions that a message tells of."""
MOST_PORTS: Final = 200
"""Ports that a node may ask to be dialled."""
MOST_OPEN_PORTS: Final = 2000
"""Ports of one node that others are told of."""
MOST_PORTS_TOLD: Final = 40_000
"""Ports and nodes in one message about several: 300 kB."""

_NONCE = re.compile(r"[0-9a-f]{32}")
_MAX_ID = 1 << 53
"""Below it JSON's numbers are exact for every reader (RFC 8259, section 6)."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The plan of every node, the head's first."""

    TYPE: ClassVar = "nodes"
    SENDER: ClassVar[Sender] = "hub"

    nodes: tuple[Mapping[str, Any], ...]

    def to_wire(self) -> dict[str, Any]:
        return {"type": self.TYPE, "nodes": [dict(node) for node in self.nodes]}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Nodes:
        return cls(tuple(_objects(data, "nodes")))


@dataclass(frozen=True, slots=True)
class NodesChanged:
    """Plans of nodes that are new or have changed, and names of nodes that are no more; all others
    are as they were told."""

    TYPE: ClassVar = "nodes_changed"
    SENDER: ClassVar[Sender] = "hub"

    nodes: tuple[Mapping[str, Any], ...]
    gone: tuple[str, ...] = ()

    def after(self, earlier: NodesChanged) -> NodesChanged:
        """What both say, one behind the other."""
        nodes = {node.get("name"): node for node in (*earlier.nodes, *self.nodes)}
        gone = dict.fromkeys(name for name in earlier.gone if name not in nodes)
        for name in self.gone:
            nodes.pop(name, None)
            gone[name] = None
        return NodesChanged(tuple(nodes.values()), tuple(gone))

    def to_wire(self) -> dict[str, Any]:
        nodes = [dict(node) for node in self.nodes]
        return {"type": self.TYPE, "nodes": nodes, "gone": list(self.gone)}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> NodesChanged:
        gone = _there(data, "gone")
        if not isinstance(gone, list) or not all(isinstance(name, str) for name in gone):
            raise ValueError("gone must be a list of names")
        return cls(tuple(_objects(data, "nodes")), tuple(gone))


@dataclass(frozen=True, slots=True)
class HeadVersions:
    """Versions of the head's Ray, and of its Python; None: not known."""

    TYPE: ClassVar = "head_versions"
    SENDER: ClassVar[Sender] = "hub"

    ray: str | None
    python: str | None

    def to_wire(self) -> dict[str, Any]:
        return {"type": self.TYPE, "ray": self.ray, "python": self.python}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> HeadVersions:
        return cls(_text_or_none(data, "ray"), _text_or_none(data, "python"))


@dataclass(frozen=True, slots=True)
class HeadRay:
    """How the head's Ray is."""

    TYPE: ClassVar = "head_ray"
    SENDER: ClassVar[Sender] = "hub"

    phase: str
    start: str | None = None
    """Another text for each start of it; None: not known, or Ray remembers its nodes by itself."""

    def to_wire(self) -> dict[str, Any]:
        return {"type": self.TYPE, "phase": self.phase, "start": self.start}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> HeadRay:
        return cls(_text(data, "phase"), _text_or_none(data, "start"))


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the head saw of the whole cluster."""

    TYPE: ClassVar = "cluster"
    SENDER: ClassVar[Sender] = "hub"

    report: Mapping[str, Any]

    def to_wire(self) -> dict[str, Any]:
        return {"type": self.TYPE, "report": dict(self.report)}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Cluster:
        return cls(_object(data, "report"))


@dataclass(frozen=True, slots=True)
class ConditionTold:
    """Something wrong, as one node tells another."""

    code: str
    severity: str
    subject: str
    cause: str
    remedy: str
    seen_by: str

    def to_wire(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity,
            "subject": self.subject,
            "cause": self.cause,
            "remedy": self.remedy,
            "seen_by": self.seen_by,
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> ConditionTold:
        """Raises ValueError. A severity may be another version's, of any kind."""
        code = _text(data, "code")
        if not code.isidentifier():
            raise ValueError(f"{code!r} is no code")
        return cls(
            code,
            str(_there(data, "severity"))[:LONGEST_WORD],
            _text(data, "subject", LONGEST_NAME),
            _text(data, "cause", LONGEST_TEXT),
            _text(data, "remedy", LONGEST_TEXT),
            _text(data, "seen_by", LONGEST_NAME),
        )

    def cut(self) -> ConditionTold:
        """With texts that are short enough as JSON."""
        return ConditionTold(
            self.code[:LONGEST_WORD],
            self.severity,
            cut(self.subject[:LONGEST_NAME], NAME_BYTES),
            cut(self.cause[:LONGEST_TEXT], TEXT_BYTES),
            cut(self.remedy[:LONGEST_TEXT], TEXT_BYTES),
            cut(self.seen_by[:LONGEST_NAME], NAME_BYTES),
        )


@dataclass(frozen=True, slots=True)
class Conditions:
    """All that is wrong now: of a worker what it found itself, of the hub everything."""

    TYPE: ClassVar = "conditions"
    SENDER: ClassVar[Sender] = "both"

    conditions: tuple[ConditionTold, ...]

    def to_wire(self) -> dict[str, Any]:
        return {"type": self.TYPE, "conditions": [c.to_wire() for c in self.conditions]}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Conditions:
        rows = _objects(data, "conditions")[:MOST_SENT]
        return cls(tuple(map(ConditionTold.from_wire, rows)))


@dataclass(frozen=True, slots=True)
class Auth:
    """Whether the cluster's Ray asks for a token, and which."""

    TYPE: ClassVar = "ray_auth"
    SENDER: ClassVar[Sender] = "hub"

    mode: str
    token: str | None = field(repr=False)

    def to_wire(self) -> dict[str, Any]:
        return {"type": self.TYPE, "mode": self.mode, "token": self.token}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Auth:
        token = data.get("token")
        if token is not None and not isinstance(token, str):
            raise ValueError("token must be text or null")
        return cls(_text(data, "mode"), token)


@dataclass(frozen=True, slots=True)
class Ray:
    """How Ray is on the worker that says it, and its versions; None: not known."""

    TYPE: ClassVar = "ray"
    SENDER: ClassVar[Sender] = "worker"

    phase: str | None
    version: str | None
    python: str | None

    def to_wire(self) -> dict[str, Any]:
        return {
            "type": self.TYPE,
            "phase": self.phase,
            "version": self.version,
            "python": self.python,
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Ray:
        return cls(
            _text_or_none(data, "phase"),
            _text_or_none(data, "version"),
            _text_or_none(data, "python"),
        )


@dataclass(frozen=True, slots=True)
class DialBack:
    """Whoever says it asks to be dialled, and answers each connection with the nonce."""

    TYPE: ClassVar = "dial_back"
    SENDER: ClassVar[Sender] = "worker"

    id: int
    ports: tuple[int, ...]
    nonce: str

    def to_wire(self) -> dict[str, Any]:
        return {
            "type": self.TYPE,
            "id": self.id,
            "ports": list(self.ports),
            "nonce": self.nonce,
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> DialBack:
        ports, nonce = read_dial(data)
        return cls(_id(data), ports, nonce)


@dataclass(frozen=True, slots=True)
class DialledBack:
    """How dialling the ports of a `DialBack` went."""

    TYPE: ClassVar = "dialled_back"
    SENDER: ClassVar[Sender] = "hub"

    id: int
    results: Mapping[int, str]
    """Port to outcome."""

    def to_wire(self) -> dict[str, Any]:
        results = {str(port): outcome for port, outcome in self.results.items()}
        return {"type": self.TYPE, "id": self.id, "results": results}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> DialledBack:
        results = _object(data, "results")
        if not all(isinstance(outcome, str) for outcome in results.values()):
            raise ValueError("results must be an object of texts")
        return cls(_id(data), {int(port): outcome for port, outcome in results.items()})


@dataclass(frozen=True, slots=True)
class OpenPorts:
    """Ports besides the plan's on which programs of Ray's user have begun and ceased to listen on
    the node that says it. `anew`: what it said before holds no more."""

    TYPE: ClassVar = "open_ports"
    SENDER: ClassVar[Sender] = "worker"

    anew: bool
    opened: tuple[int, ...]
    closed: tuple[int, ...]

    def to_wire(self) -> dict[str, Any]:
        return {
            "type": self.TYPE,
            "anew": self.anew,
            "opened": list(self.opened),
            "closed": list(self.closed),
        }

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> OpenPorts:
        anew = _there(data, "anew")
        if not isinstance(anew, bool):
            raise ValueError("anew must be true or false")
        return cls(anew, _open_ports(data, "opened"), _open_ports(data, "closed"))


@dataclass(frozen=True, slots=True)
class OpenPortsOf:
    """The same of several nodes, by name; None: nobody knows what is open there."""

    TYPE: ClassVar = "open_ports_of"
    SENDER: ClassVar[Sender] = "hub"

    nodes: Mapping[str, OpenPorts | None]

    def to_wire(self) -> dict[str, Any]:
        nodes = {name: change and change.to_wire() for name, change in self.nodes.items()}
        return {"type": self.TYPE, "nodes": nodes}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> OpenPortsOf:
        return cls({name: cls._change(said) for name, said in _object(data, "nodes").items()})

    @staticmethod
    def _change(said: Any) -> OpenPorts | None:
        if said is not None and not isinstance(said, dict):
            raise ValueError("what is said of a node must be an object or null")
        return None if said is None else OpenPorts.from_wire(said)


@dataclass(frozen=True, slots=True)
class DialRefused:
    """Connections to a port of another node were refused where they were dialled. Of a worker
    `node` has the port; of the hub it has dialled the port of the node that is told."""

    TYPE: ClassVar = "dial_refused"
    SENDER: ClassVar[Sender] = "both"

    node: str
    port: int
    count: int

    def to_wire(self) -> dict[str, Any]:
        return {"type": self.TYPE, "node": self.node, "port": self.port, "count": self.count}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> DialRefused:
        return cls(_text(data, "node"), _number(data, "port", 65535), _number(data, "count"))


@dataclass(frozen=True, slots=True)
class SayAgain:
    """Whoever says it was restarted, and knows no more what it had been told."""

    TYPE: ClassVar = "say_again"
    SENDER: ClassVar[Sender] = "both"

    def to_wire(self) -> dict[str, Any]:
        return {"type": self.TYPE}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> SayAgain:
        return cls()


@dataclass(frozen=True, slots=True)
class Leaving:
    """This node stops: its Ray ends its tasks now, and its link is closed when that is done."""

    TYPE: ClassVar = "leaving"
    SENDER: ClassVar[Sender] = "worker"

    def to_wire(self) -> dict[str, Any]:
        return {"type": self.TYPE}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Leaving:
        return cls()


Message = (
    Nodes
    | NodesChanged
    | HeadVersions
    | HeadRay
    | Cluster
    | Conditions
    | Auth
    | Ray
    | DialBack
    | DialledBack
    | OpenPorts
    | OpenPortsOf
    | DialRefused
    | SayAgain
    | Leaving
)

TYPES: Final[Mapping[str, type[Message]]] = {
    of.TYPE: of
    for of in (
        Nodes,
        NodesChanged,
        HeadVersions,
        HeadRay,
        Cluster,
        Conditions,
        Auth,
        Ray,
        DialBack,
        DialledBack,
        OpenPorts,
        OpenPortsOf,
        DialRefused,
        SayAgain,
        Leaving,
    )
}


def encode(message: Message) -> bytes:
    """As it goes over the control stream."""
    return json.dumps(message.to_wire()).encode()


def decode(data: bytes) -> Message | None:
    """What came over it; None: a type of a later version. Raises ValueError with what is wrong."""
    try:
        body = json.loads(data)
    except RecursionError as exc:
        raise ValueError("a message that nests too deep") from exc
    if not isinstance(body, dict):
        raise ValueError("a message that is no object")
    kind = body.get("type")
    of = TYPES.get(kind) if isinstance(kind, str) else None
    if of is None:
        return None
    try:
        return of.from_wire(body)
    except ValueError as exc:
        raise ValueError(f"{kind}: {exc}") from exc


P = ParamSpec("P")
_M = TypeVar("_M", bound=Message)


class Handlers(Generic[P]):
    """What a role does with each message that is for it; others are left out.

    `P` is what a handler is given besides. A handler may raise ValueError, for what it was told.
    """

    def __init__(self) -> None:
        self._handlers: dict[type[Any], Callable[Concatenate[Any, P], None]] = {}

    def on(self, of: type[_M], handler: Callable[Concatenate[_M, P], None]) -> Handlers[P]:
        """Have messages of a type handled so."""
        assert of not in self._handlers, f"{of.TYPE} has a handler"
        self._handlers[of] = handler
        return self

    def __call__(self, message: Message, *args: P.args, **kwargs: P.kwargs) -> None:
        """Raises ValueError where the handler does."""
        handler = self._handlers.get(type(message))
        if handler is not None:
            handler(message, *args, **kwargs)


def read_dial(data: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """Ports and nonce of a question to be dialled. Raises ValueError."""
    ports, nonce = data.get("ports"), data.get("nonce")
    if not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
        raise ValueError("nonce must be 32 hexadecimal digits")
    if not isinstance(ports, list) or not 0 < len(ports) <= MOST_PORTS:
        raise ValueError(f"ports must be 1 to {MOST_PORTS} numbers")
    if not all(type(port) is int for port in ports):
        raise ValueError("a port is no number")
    return tuple(ports), nonce


def cut(text: str, most: int) -> str:
    """As much of the beginning of a text as takes at most `most` bytes as JSON."""
    if _size(text) <= most:
        return text
    size = 0
    for index, character in enumerate(text):
        size += _size(character)
        if size > most:
            return text[:index]
    return text


def _size(text: str) -> int:
    return len(json.dumps(text)) - 2


# -- what a key must be --------------------------------------------------------------------------


def _there(data: Mapping[str, Any], key: str) -> Any:
    if key not in data:
        raise ValueError(f"{key} is not there")
    return data[key]


def _text(data: Mapping[str, Any], key: str, most: int = LONGEST_WORD) -> str:
    value = _there(data, key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text")
    return value[:most]


def _text_or_none(data: Mapping[str, Any], key: str) -> str | None:
    return None if data.get(key) is None else _text(data, key)


def _id(data: Mapping[str, Any]) -> int:
    return _number(data, "id")


def _number(data: Mapping[str, Any], key: str, most: int = _MAX_ID - 1) -> int:
    value = _there(data, key)
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"{key} must be a number from 1 to {most}")
    return value


def _open_ports(data: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = _there(data, key)
    if not isinstance(value, list) or len(value) > MOST_OPEN_PORTS:
        raise ValueError(f"{key} must be at most {MOST_OPEN_PORTS} ports")
    if not all(type(port) is int and 0 < port < 65536 for port in value):
        raise ValueError(f"{key}: a port is none")
    return tuple(value)


def _object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = _there(data, key)
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object")
    return value


def _objects(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = _there(data, key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{key} must be a list of objects")
    return cast(list[Mapping[str, Any]], value)
