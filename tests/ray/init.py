"""First process of a private namespace: gives it loopback and temporary directories, and reaps.

Usage: unshare --net --pid --mount --ipc --fork --mount-proc python init.py KEEP COMMAND...
KEEP lists directories, with ":" between them, that stay where they are even below /tmp.
Ends with COMMAND's exit code; the kernel then ends whatever is left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def cover(directory: str, keep: list[str]) -> None:
    """Mount a tmpfs on `directory`, and what lies in it and is to be kept on that."""
    inside = sorted({k for k in keep if k.startswith(directory + "/") and os.path.isdir(k)})
    handles = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in inside}
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3g,mode=1777", "tmpfs", directory], check=True
    )
    for path, handle in handles.items():  # parents come first, and their trees with them
        if not os.path.exists(path):
            os.makedirs(path)
            source = f"/proc/self/fd/{handle}"
            bind = ["mount", "--no-canonicalize", "--bind", source, path]
            subprocess.run(bind, check=True, pass_fds=[handle])
        os.close(handle)


def main() -> int:
    keep = [os.path.realpath(path) for path in sys.argv[1].split(":")]
    for directory in ("/tmp", "/dev/shm"):
        cover(directory, keep)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    child = os.posix_spawnp(sys.argv[2], sys.argv[2:], dict(os.environ))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    while True:
        pid, status = os.wait()  # others, whose parent has gone, are reaped on the way
        if pid == child:
            return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main())
