"""What `ssh` says on standard error, at DEBUG1: how far a login has got, apart from all else.

Each `ssh` of a way writes there: that of the head, and those that it runs for its jump hosts. They
log in one after the other, so what comes after a login is the next hop's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LIMIT = 1 << 14
"""Characters that are kept, the last ones."""
STEPS = 64
"""Lines that say how far it has got that are kept of what was before these."""
LEVEL = "DEBUG1"
"""Of `ssh`'s log. At VERBOSE it says when it has logged in, and at this one each step before."""
LOGGED_IN = re.compile(
    r"^Authenticated to \S+ \((?:\[\S+\]:\d+|via proxy)\) using \"[\w-]+\"\.\r?$", re.MULTILINE
)
_DEBUG = "debug1: "
_DIALS = re.compile(r"^debug1: Connecting to \S+ \[(\S+)\] port (\d+)\.", re.MULTILINE)
_STANDS = re.compile(r"^debug1: Connection established\.", re.MULTILINE)
_FIRST = re.compile(
    r"^debug1: (?:kex|ssh)_exchange_identification: (?:banner line \d+: )?(.*?)\r?$", re.MULTILINE
)
_IS_SSH = re.compile(r"^debug1: Remote protocol version ", re.MULTILINE)
_HAS_KEYS = re.compile(r"^debug1: SSH2_MSG_NEWKEYS received", re.MULTILINE)
_METHOD = re.compile(r"^debug1: Next authentication method: (\S+)", re.MULTILINE)
# (In brackets, so that what hides secrets does not take what follows for one.)
_ACCEPTS = re.compile(r"^debug1: Server accepts key[:] (.+?)\r?$", re.MULTILINE)
_TAKES = re.compile(r"^debug1: Authentications that can continue: (\S+)", re.MULTILINE)
_TICKET = re.compile(
    r"^debug1: (?:Unspecified GSS failure|No credentials were supplied|Miscellaneous failure).*",
    re.MULTILINE,
)
_STEPS = (
    *(_DIALS, _STANDS, _FIRST, _IS_SSH, _HAS_KEYS),
    *(_METHOD, _ACCEPTS, _TAKES, _TICKET),
)


class Words:
    """Takes what comes, and keeps what tells something."""

    def __init__(self) -> None:
        self.text = ""
        """Whole lines, until it is over."""
        self._rest = ""

    def feed(self, data: bytes) -> None:
        """What has come."""
        text = self._rest + data.decode(errors="replace")
        *lines, rest = text.split("\n")
        self._rest = rest[-LIMIT:]
        self._add("".join(f"{line}\n" for line in lines if not _is_chatter(line)))

    def close(self) -> None:
        """No more comes: the last line has no end."""
        rest, self._rest = self._rest, ""
        if not _is_chatter(rest):
            self._add(rest)

    def _add(self, more: str) -> None:
        text = self.text + more
        cut = text.rfind("\n", 0, max(0, len(text) - LIMIT)) + 1
        steps = [line for line in text[:cut].splitlines(keepends=True) if _is_step(line)]
        self.text = "".join(steps[:STEPS]) + text[cut:]


def spoken(said: str) -> str:
    """Without what it says of its steps."""
    return "\n".join(line for line in said.splitlines() if line and not line.startswith(_DEBUG))


def _is_step(line: str) -> bool:
    return bool(LOGGED_IN.match(line)) or any(step.match(line) for step in _STEPS)


def _is_chatter(line: str) -> bool:
    return line.startswith(_DEBUG) and not _is_step(line)


@dataclass(frozen=True, slots=True)
class Reached:
    """How far it has got at the hop whose turn it is."""

    dialled: Sequence[str] = ()
    """Addresses with their ports, in turn; nothing where a jump host or a command dials."""
    connected: bool = False
    """The last of them has taken the connection."""
    words: str = ""
    """What was said there before, or in place of, that it is SSH."""
    is_ssh: bool = False
    has_keys: bool = False
    """The key exchange is over: what is left of the login is the user's."""
    methods: tuple[str, ...] = ()
    """By which the user was to be let in, in turn."""
    signing: str = ""
    """The key that the server takes, whose signature is waited for."""
    signed: str = ""
    """The last key that the server would take, and did not let in for its signature."""
    of_ticket: str = ""
    """What Kerberos here had to say."""


def reached(said: str) -> Reached:
    """By what came since the last login."""
    *_, last = LOGGED_IN.split(said)
    return Reached(
        dialled=tuple(f"{found[1]} port {found[2]}" for found in _DIALS.finditer(last)),
        connected=_STANDS.search(last) is not None,
        words="\n".join(found[1] for found in _FIRST.finditer(last)).strip(),
        is_ssh=_IS_SSH.search(last) is not None,
        has_keys=_HAS_KEYS.search(last) is not None,
        methods=tuple(found[1] for found in _METHOD.finditer(last)),
        signing=_signing(last),
        signed=_signed(last),
        of_ticket=_of_ticket(last),
    )


def _signing(said: str) -> str:
    """The last key that the server has taken, if the login has not gone on since."""
    *_, rest = _TAKES.split(said)
    taken = _ACCEPTS.findall(rest)
    return str(taken[-1]) if taken else ""


def _signed(said: str) -> str:
    # The server answers each attempt that fails by what can continue.
    *answered, _ = _TAKES.split(said)[::2]
    taken = [key for attempt in answered for key in _ACCEPTS.findall(attempt)]
    return str(taken[-1]) if taken else ""


def _of_ticket(said: str) -> str:
    """In one line. The library's own words come below those of GSSAPI, as lines of their own."""
    found = ""
    for line in _TICKET.finditer(said):
        below = said[line.end() :].lstrip("\r\n").partition("\n")[0].strip()
        generic = line[0].removeprefix(_DEBUG).strip()
        found = generic if not below or below.startswith(_DEBUG) else below
    return found
