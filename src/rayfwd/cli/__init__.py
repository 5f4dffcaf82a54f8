"""The command line: one module a verb, loaded only when its verb is asked for.

Each verb's module has `add_arguments(parser)` and `run(args) -> int`, the exit code. `rayfwd
attach` is started for every lane, so nothing here may import more than it needs.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rayfwd import __version__
from rayfwd.problems import ProblemError
from rayfwd.system import setting
from rayfwd.system.journal import is_stream
from rayfwd.system.lean import nothing_collected
from rayfwd.system.paths import have_a_home_and_a_name

OK = 0
FAULT = 1
MISTAKE = 2
"""The configuration file or the command line is wrong (also argparse's code)."""
NOT_READY = 3
WARNED = 4
INTERRUPTED = 130
PIPE_CLOSED = 141

EXIT_CODES = {
    OK: "done",
    FAULT: "a fault; the message says what is wrong and what to do",
    MISTAKE: "a mistake in the configuration file or on the command line; one line for each",
    NOT_READY: "the node runs but is not ready: `status`, and `join` and `head` with --wait-for",
    WARNED: "`doctor` only: it works, but there are warnings",
    INTERRUPTED: "interrupted by Ctrl-C",
    PIPE_CLOSED: "the reader of the output has closed it",
}
"""What they mean, of all verbs."""


@dataclass(frozen=True)
class Verb:
    """What the command line knows of a verb before its module is loaded."""

    help: str
    exit_codes: Mapping[int, str] = field(default_factory=dict)
    """Where one says more than it does of all verbs."""

    @property
    def epilog(self) -> str:
        """The end of its help."""
        return _epilog(self.exit_codes)


VERBS = {
    "init": Verb("set this machine up as a head or as a worker"),
    "run": Verb(
        "run the daemon in the foreground (what the service runs)",
        {OK: "ended by SIGTERM or Ctrl-C", FAULT: "it could not start, or failed"},
    ),
    "join": Verb(
        "join a cluster from this machine without a file: for an hour, or in a container",
        {
            OK: "ended by SIGTERM, Ctrl-C or --stop-after",
            FAULT: "it could not start, or failed",
            NOT_READY: "not ready within --wait-for",
        },
    ),
    "head": Verb(
        "run the head of a cluster on this machine without a file",
        {
            OK: "ended by SIGTERM, Ctrl-C or --stop-after",
            FAULT: "it could not start, or failed",
            NOT_READY: "not ready within --wait-for",
        },
    ),
    "add": Verb(
        "on the head: bring other machines into the cluster over SSH",
        {
            OK: "all machines are in the cluster",
            FAULT: "a machine is not in the cluster, or no head runs here",
        },
    ),
    "remove": Verb(
        "on the head: remove machines that `add` brought into the cluster",
        {OK: "all machines are removed", FAULT: "a machine is not removed, or no head runs here"},
    ),
    "connect": Verb(
        "make the head's dashboard, Ray Client and page available on a machine that is no node",
        {OK: "ended by SIGTERM or Ctrl-C", FAULT: "it could not start"},
    ),
    "reload": Verb("make the running daemon read its configuration file again"),
    "check": Verb("validate the configuration file and show what it results in"),
    "doctor": Verb(
        "check this machine, the way to the head, and Ray, and say what keeps them from working",
        {OK: "all passes", FAULT: "something fails", WARNED: "there are warnings"},
    ),
    "plan": Verb(
        "show every node's address and ports, and the exact `ray start` command",
        {FAULT: "there is no plan yet, because the head has not been reached"},
    ),
    "status": Verb(
        "show the state of the running daemon, problems first",
        {
            OK: "the node is ready",
            FAULT: "no daemon answers",
            NOT_READY: "the node runs but is not ready",
        },
    ),
    "canary": Verb(
        "send a small task and 1 MB to every node and back, and report the result",
        {OK: "every node passed", FAULT: "a node did not pass, or the canary could not be sent"},
    ),
    "trace": Verb(
        "show what passes over the daemon's lanes for some seconds, one line for each frame"
    ),
    "explain": Verb(
        "explain a code of the log or of the status, and say what to do about it",
        {FAULT: "the code does not exist"},
    ),
    "attach": Verb(
        "connect standard input and output to the hub (a forced command for sshd)",
        {
            OK: "the hub or the other side has ended the connection",
            FAULT: "the hub cannot be reached",
        },
    ),
    "keeper": Verb("run Ray for the daemon (what the service rayfwd-ray runs)"),
    "env": Verb("print the environment that a driver needs to find the cluster"),
    "exec": Verb("run a command with the environment that `rayfwd env` prints"),
    "overlay": Verb("set up the overlay network for the daemon (what the service rayfwd-net runs)"),
    "forget": Verb(
        "on the head: forget a worker, free its name, address and ports, and replace Ray's token",
        {FAULT: "there is no such worker, or an environment variable sets Ray's token"},
    ),
    "uninstall": Verb("remove what `rayfwd init` has created"),
    "demo": Verb("show rayfwd at work, on this machine only"),
}
"""By name; the verb's module has the same."""


def _epilog(codes: Mapping[int, str]) -> str:
    lines = "".join(f"  {code:<4} {why}\n" for code, why in codes.items())
    return f"exit codes:\n{lines}" if codes else ""


class MistakeError(Exception):
    """What the user gave is wrong; one line each, told without a traceback, exit code 2."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


class _Parser(argparse.ArgumentParser):
    """The whole command line."""

    def error(self, message: str) -> NoReturn:
        """As usual, but a verb that does not exist has those that are like it, and not all."""
        _, wrong, words = message.partition("argument VERB: invalid choice: ")
        if wrong:
            from difflib import get_close_matches  # noqa: PLC0415  # what most calls do not need

            word = words.partition(" (")[0].strip("'")
            close = " or ".join(get_close_matches(word, VERBS, 2))
            hint = f"did you mean {close}?" if close else "`rayfwd --help` lists all"
            message = f"the verb {word} does not exist; {hint}"
        super().error(message)


class _VerbParser(argparse.ArgumentParser):
    """Asks the verb's module for its arguments when the verb is used, not before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded = False

    def load(self) -> None:
        """Ask now."""
        if not self._loaded:
            self._loaded = True
            verb = self.prog.split()[-1]
            module = importlib.import_module(f"rayfwd.cli.{verb}")
            self.description = module.__doc__
            module.add_arguments(self)
            self.set_defaults(module=module)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.load()
        return super().parse_known_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rayfwd",
        description="Make a Ray cluster work when its machines can reach each other only by SSH.",
        epilog=_epilog(EXIT_CODES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print rayfwd's version")
    more = "with --version: also print whether rayfwd is compiled, and which Python runs it"
    parser.add_argument("--verbose", dest="built", action="store_true", help=more)
    what = "the configuration file (default: ~/.config/rayfwd.toml, /etc/rayfwd.toml)"
    parser.add_argument("--config", metavar="PATH", type=Path, default=None, help=what)
    which = "the cluster of that name, if this machine has several (default: $RAYFWD_CLUSTER)"
    parser.add_argument("--cluster", metavar="NAME", type=_cluster, default=None, help=which)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_VerbParser)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(
            name,
            help=verb.help,
            epilog=verb.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # SUPPRESS: an absent --config after the verb must not hide one before it.
        sub.add_argument(
            "--config", metavar="PATH", type=Path, default=argparse.SUPPRESS, help=what
        )
        sub.add_argument(
            "--cluster", metavar="NAME", type=_cluster, default=argparse.SUPPRESS, help=which
        )
    return parser


def _cluster(name: str) -> str:
    from rayfwd.cluster.plan import check_name  # noqa: PLC0415  # what most calls do not need

    try:
        return check_name(name)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{name}: {exc}") from None


def full_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line with every verb's arguments, and the verbs' own: for its documents."""
    parser = _parser()
    (verbs,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for verb in verbs.values():
        verb.load()
    return parser, dict(verbs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is documented in `rayfwd --help`."""
    if os.getpid() == 1:
        from rayfwd.system import first_process  # noqa: PLC0415  # what most calls do not need

        first_process.ends_when_told()
    _have_streams()
    have_a_home_and_a_name(os.environ)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only
    try:
        with nothing_collected() if argv is None else nullcontext():
            args = _parsed(argv)  # loads the verb
        if args.version:
            return _say_version(args.built)
        if args.cluster is None and (named := os.environ.get("RAYFWD_CLUSTER")):
            args.cluster = _of_environment(named)
        if argv is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # see __main__.py
        code: int = args.module.run(args)
        sys.stdout.flush()
    except MistakeError as exc:
        return _complain(MISTAKE, exc.lines)
    except ProblemError as exc:
        return _complain(FAULT, [f"rayfwd: {exc.problem.code}: {exc.problem}"])
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return PIPE_CLOSED  # whoever read our output has had enough
    except OSError as exc:
        if not _is_of_output(exc):
            raise
        return _complain(FAULT, [f"rayfwd: the output cannot be written: {exc.strerror}"])
    finally:
        setting.use_file()
        _flush_once_more()
    return code


def _have_streams() -> None:
    """Where one of the three is closed, the next socket or file would have its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # has the lowest number that is free
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, closefd=False, encoding="utf-8"))  # noqa: SIM115


def _is_of_output(exc: OSError) -> bool:
    """Whether it is ours to write there that failed: a full disk, say."""
    try:
        sys.stdout.flush()
    except OSError as again:
        return again.errno == exc.errno
    return False


def _flush_once_more() -> None:
    """Python does so at its exit, with a code of its own where that fails: to nowhere, then."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):  # what tests put in its place
                continue


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.built and not args.version:
        parser.error("--verbose can be used with --version only")
    if args.verb is None and not args.version:
        parser.error("the following arguments are required: VERB")
    return args


def _say_version(built: bool) -> int:
    print(f"rayfwd {__version__}")
    if built:
        from rayfwd.system import build  # noqa: PLC0415  # what most calls do not need

        print(*build.lines(), sep="\n")
    return OK


def _of_environment(cluster: str) -> str:
    try:
        return _cluster(cluster)
    except argparse.ArgumentTypeError as exc:
        raise MistakeError([f"RAYFWD_CLUSTER = {exc}"]) from None


def _complain(code: int, lines: Sequence[str]) -> int:
    # The journal takes a number before a line for its priority (sd-daemon(3)): 3 is an error.
    mark = "<3>" if is_stream(2, os.environ) else ""
    for line in lines:
        print(mark + line, file=sys.stderr)
    return code
