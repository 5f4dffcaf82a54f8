"""Looks at Ray, at a key and at the head as the service's user sees them, in a child that is it.

Only that user's own files say how the head is reached.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import install, token
from rayfwd.setup.steps import public_key
from rayfwd.ssh.ssh_connector import SshConnector
from rayfwd.system import asuser
from rayfwd.system.asuser import SystemUser

SURVEY_TIMEOUT = 90.0
"""Seconds: Ray is imported, and the head dialled."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the child has found."""

    ray: str | None
    """Absolute path of the command; None where it was not asked for or not found."""
    ray_versions: str
    ray_problem: Problem | None
    asks_for_token: bool | None = None
    """Whether Ray would ask for one by itself; None: it knows none."""
    login: str = ""
    """Whom SSH logs in as at the head, where one was given; empty: the configuration is no good."""
    host: str = ""
    port: int = 22
    host_key: str | None = None
    """The head's public key, as it shows it; None where it was not asked for."""
    fingerprint: str = ""
    known: bool = False
    """The user's own files have it."""
    public_key: str | None = None
    """The public half of the key that was asked for, as a line; None: it cannot be read."""


def survey(
    account: SystemUser, ray: str | None, head: str | None, identity: Path | None, fetch: bool
) -> Survey:
    """Look as `account`. `fetch`: have the head show its host key.

    Raises ProblemError: `rayfwd_not_executable`, or why the head cannot be reached.
    """
    asked = {"ray": ray, "head": head, "fetch": fetch}
    asked |= {"identity": None if identity is None else str(identity)}
    found = asuser.call(account, probe, asked, timeout=SURVEY_TIMEOUT)
    wrong = found.pop("ray_problem")
    return Survey(ray_problem=codes.problem_from(wrong) if wrong else None, **found)


async def probe(
    ray: str | None, head: str | None, identity: str | None, fetch: bool
) -> dict[str, Any]:
    """In the child, whose environment is that user's. Raises ProblemError."""
    found: dict[str, Any] = {"ray": None, "ray_versions": "", "ray_problem": None}
    if identity is not None:
        found["public_key"] = public_key(Path(identity))
    if ray is not None:
        try:
            installed = await install.find(ray, os.environ)
            found["ray"] = installed.command
            versions = installed.versions
            found["ray_versions"] = f"Ray {versions.ray}, Python {versions.python}"
            found["asks_for_token"] = token.asks_by_itself(versions.ray, os.environ)
        except ProblemError as exc:
            found["ray_problem"] = exc.problem.to_wire()
    if head is not None:
        with suppress(ProblemError):
            found["login"] = await SshConnector(HeadConfig(ssh=head)).login()
    if head is not None and fetch:
        shown = await SshConnector(HeadConfig(ssh=head)).host_key()
        found |= {"host": shown.host, "port": shown.port, "known": shown.known}
        found |= {"host_key": shown.key, "fingerprint": shown.fingerprint}
    return found
