"""Runs a supervisor of a head for a test that kills it: `python -m tests.ray.supervise STATE RAY`.

Prints its state after every change, one a line.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from rayfwd.config import LogConfig
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.system.logs import setup
from tests.ray.machines import HEAD, NETWORK, head_config


async def main() -> None:
    setup(LogConfig(format="json"))
    config = head_config(Path(sys.argv[1]), sys.argv[2])
    supervisor = RaySupervisor(
        config, NETWORK, lambda: print(supervisor.now.state, supervisor.now.pid, flush=True)
    )
    supervisor.set_plan(HEAD, HEAD, None, 120.0)
    await supervisor.run()


if __name__ == "__main__":
    asyncio.run(main())
