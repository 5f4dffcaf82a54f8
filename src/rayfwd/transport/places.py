"""Where a socket of a meeting place is, on that host."""

from __future__ import annotations

import asyncssh


async def place_of(connection: asyncssh.SSHClientConnection, socket: str) -> str:
    """Its absolute path: what begins with no slash is in the home directory of who has logged in,
    as SFTP begins there. Raises AsyncSSH's errors."""
    if socket.startswith("/"):
        return socket
    async with connection.start_sftp_client() as sftp:
        home = str(await sftp.realpath("."))
    return f"{home.rstrip('/')}/{socket}"
