"""Ray's own token (Ray 2.52 on): whether there is one, which, where it lies, whether it fits.

Read from Ray 2.60.0 (`_private/authentication`) and tried: a driver whose `ray.init()` gets no
address, or "auto", turns to a token by itself where `~/.ray/auth_token` is there. One with an
explicit address, `ray status`, `ray job submit` and `ray list` do so only with RAY_AUTH_MODE=token
in their environment; without it they are refused. From 2.61 on (by its manual) all of them do.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.ray.install import version_key
from rayfwd.system import setting
from rayfwd.system.files import read_regular, replace_file
from rayfwd.transport.endpoints import Endpoint

FIRST = (2, 52)
"""First Ray that knows tokens."""
BY_DEFAULT = (2, 61)
"""First Ray that asks for one unless told otherwise, and whose tools all find it."""

RECORD = "ray_auth.json"
TOKEN_FILE = "ray_token"
TOKEN_TIMEOUT = 5.0
"""Seconds for an answer of the dashboard's."""
LONGEST_TOKEN = 512
"""Characters."""

MODE, VALUE, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True, slots=True)
class RayAuth:
    """Whether the cluster's Ray asks for a token, and which."""

    mode: Literal["token", "off"]
    token: str = field(default="", repr=False)

    def to_wire(self) -> dict[str, Any]:
        """For the link only: it holds the token."""
        return {"mode": self.mode, "token": self.token or None}

    @classmethod
    def from_wire(cls, data: Any) -> RayAuth:
        """Raises ValueError, which does not show the token."""
        if not isinstance(data, dict) or data.get("mode") not in ("token", "off"):
            raise ValueError("ray_auth: mode must be token or off")
        token = data.get("token")
        if data["mode"] == "off":
            return cls("off")
        if not isinstance(token, str) or not 0 < len(token) <= LONGEST_TOKEN:
            raise ValueError(f"ray_auth: token must be text of 1 to {LONGEST_TOKEN} characters")
        if not (token.isascii() and token.isprintable()) or token != token.strip():
            raise ValueError("ray_auth: token must be printable ASCII without spaces around it")
        return cls("token", token)

    @property
    def fingerprint(self) -> str:
        """Tells one from another without telling the token."""
        return f"{self.mode}:{_digest(self.token)}"


def read_token(env: Mapping[str, str]) -> str | None:
    """The token that a Ray process with this environment uses, from where Ray itself takes it.

    None where its mode is not `token`, or nothing can be read. Reads a file.
    """
    if env.get(MODE, "").lower() != "token":
        return None
    return _token_of(env)


def decide(asked: str, version: str | None, env: Mapping[str, str], state_dir: Path) -> RayAuth:
    """Of a head: whether its Ray of that version (None: not known yet) asks for a token, and which.

    "auto" is a token where that takes no further step of anybody's: where every tool of that Ray
    finds it (2.61 on), and where this user has chosen it already (RAY_AUTH_MODE=token, or a file
    ~/.ray/auth_token when the cluster is first started: then Ray asks for it anyway). It holds from
    then on, so that a file that comes or goes later restarts nothing.

    Reads and writes files. Raises ProblemError (ray_auth_unsupported, ray_auth_unwritable).
    """
    kept = kept_auth(state_dir)
    key = version_key(version) if version is not None else None
    if asked == "token" and key is not None and key < FIRST:
        raise codes.RAY_AUTH_UNSUPPORTED.error(
            f"{setting.value('ray.auth', 'token')}, but Ray {version} has no tokens",
            "install Ray 2.52 or newer on every node, or set " + setting.value("ray.auth", "auto"),
        )
    on = _is_on(asked, key, env, kept)
    if on is None:
        return RayAuth("off")
    auth = RayAuth("token", _chosen(env, kept)) if on else RayAuth("off")
    keep(auth, state_dir)
    return auth


def would_ask(asked: str, version: str, env: Mapping[str, str], state_dir: Path) -> bool:
    """What `decide` would come to. Reads files, and writes none."""
    return _is_on(asked, version_key(version), env, kept_auth(state_dir)) is True


def asks_by_itself(version: str, env: Mapping[str, str]) -> bool | None:
    """Whether a new head with `ray.auth = "auto"` has a token; None: that Ray knows none."""
    key = version_key(version)
    return None if key < FIRST else _is_on("auto", key, env, None) is True


def _is_on(
    asked: str, key: tuple[int, ...] | None, env: Mapping[str, str], kept: RayAuth | None
) -> bool | None:
    """Whether there is a token; None: no, for a Ray that knows none or is not known itself."""
    said = env.get(MODE, "").lower()
    if asked in {"token", "off"}:
        return asked == "token"
    if key is not None and key < FIRST:
        return None
    if said:
        return said == "token"
    if key is not None and key >= BY_DEFAULT:
        return True
    if kept is not None:
        return kept.mode == "token"
    return None if key is None else _token_of(env) is not None


def _chosen(env: Mapping[str, str], kept: RayAuth | None) -> str:
    """The token: the environment's, else the one kept, else the user's own, else a new one."""
    found = (
        (_token_of({k: v for k, v in env.items() if k in (VALUE, PATH)}) if named_by(env) else None)
        or (kept.token if kept is not None else None)
        or _token_of(env)
    )
    return found or secrets.token_hex(32)


def named_by(env: Mapping[str, str]) -> str | None:
    """The variable by which this environment names the token: it is whoever wrote that there who
    changes it. None: the token is the one that is kept."""
    return next((name for name in (VALUE, PATH) if env.get(name)), None)


def turn_over(env: Mapping[str, str], state_dir: Path) -> RayAuth:
    """Of a head: a new token in place of the one that is kept, on disk when this returns.

    Reads and writes files. Raises ProblemError (ray_auth_unwritable), with the old one in force.
    """
    before, auth = kept_auth(state_dir), RayAuth("token", secrets.token_hex(32))
    keep(auth, state_dir)
    provide(auth, env, state_dir, before)
    return auth


def kept_auth(state_dir: Path) -> RayAuth | None:
    """What was decided, or heard from the head, before."""
    with suppress(OSError, ValueError):
        return RayAuth.from_wire(json.loads(read_regular(state_dir / RECORD)))
    return None


def keep(auth: RayAuth, state_dir: Path) -> None:
    """On disk, mode 0600; with the file that Ray reads. Raises ProblemError."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = _written(state_dir)
        if kept_auth(state_dir) != auth:
            _record(auth, written, state_dir)
        if auth.mode == "token" and _read(state_dir / TOKEN_FILE) != auth.token:
            replace_file(state_dir / TOKEN_FILE, auth.token.encode() + b"\n")
    except OSError as exc:
        raise codes.RAY_AUTH_UNWRITABLE.error(
            f"Ray's token cannot be kept in {state_dir}: {exc.strerror or exc}",
            "make that directory writable for this user, and check that its disk is not full",
        ) from exc


def environment(auth: RayAuth | None, state_dir: Path) -> dict[str, str]:
    """What tells Ray of it. A path, not the token: an environment is shown in many places."""
    if auth is None:
        return {}
    if auth.mode == "off":
        return {MODE: "disabled"}
    return {MODE: "token", PATH: str(state_dir / TOKEN_FILE)}


def provide(
    auth: RayAuth, env: Mapping[str, str], state_dir: Path, before: RayAuth | None = None
) -> Problem | None:
    """Give the token to this user's own drivers, as `~/.ray/auth_token`; a file that is not of our
    making is left alone, unless it holds the cluster's token of `before`, which this one replaces.
    What was given before and holds no more is taken away.

    Returns what is wrong.
    """
    path = _home(env) / ".ray" / "auth_token"
    written = _written(state_dir)
    try:
        there = _read(path)
        ours = there is not None and _digest(there) == written
        if auth.mode == "off":
            if ours:
                path.unlink()
                _record(auth, "", state_dir)
            return None
        if there == auth.token:
            return None
        replaced = before is not None and there == before.token
        if there is None or ours or replaced:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _record(auth, _digest(auth.token), state_dir)
            replace_file(path, auth.token.encode() + b"\n")
            return None
    except OSError as exc:
        return codes.RAY_TOKEN_FILE_UNWRITABLE.problem(
            f"{path} cannot be written ({exc.strerror or exc}), so this user's drivers do not "
            "find the cluster's token there",
            f"make it writable, or set {MODE}=token and {PATH}={state_dir / TOKEN_FILE} in the "
            "drivers' environment",
        )
    return codes.RAY_TOKEN_FILE_DIFFERS.problem(
        f"{path} holds another token than the cluster's, so this user's drivers are refused",
        "move it away, and rayfwd writes the cluster's token there; or set "
        f"{PATH}={state_dir / TOKEN_FILE} in the drivers' environment",
    )


async def check(dashboard: Endpoint, env: Mapping[str, str]) -> Problem | None:
    """Whether a Ray process with this environment is welcome at the head's Ray, as its dashboard
    tells. None too where nothing answers, or where that Ray knows no token.
    """
    return await asyncio.to_thread(_check, dashboard, env)


def _check(dashboard: Endpoint, env: Mapping[str, str]) -> Problem | None:
    try:
        status, body = _ask(dashboard, "GET", "/api/authentication_mode", None)
        mode = json.loads(body).get("authentication_mode") if status == http.client.OK else None
        on = env.get(MODE, "").lower() == "token"
        token = read_token(env)
        if mode == "disabled" and on:
            return codes.RAY_AUTH_DIFFERS.problem(
                "this node's Ray has a token and the head's Ray asks for none, so they cannot "
                "talk to each other",
                "let rayfwd start the head's Ray, or set the same ray.auth (--auth) on both",
            )
        if mode != "token":
            return None
        if not on or token is None:
            return codes.RAY_TOKEN_MISSING.problem(
                "the head's Ray asks for a token, and this node has none"
                + ("" if on else f" ({MODE} is {env.get(MODE) or 'not set'})"),
                f"set {setting.value('ray.auth', 'auto')} here, and remove RAY_AUTH_* from "
                f"{setting.key('ray.env')}: the head sends its token over the link; run "
                "the same rayfwd on both sides",
            )
        status, _ = _ask(dashboard, "POST", "/api/authenticate", token)
        if status in {http.client.UNAUTHORIZED, http.client.FORBIDDEN}:
            return codes.RAY_TOKEN_WRONG.problem(
                "the head's Ray refuses this node's token",
                f"remove RAY_AUTH_* from {setting.key('ray.env')}; if the head's Ray was started "
                "by hand, restart it with the command that `rayfwd plan` prints on the head",
            )
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        pass
    return None


def _ask(dashboard: Endpoint, method: str, path: str, token: str | None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*dashboard, timeout=TOKEN_TIMEOUT)
    try:
        headers = {"User-Agent": "rayfwd"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(65536)
    finally:
        connection.close()


def _token_of(env: Mapping[str, str]) -> str | None:
    if given := env.get(VALUE):
        return given.strip() or None
    if path := env.get(PATH):
        return _read(Path(path).expanduser())
    return _read(_home(env) / ".ray" / "auth_token") if "HOME" in env else None


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("HOME") or os.path.expanduser("~"))


def _read(path: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="ascii").strip() or None
    return None


def _written(state_dir: Path) -> str:
    """The digest of the token that we put into the user's home; empty: none."""
    with suppress(OSError, ValueError, AttributeError):
        return str(json.loads(read_regular(state_dir / RECORD)).get("given", ""))
    return ""


def _record(auth: RayAuth, given: str, state_dir: Path) -> None:
    data = {**auth.to_wire(), "given": given}
    replace_file(state_dir / RECORD, json.dumps(data).encode() + b"\n")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
