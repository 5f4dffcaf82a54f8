"""Ray's own token (Ray 2.52 and later): where it is read from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def read_token(env: Mapping[str, str]) -> str | None:
    """The token that a Ray process with this environment uses, from where Ray itself takes it.

    None where its mode is not `token`, or nothing can be read (`ray-security/token-auth` in Ray's
    manual). Reads a file.
    """
    if env.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if given := env.get("RAY_AUTH_TOKEN"):
        return given.strip()
    path = env.get("RAY_AUTH_TOKEN_PATH") or f"{env.get('HOME', '~')}/.ray/auth_token"
    with suppress(OSError, RuntimeError):
        return Path(path).expanduser().read_text().strip() or None
    return None
