"""First process of a private namespace: gives it loopback and temporary directories, and reaps.

Usage:

    unshare --net --pid --mount --ipc --fork --mount-proc
    python -E -s -S -m tests.ray.init KEEP COMMAND...

KEEP lists directories, with ":" between them, that stay where they are even below /tmp.
Ends with COMMAND's exit code; the kernel then ends whatever is left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.namespaces import cover

COVERED = dict.fromkeys(("/tmp", "/dev/shm"), "size=3g,mode=1777")


def main() -> int:
    keep = [Path(os.path.realpath(path)) for path in sys.argv[1].split(":")]
    cover("tmpfs", COVERED, [path for path in keep if path.is_dir()])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    child = os.posix_spawnp(sys.argv[2], sys.argv[2:], dict(os.environ))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    while True:
        pid, status = os.wait()  # others, whose parent has gone, are reaped on the way
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main())
