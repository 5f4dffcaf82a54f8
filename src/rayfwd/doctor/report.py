"""`rayfwd doctor --report`: one file with what a maintainer needs, and no secret in it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rayfwd import __version__, codes
from rayfwd.cluster.identity import KEY_FILE
from rayfwd.config import Config
from rayfwd.doctor import scrubbing
from rayfwd.doctor.unit_checks import RAY_SERVICE, SERVICE
from rayfwd.problems import ProblemError
from rayfwd.ray import procfs, token
from rayfwd.ray.launcher import OUTPUT
from rayfwd.system import asuser
from rayfwd.system.asuser import SystemUser
from rayfwd.system.control import ask
from rayfwd.system.files import read_regular
from rayfwd.system.paths import default_state_dir

JOURNAL_LINES = 2000
LEFT_OUT = "left out, because jobs print into it; --with-logs adds it"
LOG_BYTES = 512 * 1024
"""Of the end of a log, at most."""
COMMAND_TIMEOUT = 20.0
READ_SECONDS = 20.0
"""For another user's files to be read."""

HEADER = """\
rayfwd report. Known secrets, and whatever looks like a secret, are blanked, but rayfwd cannot know
all of them. The report has names of hosts and users, addresses and paths. Read it before you send
it.
"""

PACKAGES = (
    "asyncssh", "aiohappyeyeballs", "cryptography", "pydantic", "structlog", "rich",
    "prometheus-client", "sdnotify", "tomli-w",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """Which node a report is of."""

    path: Path
    """Of its configuration."""
    config: Config | None
    """None: that is not valid."""
    control: Path | None
    """Its daemon's socket; None: not known."""
    env: Mapping[str, str]
    account: SystemUser | None = None
    """As whom the service's files are read; None: as oneself."""

    @property
    def state_dir(self) -> Path:
        return default_state_dir(self.env) if self.config is None else self.config.state_dir


@dataclass(frozen=True, slots=True)
class Logs:
    """Which logs are to be in it."""

    wanted: bool = False
    """The journal's lines and Ray's output."""
    file: Path | None = None
    """And the end of this one."""


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
            "name a file that does not exist yet: --report PATH",
        ) from None


def compose(of: Subject, found: Mapping[str, Any], logs: Logs) -> str:
    """The whole text; `found` is the doctor's document."""
    kept = _kept(of)
    data, env = _data(kept["configuration"]), of.env
    known = scrubbing.known(data or {}, env, (*kept["secrets"], *_rays_token(env)))
    text = HEADER
    for title, part in _parts(of, data, found, logs, kept["output"]):
        if isinstance(part, str):
            shown = scrubbing.scrub(part, known)
        else:
            shown = json.dumps(scrubbing.scrub_all(part, known), indent=1)
        text += f"\n== {title}\n\n{shown.strip()}\n"
    return text


def _parts(
    of: Subject,
    data: dict[str, Any] | None,
    found: Mapping[str, Any],
    logs: Logs,
    output: str,
) -> Iterator[tuple[str, Any]]:
    """Title, and text or what is to be JSON."""
    yield "versions", "\n".join(f"{name}: {value}" for name, value in _versions())
    yield "doctor", found
    left_out = "left out, because it is not TOML or cannot be read, so secrets in it are not known"
    shown = left_out if data is None else scrubbing.configuration(data)
    yield f"configuration ({of.path})", shown
    for verb in ("status", "plan"):
        yield f"rayfwd {verb}", _asked(of.control, verb)
    yield "environment", "\n".join(f"{n}={v}" for n, v in scrubbing.environment(of.env).items())
    yield "machine", "\n".join(f"{name}: {value}" for name, value in _machine(of.state_dir))
    yield "journal", _journal() if logs.wanted else LEFT_OUT
    if logs.file is not None:
        yield f"log ({logs.file})", _log(logs.file)
    yield f"Ray's output ({of.state_dir / OUTPUT})", output if logs.wanted else LEFT_OUT


def _data(text: str | None) -> dict[str, Any] | None:
    try:
        return None if text is None else tomllib.loads(text)
    except ValueError:
        return None


def _kept(of: Subject) -> dict[str, Any]:
    """What the service's own files hold, read as the service's user."""
    asked = {"configuration": str(of.path), "state_dir": str(of.state_dir)}
    if of.account is None or of.account.is_own:
        return kept_files(**asked)
    found: dict[str, Any] = asuser.call(of.account, kept_files, asked, timeout=READ_SECONDS)
    if asuser.whose(of.path) is None:  # root's own, which the service's user need not see
        found["configuration"] = text_of(str(of.path))
    return found


def kept_files(configuration: str, state_dir: str) -> dict[str, Any]:
    """The configuration's text, the secrets that lie about, and the end of Ray's output."""
    text = text_of(configuration)
    ray = (_data(text) or {}).get("ray")
    theirs = ray.get("env") if isinstance(ray, dict) else None
    env = {str(n): str(v) for n, v in theirs.items()} if isinstance(theirs, dict) else {}
    return {
        "configuration": text,
        "secrets": [*_kept_secrets(Path(state_dir)), *_rays_token({**os.environ, **env})],
        "output": _tail(Path(state_dir) / OUTPUT),
    }


def text_of(path: str) -> str | None:
    """A configuration file's; None where it cannot be read."""
    try:
        return read_regular(Path(path).resolve()).decode()
    except (OSError, UnicodeDecodeError):
        return None


def _rays_token(env: Mapping[str, str]) -> Iterator[str]:
    """Wherever this environment has Ray look for it."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"):
        alone = {"RAY_AUTH_MODE": "token", name: env.get(name, "")}
        if name in env and (value := token.read_token(alone)) is not None:
            yield value


def _kept_secrets(state_dir: Path) -> Iterator[str]:
    """The node's key, what it was before, and Ray's token, as rayfwd keeps them."""
    of_clients = (state_dir / "clients").glob(f"*/{token.TOKEN_FILE}")
    for path in (state_dir / KEY_FILE, state_dir / token.TOKEN_FILE, *of_clients):
        with contextlib.suppress(OSError):
            yield from _end_of(path).splitlines()
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
        return "without a valid configuration, the daemon's socket is not known"
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
            timeout=COMMAND_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"not available: {exc}"
    return ran.stdout.strip()


def _log(path: Path) -> str:
    """The end of a file that was named, read as whose it is."""
    owner = asuser.whose(path) if os.geteuid() == 0 else None
    if owner is None:
        return _tail(path.resolve())
    found: str = asuser.call(owner, tail_of, {"path": str(path)}, timeout=READ_SECONDS)
    return found


def tail_of(path: str) -> str:
    return _tail(Path(path).resolve())


def _tail(path: Path) -> str:
    try:
        return _end_of(path)
    except OSError as exc:
        return f"not available: {exc.strerror}"


def _end_of(path: Path) -> str:
    """The last of a file. Raises OSError where it is none."""
    return read_regular(path, LOG_BYTES).decode(errors="replace")
