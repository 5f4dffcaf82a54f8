"""`rayfwd doctor --report`: one file with what a maintainer needs, and no secret in it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rayfwd import __version__, codes
from rayfwd.config import Config
from rayfwd.doctor import scrubbing
from rayfwd.doctor.unit_checks import RAY_SERVICE, SERVICE
from rayfwd.problems import ProblemError
from rayfwd.ray import procfs, token
from rayfwd.ray.launcher import OUTPUT
from rayfwd.system.control import ask
from rayfwd.system.paths import default_state_dir

JOURNAL_LINES = 2000
LEFT_OUT = "left out: jobs print into it what they like; add it by --with-logs"
LOG_BYTES = 512 * 1024
"""Of the end of a log, at most."""
COMMAND_SECONDS = 20.0

HEADER = """\
rayfwd report. What is known to be a secret, and what looks like one, is blanked; rayfwd cannot know
all. Names of hosts and users, addresses and paths are in it. Read it before you send it.
"""

PACKAGES = (
    "asyncssh", "aiohappyeyeballs", "cryptography", "pydantic", "structlog", "rich",
    "prometheus-client", "sdnotify", "tomli-w",
)  # fmt: skip


def default_path(name: str | None, now: float) -> Path:
    """In the present directory, named by node and time."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.localtime(now))
    return Path(f"rayfwd-report-{name or 'node'}-{stamp}.txt")


def write(path: Path, text: str) -> None:
    """A new file that only its owner may read. Raises ProblemError (report_unwritable)."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as out:
            os.fchmod(out.fileno(), 0o600)
            out.write(text)
    except OSError as exc:
        raise codes.REPORT_UNWRITABLE.error(
            f"{path}: {exc.strerror}",
            "give --report the path of a file that is not there yet",
        ) from None


def compose(
    path: Path,
    config: Config | None,
    control: Path | None,
    env: Mapping[str, str],
    found: Mapping[str, Any],
    log: Path | None,
    with_logs: bool = False,
) -> str:
    """The whole text. `path` is the configuration's, `found` the doctor's document.

    With `with_logs` the journal's lines and Ray's output are in it; a file that is named as `log`
    always is.
    """
    data = _data(path)
    state_dir = config.state_dir if config is not None else default_state_dir(env)
    known = scrubbing.known(data or {}, env, _kept_secrets(data, state_dir, env))
    text = HEADER
    for title, part in _parts(path, data, control, state_dir, env, found, log, with_logs):
        if isinstance(part, str):
            shown = scrubbing.scrub(part, known)
        else:
            shown = json.dumps(scrubbing.scrub_all(part, known), indent=1)
        text += f"\n== {title}\n\n{shown.strip()}\n"
    return text


def _parts(
    path: Path,
    data: dict[str, Any] | None,
    control: Path | None,
    state_dir: Path,
    env: Mapping[str, str],
    found: Mapping[str, Any],
    log: Path | None,
    with_logs: bool,
) -> Iterator[tuple[str, Any]]:
    """Title, and text or what is to be JSON."""
    yield "versions", "\n".join(f"{name}: {value}" for name, value in _versions())
    yield "doctor", found
    left_out = "it is not TOML, or cannot be read: left out, as secrets could not be told"
    shown = left_out if data is None else scrubbing.configuration(data)
    yield f"configuration ({path})", shown
    for verb in ("status", "plan"):
        yield f"rayfwd {verb}", _asked(control, verb)
    yield "environment", "\n".join(f"{n}={v}" for n, v in scrubbing.environment(env).items())
    yield "machine", "\n".join(f"{name}: {value}" for name, value in _machine(state_dir))
    yield "journal", _journal() if with_logs else LEFT_OUT
    if log is not None:
        yield f"log ({log})", _tail(log.resolve())
    output = state_dir / OUTPUT
    yield f"Ray's output ({output})", _tail(output) if with_logs else LEFT_OUT


def _data(path: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _kept_secrets(
    data: Mapping[str, Any] | None, state_dir: Path, env: Mapping[str, str]
) -> Iterator[str]:
    """The node's key, and Ray's token wherever it may lie."""
    ray = (data or {}).get("ray")
    theirs = ray.get("env") if isinstance(ray, dict) else None
    for source in (env, {str(n): str(v) for n, v in (theirs or {}).items()}):
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"):
            alone = {"RAY_AUTH_MODE": "token", name: source.get(name, "")}
            if name in source and (value := token.read_token(alone)) is not None:
                yield value
    of_clients = (state_dir / "clients").glob(f"*/{token.TOKEN_FILE}")
    for path in (state_dir / "node.key", state_dir / token.TOKEN_FILE, *of_clients):
        with contextlib.suppress(OSError):
            yield _end_of(path)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        yield str(json.loads(_end_of(state_dir / token.RECORD)).get("token") or "")


def _versions() -> Iterator[tuple[str, str]]:
    yield "rayfwd", __version__
    yield "written", time.strftime("%Y-%m-%dT%H:%M:%S%z")
    yield "Python", f"{sys.version.split()[0]} ({sys.executable})"
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "absent"
    yield "kernel", f"{platform.system()} {platform.release()} {platform.machine()}"
    with contextlib.suppress(OSError):
        yield "system", platform.freedesktop_os_release().get("PRETTY_NAME", "")
    yield "ssh", _run(["ssh", "-V"])
    yield "systemd", _run(["systemctl", "--version"]).partition("\n")[0]


def _machine(state_dir: Path) -> Iterator[tuple[str, str]]:
    yield "processors", str(os.cpu_count())
    with contextlib.suppress(OSError, IndexError):
        yield "memory", Path("/proc/meminfo").read_text().splitlines()[0].partition(":")[2].strip()
    for directory in (state_dir, Path("/tmp"), Path("/dev/shm")):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(directory)
            yield (
                f"disk of {directory}",
                f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free",
            )
    yield "listening TCP ports", ", ".join(str(port) for port in sorted(procfs.listening()))
    with contextlib.suppress(OSError):
        yield "limits", "\n" + Path("/proc/self/limits").read_text().rstrip()


def _asked(control: Path | None, verb: str) -> Any:
    if control is None:
        return "without a valid configuration nobody knows where to ask"
    try:
        return ask(control, verb)
    except ProblemError as exc:
        return f"{exc.problem.code}: {exc.problem}"


def _journal() -> str:
    """Of the machine's service and of this user's own, as far as this user may see them."""
    units = [
        f"--{kind}={name}" for kind in ("unit", "user-unit") for name in (SERVICE, RAY_SERVICE)
    ]
    words = ["journalctl", *units, f"--lines={JOURNAL_LINES}", "--no-pager"]
    return _run([*words, "--output=short-iso-precise"])[-LOG_BYTES:]


def _run(words: list[str]) -> str:
    try:
        ran = subprocess.run(
            words,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"not to be had: {exc}"
    return ran.stdout.strip()


def _tail(path: Path) -> str:
    try:
        return _end_of(path)
    except OSError as exc:
        return f"not to be had: {exc.strerror}"


def _end_of(path: Path) -> str:
    """The last of a file. Raises OSError where it is none.

    No link: root reads here what a lesser user may have put in the place.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no plain file")
        file.seek(max(0, found.st_size - LOG_BYTES))
        return file.read(LOG_BYTES).decode(errors="replace")
