"""A head and a worker in a process that may open few files: `few_descriptors DIRECTORY LIMIT PORT`.

Says at which address of the head a program may listen on PORT and where the worker's listener to it
is; ends when something comes on standard input.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path

from rayfwd.config import LogConfig
from rayfwd.session.target import Target
from rayfwd.system import logs
from tests.unit.cluster import cluster


async def main(directory: Path, limit: int, port: int) -> None:
    async with cluster(directory, "w1") as c:
        listen = await c.listener("w1", Target(c.address, port))
        print(c.address, *listen, flush=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        await asyncio.to_thread(sys.stdin.readline)
    print("in order", flush=True)


if __name__ == "__main__":
    logs.setup(LogConfig())  # to standard error: standard output is the test's
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
