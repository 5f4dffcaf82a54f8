"""Holds a small lab until it is interrupted, for the test of what an interrupted run leaves.

Usage: python -m tests.lab.holder FOLDER. Prints one JSON line: the namespaces it had made, the tag
of its mounts and interfaces, and a process in each machine, the first of them stopped.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from tests.lab.machines import Lab, made, tag
from tests.lab.process import state


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    with Lab(Path(sys.argv[1])) as lab:
        lab.machine("head").start_sshd()
        sleepers = [machine.popen(["sleep", "600"]) for machine in lab.machines]
        held = [sleeper.pid for sleeper in sleepers]
        sleepers[0].signal(signal.SIGSTOP)
        while state(sleepers[0].parent) != "T":  # nsenter follows
            time.sleep(0.01)
        pids = [pid for machine in lab.machines for pid in machine.pids()]
        assert set(held) <= set(pids)
        said = {"spaces": sorted(made), "tag": tag(), "pids": pids}
        print(json.dumps(said), flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
