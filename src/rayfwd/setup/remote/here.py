"""The head's own part: how others reach it, which keys it lets in, and which machines it added."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from rayfwd import codes
from rayfwd.config import Config, DialConfig, HeadConfig
from rayfwd.problems import ProblemError
from rayfwd.ray import install
from rayfwd.ray.install import RayInstall
from rayfwd.setup import texts
from rayfwd.setup.places import own_command
from rayfwd.setup.remote import keys
from rayfwd.setup.remote.hosts import Host
from rayfwd.setup.steps import Key
from rayfwd.ssh.ssh_connector import SshConnector
from rayfwd.status import Status
from rayfwd.system.addresses import is_address
from rayfwd.system.asuser import own_account
from rayfwd.system.control import ask
from rayfwd.system.files import locked, read_regular, replace_file
from rayfwd.wire import fields_from_wire, fields_to_wire

RECORD = "added.json"
"""In the state directory: the machines that were added, by their nodes' names."""
DIAL_KEY = "dial_ed25519"
"""In the state directory: by which the head logs in at machines that it dials."""
KEY_SECONDS = 10.0
"""For this machine's own sshd to show its host key."""
CANDIDATES = 6
"""Ways to the head that a machine tries, at most."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a machine may reach the head."""

    ssh: str
    """user@host or user@host:port."""
    key: str
    """That the head's sshd shows, read on the head itself."""

    @property
    def known_host(self) -> str:
        """A line of known hosts."""
        _, host, port = HeadConfig(ssh=self.ssh).ssh_target()
        return texts.known_hosts_line(host, port or 22, self.key)


@dataclass(frozen=True, slots=True)
class Added:
    """A machine that was added, for another `add` and for `remove`."""

    ssh: str = ""
    """How it was reached."""
    way: str | None = None
    """Who dials: "worker" or "head"; None: it did not come so far."""
    prefix: str | None = None
    """Where rayfwd is installed there."""
    service: bool = False
    """A service manager has its daemon."""
    own_program: bool = False
    """It does not use what other machines of its home have."""
    identity: str | None = None
    known_hosts: str | None = None
    ssh_config: str | None = None
    """Files that were named with it."""


class Head:
    """The cluster that machines are brought into; its daemon runs here."""

    def __init__(self, config: Config, control: Path) -> None:
        self.config = config
        self._control = control
        account = own_account()
        self.user, self._home = account.name, account.home
        self.ray: RayInstall | None = None

    @classmethod
    async def find(cls, config: Config, control: Path) -> Head:
        """Raises ProblemError where no head runs here, or its Ray is not found."""
        head = cls(config, control)
        await head.status()
        if config.ray.start:
            head.ray = await install.find(config.ray.command, os.environ)
        return head

    # -- the daemon --------------------------------------------------------------------

    async def ask(self, verb: str, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Raises ProblemError."""
        return await asyncio.to_thread(ask, self._control, verb, args)

    async def status(self) -> Status:
        """Raises ProblemError."""
        status = Status.from_answer(await self.ask("status"))
        if status.role != "head":
            raise codes.NOT_A_HEAD.error(
                f"{self.config.path} is a {status.role}'s", "run it on the head"
            )
        return status

    async def is_ready(self, name: str) -> bool:
        """Whether this worker is in the cluster, with its Ray. Raises ProblemError."""
        for worker in (await self.status()).workers or ():
            if worker.name == name and worker.state == "up" and not worker.left:
                return worker.ray is not None and worker.ray.state in {"up", "by_hand", "off"}
        return False

    async def is_up(self, name: str) -> bool:
        """Whether this worker has a link. Raises ProblemError."""
        return name in await self.names_up()

    async def names_up(self) -> set[str]:
        """Of the workers that have a link. Raises ProblemError."""
        workers = (await self.status()).workers or ()
        return {worker.name for worker in workers if worker.state == "up"}

    async def dial(self, dial: DialConfig) -> None:
        """Raises ProblemError."""
        await self.ask("dial", {"dial": dial.model_dump(mode="json", exclude_unset=True)})

    async def undial(self, name: str) -> bool:
        """Whether it was dialled. Raises ProblemError."""
        return (await self.ask("undial", {"name": name})).get("undialled") is not None

    async def forget(self, name: str) -> bool:
        """Free its name; Ray's token stays. Whether it was known. Raises ProblemError."""
        told = await self.ask("forget", {"name": name, "keep_token": True})
        return told.get("forgotten") is not None

    # -- how others reach it -----------------------------------------------------------

    async def ways(self, host: Host, seen_as: str) -> list[Way]:
        """Those by which that machine may reach this one's sshd, the likeliest first.

        `seen_as`: the address that our connection comes from, as that machine says.
        """
        names = [host.head] if host.head is not None else self._candidates(seen_as)
        found = await asyncio.gather(*map(own_host_key, names))
        return [Way(ssh, key) for ssh, key in zip(names, found, strict=True) if key is not None]

    def _candidates(self, seen_as: str) -> list[str]:
        port = _own_port()
        places = [*filter(is_address, [seen_as]), *_own_addresses(), socket.getfqdn()]
        suffix = "" if port == 22 else f":{port}"
        named = [place for place in places if place and ":" not in place and place != "localhost"]
        return [f"{self.user}@{place}{suffix}" for place in dict.fromkeys(named)][:CANDIDATES]

    # -- keys --------------------------------------------------------------------------

    def attach_words(self, name: str) -> list[str]:
        """What a worker's key runs here, and nothing else."""
        socket_ = str(self.config.hub_socket)
        return [str(own_command()), "attach", "--socket", socket_, "--node", name]

    def let_in(self, name: str, key: str) -> bool:
        """Whether its line in authorized_keys is new. Raises ProblemError."""
        try:
            line = keys.forced_line(self.attach_words(name), key, name)
        except (ValueError, asyncssh.Error):
            raise codes.ADD_FAILED.error(
                f"{name} sent no SSH key, but {key[:60]!r}", "run the same command again"
            ) from None
        return keys.authorize(self._home, line, name)

    def shut_out(self, name: str) -> bool:
        """Whether there was a line of its. Raises ProblemError."""
        return keys.take_back(self._home, name)

    def dial_key(self) -> tuple[Path, str]:
        """The head's own key for machines that it dials: its file, and the public half."""
        path = self.config.state_dir / DIAL_KEY
        if not path.exists():
            Key(path, None, f"rayfwd {self.config.name}").do()
        return path, path.with_name(f"{path.name}.pub").read_text().strip()

    # -- what was added ----------------------------------------------------------------

    def added(self) -> dict[str, Added]:
        """By their nodes' names. Raises ProblemError."""
        path = self.config.state_dir / RECORD
        try:
            found = dict(json.loads(read_regular(path)))
            return {name: fields_from_wire(Added, found[name], name) for name in found}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as exc:
            raise codes.DIRECTORY_UNUSABLE.error(
                f"{path} cannot be read: {exc}", "remove it, then add its machines again"
            ) from None

    def remember(self, name: str, entry: Added | None) -> None:
        """None: no more. Raises ProblemError."""
        path = self.config.state_dir / RECORD
        try:
            with locked(path.parent):
                added = {k: v for k, v in self.added().items() if k != name}
                if entry is not None:
                    added[name] = entry
                # What is not there is left out, as an older `remove` expects.
                data = {
                    k: {key: value for key, value in fields_to_wire(v).items() if value}
                    | {"service": v.service}
                    for k, v in added.items()
                }
                replace_file(path, json.dumps(data, indent=1).encode() + b"\n")
        except OSError as exc:
            raise codes.DIRECTORY_UNUSABLE.error(
                f"{path} cannot be written: {exc.strerror or exc}",
                f"make {path.parent} writable for this user, and check that its disk is not full",
            ) from None


async def own_host_key(ssh: str) -> str | None:
    """The key of this machine's own sshd, as it shows it to this machine; None: it shows none.

    Asked at the address itself where that is ours, so that nobody else answers; else (it is that of
    a router before us) on loopback, at the same port.
    """
    _, host, port = HeadConfig(ssh=ssh).ssh_target()
    at = host if await asyncio.to_thread(_is_own, host) else "127.0.0.1"
    way = HeadConfig(
        ssh=f"{at}:{port or 22}",
        ssh_config=Path(os.devnull),
        known_hosts=Path(os.devnull),
    )
    connector = SshConnector(way)
    try:
        async with asyncio.timeout(KEY_SECONDS):
            return (await connector.host_key()).key
    except (ProblemError, TimeoutError):
        return None
    finally:
        connector.close()


def _is_own(host: str) -> bool:
    """Whether this machine has that address, or the first that the name stands for."""
    try:
        address = socket.getaddrinfo(host, 0, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def _own_port() -> int:
    """Of the sshd here: the one that whoever says this logged in by, else the usual one."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return int(words[3]) if len(words) == 4 and words[3].isdecimal() else 22


def _own_addresses() -> list[str]:
    """Those at which others may reach this machine, as far as it knows."""
    found = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            found.append(str(probe.getsockname()[0]))
        except OSError:
            pass
    return [a for a in found if not ipaddress.ip_address(a).is_loopback]
