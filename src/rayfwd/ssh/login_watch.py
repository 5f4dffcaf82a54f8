"""What AsyncSSH does not say of a login: which key it waits for, and what the server would take.

AsyncSSH passes over a key that cannot sign as over one that is refused, and says neither so nor for
which it waits; nor, at the end, by which methods the server would have let the user in.
"""

from __future__ import annotations

from typing import Any

import asyncssh

from rayfwd.ssh.asyncssh_internals import LOGIN, UnexpectedError, check


class LoginWatch:
    """Of one connection; Attempt owns it. An AsyncSSH that is not laid out as is known here is left
    alone: then nothing of this is known, and a problem is told with fewer words."""

    def __init__(self) -> None:
        self.accepted: set[str] = set()
        """Methods by which the server would let the user in."""
        self.signing = ""
        """The key that the server takes, whose signature is waited for."""
        self.signed = ""
        """The last one that has signed."""
        self.not_signed: tuple[str, str] | None = None
        """The last one whose signature could not be had, and why."""
        self._connection: Any = None

    @property
    def offered(self) -> bytes:
        """The server's KEXINIT; nothing before it has come."""
        return b"" if self._connection is None else bytes(self._connection._server_kexinit)

    def follow(self, connection: Any) -> None:
        """From now on, before the login begins."""
        try:
            check(connection, LOGIN)
        except UnexpectedError:
            return
        self._connection = connection
        send, go_on = connection.send_userauth_request, connection.try_next_auth

        async def sending(method: bytes, *args: bytes, key: Any = None, **more: Any) -> None:
            self.signing = "" if key is None else _called(key)
            try:
                await send(method, *args, key=key, **more)
            except ValueError as exc:
                if self.signing:
                    self.not_signed = self.signing, str(exc)
                raise
            self.signed = self.signing or self.signed
            self.signing = ""

        def going_on(**how: Any) -> None:
            self.accepted.update(connection.get_server_auth_methods())
            go_on(**how)

        connection.send_userauth_request = sending
        connection.try_next_auth = going_on


def _called(key: Any) -> str:
    """A key pair, by its file or its comment."""
    if not isinstance(key, asyncssh.SSHKeyPair):
        return ""
    comment = key.get_comment("utf-8", "replace") or ""
    return f"{comment} ({key.algorithm.decode()})".strip()
