"""First process of a private namespace: gives it loopback and temporary directories, and reaps.

Usage: unshare --net --pid --mount --ipc --fork --mount-proc python init.py COMMAND...
Ends with COMMAND's exit code; the kernel then ends whatever is left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def main() -> int:
    for directory in ("/tmp", "/dev/shm"):
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3g,mode=1777", "tmpfs", directory], check=True
        )
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    child = os.posix_spawnp(sys.argv[1], sys.argv[1:], dict(os.environ))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    while True:
        pid, status = os.wait()  # others, whose parent has gone, are reaped on the way
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main())
