"""The SSH agent: where it is, and whether it answers (draft-miller-ssh-agent).

One that does not answer keeps a login waiting, and the server is not to blame. One that was
forwarded over a connection that is dead is such a one.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import Protocol

from rayfwd import codes
from rayfwd.config import Destination
from rayfwd.problems import Problem
from rayfwd.ssh.knownhosts import expanded

ANSWERS_WITHIN = 2.0
"""Seconds for the list of its keys."""
_WHICH_KEYS = b"\x00\x00\x00\x01\x0b"
"""SSH_AGENTC_REQUEST_IDENTITIES."""
USUAL = "SSH_AUTH_SOCK"
BY_NAME = re.compile(rf"{USUAL}|\$(\w+)|\$\{{(\w+)\}}")
"""IdentityAgent where it names a variable."""


class AsksAgent(Protocol):
    """A server whose login takes keys of an agent."""

    @property
    def called(self) -> str: ...
    @property
    def to(self) -> Destination: ...
    @property
    def agent_socket(self) -> str: ...


def agent_at(named: str) -> str:
    """Where IdentityAgent says that it is (ssh_config(5)): by a variable of the environment, or a
    path; empty: there is none."""
    if named == "none":
        return ""
    variable = BY_NAME.fullmatch(named or USUAL)
    if variable is not None:
        return os.environ.get(variable[1] or variable[2] or USUAL, "")
    return str(expanded(named, {}).expanduser())


async def blamed(problem: Problem, hop: AsksAgent) -> Problem:
    """The same, or where a login was not over in time and the agent is silent, that it is."""
    path = hop.agent_socket
    if problem.code is not codes.SSH_LOGIN_TIMEOUT or not path or await _answers(path):
        return problem
    return codes.SSH_LOGIN_TIMEOUT.problem(
        f"the login at {hop.called} does not finish, because the SSH agent here, at {path}, does "
        "not answer",
        "start that agent again (if it was forwarded, log in here again), or set "
        f"{hop.to.key('identity')} to a key without a passphrase, so that no agent is asked",
    )


async def _answers(path: str) -> bool:
    """Also where nobody is there: then nobody is waited for."""
    try:
        async with asyncio.timeout(ANSWERS_WITHIN):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(_WHICH_KEYS)
                await reader.read(1)
            finally:
                writer.close()
    except TimeoutError:
        return False
    except OSError:
        pass
    return True
