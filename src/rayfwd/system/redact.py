"""Which names stand for a secret, and text with secrets blanked (pure)."""

from __future__ import annotations

import re

REDACTED = "[redacted]"

_SECRET_WORDS = frozenset(
    {"token", "tokens", "secret", "secrets", "key", "keys", "password", "passwd", "passphrase"}
    | {"credential", "credentials", "apikey"}
)
_HARMLESS_ENDINGS = frozenset({"path", "file", "fingerprint", "type", "algorithm", "mode"})
"""Last words of names that speak about a secret without holding it (`RAY_AUTH_TOKEN_PATH`)."""

_NAME = r"(?:\w+[_-])*(?:token|secret|key|password|passwd|passphrase)"
_FLAG = re.compile(rf"^--?{_NAME}$", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?<![\w-])(?P<name>-{{0,2}}{_NAME}s?)(?P<gap>\"?\s*[=:]\s*)"
    r"(?P<value>\"[^\"]*\"|'[^']*'|[^\s,;&]+)",
    re.IGNORECASE,
)
_AFTER_FLAG = re.compile(
    rf"(?<!\S)(?P<name>--{_NAME})(?P<gap>\s+)(?P<value>[^\s-]\S*)", re.IGNORECASE
)
_BEARER = re.compile(r"(?P<name>\bbearer)(?P<gap>\s+)(?P<value>[\w.~+/=-]+)", re.IGNORECASE)


_USERINFO = re.compile(
    r"(?P<name>\b[a-z][a-z0-9+.-]*://[^\s/:@]*)(?P<gap>:)(?P<value>[^\s/@]+)(?=@)", re.IGNORECASE
)
"""A password in a URL: proxies are given so."""


def names_a_secret(name: str) -> bool:
    """Whether what `name` names must not be shown (`node_key`, `RAY_AUTH_TOKEN`)."""
    words = [w for w in re.split(r"[^A-Za-z0-9]+", name.lower()) if w]
    return bool(_SECRET_WORDS.intersection(words)) and words[-1] not in _HARMLESS_ENDINGS


def is_secret_flag(word: str) -> bool:
    """Whether `word` is a flag whose value, the next word, must not be shown."""
    return _FLAG.match(word) is not None


def secrets_in(text: str) -> set[str]:
    """What `redact_text` would blank."""
    patterns = (_USERINFO, _BEARER, _ASSIGNED, _AFTER_FLAG)
    return {m["value"].strip("\"'") for pattern in patterns for m in pattern.finditer(text)}


def redact_text(text: str) -> str:
    """`text` with passwords in URLs, and what follows a secret's name (`--password=…`), blanked."""
    for pattern in (_USERINFO, _BEARER, _ASSIGNED, _AFTER_FLAG):
        text = pattern.sub(rf"\g<name>\g<gap>{REDACTED}", text)
    return text
