"""The program: `rayfwd`, and `python -m rayfwd`.

Most of its start is the loading of modules, and there is nothing to clean up yet. Until the verb
runs, Ctrl-C ends the process at once, without Python's traceback.
"""

import os
import signal
import sys


def _end_at_ctrl_c() -> None:
    """Unless whoever started this process had it ignore that."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    if os.getpid() != 1:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    else:  # the kernel spares process 1 every signal that it has no handler for
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))


_end_at_ctrl_c()


def main() -> int:
    """The exit code."""
    from rayfwd.cli import INTERRUPTED  # noqa: PLC0415  # not before Ctrl-C is quiet
    from rayfwd.cli import main as command  # noqa: PLC0415

    try:
        return command()
    except KeyboardInterrupt:  # a second one, while the first was obeyed
        return INTERRUPTED
    finally:
        _end_at_ctrl_c()  # all is cleaned up


if __name__ == "__main__":
    sys.exit(main())
