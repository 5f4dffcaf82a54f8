"""Run the head of a cluster on this machine: no file, no root, no systemd.

If there are other clusters on this machine, it finds its own network and ports, and keeps them.
Other machines must be able to log in here by SSH; when the head is ready, it prints the command for
them. It runs in the foreground until Ctrl-C, SIGTERM or --stop-after. As process 1 of a container
it reaps processes and passes signals on.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

from rayfwd.cli import chosen, front
from rayfwd.cli.flags import Flag, flags_of
from rayfwd.config import Config
from rayfwd.daemon.resources import make_directory
from rayfwd.ssh.own_sshd import KEY_FILE
from rayfwd.status import Status
from rayfwd.system.paths import SERVICE_RUNTIME_DIR
from rayfwd.system.users import user_name

_HOST_KEY = Path("/etc/ssh/ssh_host_ed25519_key.pub")


def _flags() -> list[Flag]:
    return [
        *front.any_flags(),
        *flags_of("hub"),
        *flags_of("ray", leave_out=["advertise", "advertise_check"]),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    front.add_arguments(parser, _flags(), "hub", "Ray's head here")


def speak() -> None:
    """See `front.speak`."""
    front.speak("head", _flags())


def run(args: argparse.Namespace) -> int:
    flags = _flags()
    speak()
    data = front.said({"role": "head", "name": "head"}, args, flags)

    def configured() -> Config:
        first = front.configuration(data, flags, "head")
        make_directory(first.state_dir, 0o700)
        return front.configuration(chosen.of_head(first, data), flags, "head")

    return front.hold(configured, args, what_next)


def what_next(config: Config, status: Status) -> list[str]:
    """How to add a machine, and how to work here."""
    user = user_name(os.geteuid())
    where = ""
    if config.hub_socket != SERVICE_RUNTIME_DIR / "hub.sock":
        where = f" --socket {config.hub_socket}"
    name, by, host_key = own_address(), "", _HOST_KEY
    for meet in config.hub.meet[:1]:
        name, by = socket.gethostname(), f" --meet {meet.ssh}"
        if meet.sshd_address() is None:
            host_key = config.state_dir / f"{KEY_FILE}.pub"
    own = status.node
    dashboard = "" if own is None else f"http://{own.address}:{own.services['dashboard']}"
    return [
        f"To add a machine, run there: rayfwd join {user}@{name}{by}{where}",
        *([_host_key_line(name, host_key)] if by else []),
        f"To run a job from here (dashboard {dashboard}): "
        + front.spoken(config, "exec -- python your_job.py"),
        *([] if status.page is None else [f"The page in the browser: {status.page}"]),
    ]


def _host_key_line(name: str, file: Path) -> str:
    """Who comes by a meeting place has nobody else to tell it."""
    try:
        kind, key, *_ = file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        kind, key = "ssh-ed25519", f"AAAA… (this machine's {file})"
    return f"with this in ~/.ssh/known_hosts there: {name} {kind} {key}"


def own_address() -> str:
    """Where others reach this machine, as far as it can know: as whoever logged in here did, else
    by its address towards the internet."""
    seen = os.environ.get("SSH_CONNECTION", "").split()
    if len(seen) == 4:
        return seen[2]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
