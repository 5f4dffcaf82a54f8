"""AsyncSSH's plain local forwarding as a process, for comparison."""

from __future__ import annotations

import asyncio
import sys

import asyncssh


async def main() -> None:
    via, key, known_hosts, alias, port, server = sys.argv[1:]
    async with asyncssh.connect(
        "127.0.0.1",
        int(via),
        config=None,
        client_keys=[key],
        known_hosts=known_hosts,
        host_key_alias=f"[127.0.0.1]:{alias}",
        encryption_algs=["aes128-gcm@openssh.com"],
    ) as connection:
        await connection.forward_local_port("127.0.0.1", int(port), "127.0.0.1", int(server))
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
