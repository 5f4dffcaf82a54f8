"""Which machines are to be brought in, and how each is reached (pure but for reading a file)."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from rayfwd.cluster.plan import check_name, name_from
from rayfwd.config import HeadConfig

Via = Literal["auto", "worker", "head"]
VIAS: tuple[Via, ...] = ("auto", "worker", "head")
"""Who dials: "worker" the head, "head" the worker; "auto": the worker where it can."""

_FINGERPRINT = re.compile(r"(SHA256:)?[A-Za-z0-9+/]{43}=?")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine, and what is asked for of it."""

    ssh: str
    """user@host, user@host:port, or an alias."""
    name: str | None = None
    """The node's; None: the machine's own name."""
    via: Via = "auto"
    ray: bool = False
    """Have the head's Ray and its Python there."""
    ray_command: str | None = None
    """`ray` there; None: it is looked for."""
    identity: Path | None = None
    known_hosts: Path | None = None
    ssh_config: Path | None = None
    fingerprint: str | None = None
    """Of its host key, which is not known here yet."""
    prefix: str | None = None
    """Where rayfwd is installed there; None: /opt/rayfwd of root, else ~/.local/share/rayfwd."""
    head: str | None = None
    """How it reaches the head: user@host[:port]; None: it is found out."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of its file, as a file has them."""
    line: str = field(default="", compare=False)
    """The file that names it, and the line there; empty: the command line does."""

    def way(self) -> HeadConfig:
        """The same, as a way by SSH is described."""
        given = {"identity": self.identity, "known_hosts": self.known_hosts}
        given["ssh_config"] = self.ssh_config
        return HeadConfig(ssh=self.ssh, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


class HostsError(Exception):
    """A hosts file that cannot be used; one line a mistake."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _line_parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("ssh")
    parser.add_argument("--port", "-p", type=int)
    parser.add_argument("--name")
    parser.add_argument("--via", choices=VIAS)
    parser.add_argument("--ray", action="store_true", default=None)
    parser.add_argument("--ray-command")
    parser.add_argument("--identity", "-i", type=Path)
    parser.add_argument("--known-hosts", type=Path)
    parser.add_argument("--fingerprint")
    parser.add_argument("--prefix")
    parser.add_argument("--head")
    return parser


def read(path: Path, usual: Host) -> list[Host]:
    """The machines of a file, one a line: USER@HOST[:PORT] and options, which go before `usual`.

    Raises HostsError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # as Windows may write it
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "is not UTF-8 text"
        raise HostsError([f"{path}: {why}"]) from None
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
            if words:
                found.append(replace(of_words(words, usual), line=f"{path}:{number}"))
        except ValueError as exc:
            wrong.append(f"{path}:{number}: {exc}")
    if not found and not wrong:
        wrong.append(f"{path}: it names no machine; write one per line: USER@HOST[:PORT]")
    if wrong:
        raise HostsError(wrong)
    return found


def of_words(words: Sequence[str], usual: Host) -> Host:
    """One line's machine. Raises ValueError."""
    given = {key: v for key, v in vars(_line_parser().parse_args(words)).items() if v is not None}
    for key in ("identity", "known_hosts"):
        if key in given:
            given[key] = absolute(given[key])
    given["ssh"] = at_port(given["ssh"], given.pop("port", None))
    return checked(replace(usual, **given))


def at_port(ssh: str, port: int | None) -> str:
    """USER@HOST with the port of an option. Raises ValueError where it has one."""
    if port is None:
        return ssh
    host = ssh.rpartition("@")[2]
    if host.count(":") > 1 and not host.startswith("["):  # an IPv6 address
        return f"{ssh.removesuffix(host)}[{host}]:{port}"
    if ":" in host and not host.endswith("]"):
        raise ValueError(f"--port {port}: {ssh} already has a port")
    return f"{ssh}:{port}"


def absolute(path: Path | None) -> Path | None:
    """As the shell has it where this was said: the head's daemon is elsewhere."""
    return None if path is None else Path(os.path.abspath(os.path.expanduser(path)))


def checked(host: Host) -> Host:
    """Raises ValueError."""
    for place in filter(None, (host.ssh, host.head)):
        try:
            HeadConfig.model_construct(ssh=place).ssh_target()
        except ValueError as exc:
            raise ValueError(f"{place}: {exc}") from None
    if host.name is not None:
        check_name(host.name)
        if host.name == "head":
            raise ValueError("--name head: must be another name on a worker")
    if host.fingerprint is not None and not _FINGERPRINT.fullmatch(host.fingerprint):
        raise ValueError(
            f"--fingerprint {host.fingerprint}: must be as `ssh-keygen -lf` prints it, SHA256:…"
        )
    if host.prefix is not None and not re.fullmatch(r"/[\w./+-]+", host.prefix):
        raise ValueError(f"--prefix {host.prefix}: must be an absolute path")
    return host


def twice(hosts: Iterable[Host]) -> Iterator[str]:
    """What stands for two machines."""
    seen: dict[tuple[str, str], Host] = {}
    for host in hosts:
        for kind, what in (("ssh", host.ssh), ("name", host.name)):
            first = host if what is None else seen.setdefault((kind, what), host)
            if first is not host:
                here = f"{host.line}: " if host.line else ""
                before = f", first in {first.line}" if first.line else ""
                yield f"{here}{what}: is given twice{before}"


def node_name(text: str) -> str:
    """A node's name from a machine's own. Raises ValueError where nothing of it is left."""
    return check_name(name_from(text))
