"""What is to be set up, and where its files lie (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Role = Literal["head", "worker"]

GROUP = "rayfwd"
"""Who is in it may read the configuration; the service's user is."""

KEY_TYPE = "ssh-ed25519"

MAN_PAGES = (Path("man1/rayfwd.1"), Path("man5/rayfwd.toml.5"))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie: for the machine's own service, or for one user's."""

    config: Path
    secrets: Path
    """The directory of the SSH key and the known hosts."""
    state: Path
    runtime: Path
    units: Path
    manifest: Path
    system: bool
    """False: a service of one user, who needs no root."""
    command: str
    """The `rayfwd` that the service runs."""
    python: str
    """Its Python."""
    man: Path
    """A directory of pages that man(1) knows."""
    overlay: bool = False
    """The overlay network has a unit, which is root's: root may run this `rayfwd`."""
    pages: Path | None = None
    """That of rayfwd's own environment; None: it has none, or man knows it anyway."""

    @property
    def identity(self) -> Path:
        return self.secrets / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        return self.secrets / "known_hosts"


def system_layout(command: str, python: str, config: Path | None = None) -> Layout:
    """Of the machine's service. All but the state belongs to root alone.

    The manifest is not in the state directory, which is the service's user's: root must not delete
    what a lesser user has written down.
    """
    return Layout(
        config=config or Path("/etc/rayfwd.toml"),
        secrets=Path("/etc/rayfwd"),
        state=Path("/var/lib/rayfwd"),
        runtime=Path("/run/rayfwd"),
        units=Path("/etc/systemd/system"),
        manifest=Path("/var/lib/rayfwd-init.json"),
        system=True,
        command=command,
        python=python,
        man=Path("/usr/local/share/man"),
    )


def user_layout(home: Path, uid: int, command: str, python: str, config: Path | None) -> Layout:
    """Of a user's service. The usual layout, whatever XDG's variables say.

    sshd gives the forced command none of them, and systemd before 254 has the state elsewhere.
    """
    state = home / ".local" / "state" / "rayfwd"
    return Layout(
        config=config or home / ".config" / "rayfwd.toml",
        secrets=state,
        state=state,
        runtime=Path(f"/run/user/{uid}/rayfwd"),
        units=home / ".config" / "systemd" / "user",
        manifest=state / "init.json",
        system=False,
        command=command,
        python=python,
        # man(1) looks there where ~/.local/bin is on the PATH (manpath(5)).
        man=home / ".local" / "share" / "man",
    )


@dataclass(frozen=True, slots=True)
class SetupRequest:
    """All that `rayfwd init` has to know; nothing is asked after this."""

    role: Role
    name: str
    user: str
    """Who runs rayfwd and Ray."""
    home: Path
    """Of that user."""
    user_is_new: bool
    """It is not there, or was made by us."""
    ray: str
    """The command `ray`: a path, or a name on the service's PATH."""
    logins: tuple[str, ...] = ()
    """Of a head: users that workers' SSH connections arrive as, beside its own."""
    head: str | None = None
    """Of a worker: user@host, user@host:port, or an alias; None: it is dialled."""
    head_command: str = ""
    """Of a worker: `rayfwd` as the head has it."""
    identity: Path | None = None
    """Of a worker: a key of the user's own choice; None: one is made."""
    by_hand: bool = False
    """The configuration that is there is somebody else's: what it needs is theirs to see to."""
    auth: str | None = None
    """Of a head: `ray.auth`; None: the default."""
    meet: str | None = None
    """A third host that both log in to, where neither accepts SSH from the other."""
    meet_identity: Path | None = None
    """Of a head: its key at that host; None: those that `ssh` would use."""
    own_ssh: bool = False
    """A head's: rayfwd answers at the meeting place itself, where there is no sshd."""
    direct: tuple[tuple[str, str], ...] = ()
    """Of a worker: others that it can log in to, each with its name and how."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the configuration, as a file has them."""
    made_by: str = "rayfwd init"
    """The command, for the head of the file."""
    host_key: str | None = None
    """Of a worker: the line for our file of known hosts; None: the user's own files have it."""
