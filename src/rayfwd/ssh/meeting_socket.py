"""Where a socket of a meeting place is, on that host."""

from __future__ import annotations

import asyncssh


class NoSftpError(Exception):
    """That host does not say where the home directory is."""


async def place_of(connection: asyncssh.SSHClientConnection, socket: str) -> str:
    """Its absolute path: what begins with no slash is in the home directory of who has logged in,
    as SFTP begins there. Raises NoSftpError, and AsyncSSH's errors."""
    if socket.startswith("/"):
        return socket
    try:
        async with connection.start_sftp_client() as sftp:
            home = str(await sftp.realpath("."))
    except (asyncssh.ChannelOpenError, asyncssh.SFTPError) as exc:
        raise NoSftpError(exc.reason) from exc
    return f"{home.rstrip('/')}/{socket}"
