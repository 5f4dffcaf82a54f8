"""Looks at Ray, at a key and at the head as the service's user sees them: a child of `rayfwd init`.

Run as that user: root must not run what lies in a user's environment, only that user's own files
say how the head is reached, and there are homes that root cannot look into (NFS). JSON in on
standard input, JSON out.
"""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfwd.config import HeadConfig
from rayfwd.problems import Problem, ProblemError
from rayfwd.ray import install
from rayfwd.setup.steps import public_key
from rayfwd.transport.ssh import SshConnector

SECONDS = 90.0

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""systemd's default for a service."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the child has found."""

    ray: str | None
    """Absolute path of the command; None where it was not asked for or not found."""
    ray_versions: str
    ray_problem: Problem | None
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


@dataclass(frozen=True, slots=True)
class Person:
    """As whom to look."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: Path


def person_named(name: str) -> Person:
    """Raises KeyError where there is no such user."""
    return person_of(pwd.getpwnam(name))


def person_of(found: pwd.struct_passwd) -> Person:
    groups = tuple(os.getgrouplist(found.pw_name, found.pw_gid))
    return Person(found.pw_name, found.pw_uid, found.pw_gid, groups, Path(found.pw_dir))


def become(person: Person) -> tuple[dict[str, str], dict[str, Any]]:
    """Environment and ids (as `subprocess` takes them) of a child that is this person."""
    mine = person.uid == os.geteuid()
    env = {"HOME": str(person.home), "USER": person.name, "LOGNAME": person.name}
    env |= {"PATH": os.environ.get("PATH", _PATH) if mine else _PATH, "LC_ALL": "C.UTF-8"}
    if mine and "SSH_AUTH_SOCK" in os.environ:
        env["SSH_AUTH_SOCK"] = os.environ["SSH_AUTH_SOCK"]
    if mine:
        return env, {}
    return env, {"user": person.uid, "group": person.gid, "extra_groups": person.groups}


def look(
    person: Person, ray: str | None, head: str | None, identity: Path | None, fetch: bool
) -> Survey:
    """Ask a child. `fetch`: have the head show its host key.

    Raises ProblemError: `rayfwd_not_executable`, or why the head cannot be reached.
    """
    env, ids = become(person)
    argv = [sys.executable, "-m", "rayfwd.setup.survey"]
    asked = {"ray": ray, "head": head, "fetch": fetch}
    asked |= {"identity": None if identity is None else str(identity)}
    try:
        ran = subprocess.run(
            argv,
            check=False,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            env=env,
            cwd="/",
            timeout=SECONDS,
            **ids,
        )
        said = ran.stderr.strip().splitlines()
    except OSError as exc:
        ran, said = None, [str(exc)]
    except subprocess.TimeoutExpired:
        ran, said = None, [f"no answer in {SECONDS:.0f} s"]
    if ran is None or ran.returncode != 0:
        raise ProblemError(
            Problem(
                "rayfwd_not_executable",
                f"user {person.name} cannot run {sys.executable}: "
                f"{said[-1] if said else 'no output'}",
                "install rayfwd where that user may read it, as in /opt/rayfwd",
            )
        )
    answer = json.loads(ran.stdout)
    if "problem" in answer:
        raise ProblemError(Problem(**answer["problem"]))
    wrong = answer.pop("ray_problem")
    return Survey(ray_problem=Problem(**wrong) if wrong else None, **answer)


async def see(
    ray: str | None,
    head: str | None,
    identity: str | None,
    fetch: bool,
    env: Mapping[str, str],
) -> dict[str, Any]:
    """In the child."""
    answer: dict[str, Any] = {"ray": None, "ray_versions": "", "ray_problem": None}
    if identity is not None:
        answer["public_key"] = public_key(Path(identity))
    if ray is not None:
        try:
            found = await install.find(ray, env)
            answer["ray"] = found.command
            answer["ray_versions"] = f"Ray {found.versions.ray}, Python {found.versions.python}"
        except ProblemError as exc:
            answer["ray_problem"] = exc.problem.to_wire()
    if head is not None:
        with suppress(ProblemError):
            answer["login"] = await SshConnector(HeadConfig(ssh=head)).login()
    if head is not None and fetch:
        try:
            shown = await SshConnector(HeadConfig(ssh=head)).host_key()
        except ProblemError as exc:
            return {"problem": exc.problem.to_wire()}
        answer |= {"host": shown.host, "port": shown.port, "known": shown.known}
        answer |= {"host_key": shown.key, "fingerprint": shown.fingerprint}
    return answer


def main() -> None:
    asked = json.load(sys.stdin)
    print(json.dumps(asyncio.run(see(**asked, env=os.environ))))


if __name__ == "__main__":
    main()
