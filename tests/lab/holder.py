"""Holds a small lab until it is interrupted, for the test of what an interrupted run leaves.

Usage: python -m tests.lab.holder FOLDER. Prints one JSON line: the namespaces it had made, the tag
of its mounts and interfaces, and a process in each machine.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from tests.lab.machines import Lab, made, tag


def main() -> None:
    with Lab(Path(sys.argv[1])) as lab:
        lab.machine("head").start_sshd()
        held = [machine.popen(["sleep", "600"]).pid for machine in lab.machines]
        pids = [pid for machine in lab.machines for pid in machine.pids()]
        assert set(held) <= set(pids)
        said = {"spaces": sorted(made), "tag": tag(), "pids": pids}
        print(json.dumps(said), flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
