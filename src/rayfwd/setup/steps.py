"""The steps of a plan: each knows whether it is needed, how it is done, and how it is undone.

A dry run, a first run and a second run differ only in whether `do` is called: `look` decides.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import shutil
import stat
import subprocess
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import asyncssh

from rayfwd import codes
from rayfwd.setup.manifest import Entry, Manifest
from rayfwd.setup.request import KEY_TYPE
from rayfwd.system.files import digest, look_anew, write_new


class Verdict(Enum):
    """What a step finds."""

    THERE = "there"
    NEEDED = "make"
    OUTDATED = "renew"
    """Made by us as it is, and to be made otherwise now."""
    KEPT = "keep"
    """Made by somebody else, or edited: it is left as it is."""


class Step(Protocol):
    """One thing that is there afterwards."""

    @property
    def id(self) -> str:
        """Names the thing in the manifest, and to the user."""

    def inspect(self, manifest: Manifest) -> Verdict:
        """Whether it is needed; changes nothing. Raises ProblemError where it cannot be made."""

    def do(self) -> Entry:
        """Make it; what the manifest is to keep. Raises OSError, ProblemError."""


def user_id(name: str | None) -> int:
    """-1: nobody in particular."""
    return -1 if name is None else pwd.getpwnam(name).pw_uid


def group_id(name: str | None) -> int:
    return -1 if name is None else grp.getgrnam(name).gr_gid


@dataclass(frozen=True, slots=True)
class SystemGroup:
    """A system group."""

    name: str

    @property
    def id(self) -> str:
        return f"group {self.name}"

    def inspect(self, manifest: Manifest) -> Verdict:
        return Verdict.THERE if _has(grp.getgrnam, self.name) else Verdict.NEEDED

    def do(self) -> Entry:
        command(["groupadd", "--system", self.name])
        return {"id": self.id, "kind": "group", "name": self.name}


@dataclass(frozen=True, slots=True)
class User:
    """A system user with a home, a shell (sshd runs forced commands by it) and no password."""

    name: str
    home: Path
    group: str

    @property
    def id(self) -> str:
        return f"user {self.name}"

    def inspect(self, manifest: Manifest) -> Verdict:
        return Verdict.THERE if _has(pwd.getpwnam, self.name) else Verdict.NEEDED

    def do(self) -> Entry:
        # "*" fits no password, but unlike useradd's "!" does not lock keys out as well.
        words = ["--system", "--gid", self.group, "--shell", "/bin/sh", "--password", "*"]
        words += ["--no-create-home", "--home-dir", str(self.home)]
        command(["useradd", *words, self.name])
        if not self.home.exists():
            # Nobody is this user yet, who could be in the way of root in these directories.
            for path in (self.home, self.home / ".ssh"):
                path.mkdir(mode=0o700)
            keys = self.home / ".ssh" / "authorized_keys"
            keys.touch(mode=0o600)
            for path in (keys, keys.parent, self.home):
                os.chown(path, user_id(self.name), group_id(self.group))
        return {"id": self.id, "kind": "user", "name": self.name}


@dataclass(frozen=True, slots=True)
class Member:
    """A user's membership of a group."""

    user: str
    group: str

    @property
    def id(self) -> str:
        return f"{self.user} in group {self.group}"

    def inspect(self, manifest: Manifest) -> Verdict:
        try:
            found, group = pwd.getpwnam(self.user), grp.getgrnam(self.group)
        except KeyError:
            return Verdict.NEEDED
        inside = self.user in group.gr_mem or found.pw_gid == group.gr_gid
        return Verdict.THERE if inside else Verdict.NEEDED

    def do(self) -> Entry:
        command(["usermod", "--append", "--groups", self.group, self.user])
        return {"id": self.id, "kind": "member", "user": self.user, "group": self.group}


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory. One that is there is used as it is, if nobody else may put things into it."""

    path: Path
    owner: str | None
    group: str | None
    mode: int

    @property
    def id(self) -> str:
        return str(self.path)

    def inspect(self, manifest: Manifest) -> Verdict:
        look_anew(self.path.parent)  # another machine with this home may just have made it
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return Verdict.NEEDED
        if self.owner is None:  # a user's own: links are that user's business
            if self.path.is_dir():
                return Verdict.THERE
        elif stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022:
            owner = user_id(self.owner) if _has(pwd.getpwnam, self.owner) else None
            if found.st_uid == owner:
                return Verdict.THERE
        raise codes.SETUP_BLOCKED.error(
            f"{self.path} exists, but is not a directory that only {self.owner or 'you'} "
            "can change",
            "move it away, or correct its owner and mode",
        )

    def do(self) -> Entry:
        self.path.mkdir(mode=0o700)
        os.chown(self.path, user_id(self.owner), group_id(self.group))
        self.path.chmod(self.mode)
        return {"id": self.id, "kind": "directory", "path": str(self.path)}


@dataclass(frozen=True, slots=True)
class File:
    """A file with this text. What somebody else has written, or edited, is never overwritten."""

    path: Path
    text: str
    owner: str | None
    group: str | None
    mode: int

    @property
    def id(self) -> str:
        return str(self.path)

    def inspect(self, manifest: Manifest) -> Verdict:
        try:
            found = self.path.read_bytes()
        except FileNotFoundError:
            return Verdict.NEEDED
        except OSError as exc:
            cause = f"{self.path}: {exc.strerror}"
            raise codes.SETUP_BLOCKED.error(cause, "move it away") from None
        if found == self.text.encode():
            return Verdict.THERE
        made = manifest.of(self.id)
        if made is not None and made.get("sha256") == digest(found):
            return Verdict.OUTDATED
        return Verdict.KEPT

    def do(self) -> Entry:
        data = self.text.encode()
        uid, gid = user_id(self.owner), group_id(self.group)
        write_new(self.path, data, self.mode, uid, gid, replace=self.path.exists())
        return self.entry

    @property
    def entry(self) -> Entry:
        """What the manifest has of it once it is there."""
        made = digest(self.text.encode())
        return {"id": self.id, "kind": "file", "path": str(self.path), "sha256": made}


@dataclass(frozen=True, slots=True)
class Key:
    """An SSH key pair for this alone, without a passphrase: a service has nobody to ask."""

    path: Path
    owner: str | None
    comment: str

    @property
    def id(self) -> str:
        return str(self.path)

    def inspect(self, manifest: Manifest) -> Verdict:
        return Verdict.THERE if self.path.exists() else Verdict.NEEDED

    def do(self) -> Entry:
        key = asyncssh.generate_private_key(KEY_TYPE, comment=self.comment)
        secret, public = key.export_private_key(), key.export_public_key()
        uid = user_id(self.owner)
        gid = -1 if self.owner is None else pwd.getpwnam(self.owner).pw_gid
        write_new(_public(self.path), public, 0o644, uid, gid, replace=True)
        write_new(self.path, secret, 0o600, uid, gid)
        return {"id": self.id, "kind": "key", "path": str(self.path), "sha256": digest(secret)}


def _public(path: Path) -> Path:
    return path.with_name(f"{path.name}.pub")


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symbolic link. Whatever else is in its place is left there."""

    path: Path
    target: Path

    @property
    def id(self) -> str:
        return str(self.path)

    def inspect(self, manifest: Manifest) -> Verdict:
        try:
            leads = os.readlink(self.path)
        except FileNotFoundError:
            return Verdict.NEEDED
        except OSError:
            return Verdict.KEPT  # it is no link
        if leads == str(self.target) or _same(self.path, self.target):
            return Verdict.THERE
        made = manifest.of(self.id)
        return Verdict.OUTDATED if made is not None and made["target"] == leads else Verdict.KEPT

    def do(self) -> Entry:
        fresh = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        fresh.symlink_to(self.target)
        fresh.rename(self.path)
        return self.entry

    @property
    def entry(self) -> Entry:
        """What the manifest has of it once it is there."""
        return {"id": self.id, "kind": "link", "path": self.id, "target": str(self.target)}


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def public_key(path: Path) -> str | None:
    """The public half as a line, from the private file or from beside it. None: there is none."""
    for read, at in ((asyncssh.read_private_key, path), (asyncssh.read_public_key, _public(path))):
        try:
            key = read(at)
        except (OSError, ValueError):  # asyncssh's own errors are ValueErrors
            continue
        return key.export_public_key().decode().strip()
    return None


def undo(entry: Entry, purge: bool, really: bool) -> str:
    """Take one thing away; what came of it: `removed`, `gone` or `kept …`.

    `really` False changes nothing. Raises OSError, ProblemError.
    """
    kind = entry.get("kind")
    if kind in {"file", "key"}:
        return _undo_file(entry, purge, really)
    if kind == "directory":
        return _undo_directory(Path(entry["path"]), really)
    if kind == "link":
        return _undo_link(Path(entry["path"]), entry["target"], really)
    if kind == "member":
        words, there = ["gpasswd", "--delete", entry["user"], entry["group"]], _is_member(entry)
    elif kind == "user":
        words, there = ["userdel", entry["name"]], _has(pwd.getpwnam, entry["name"])
    elif kind == "group":
        words, there = ["groupdel", entry["name"]], _has(grp.getgrnam, entry["name"])
    else:
        raise codes.MANIFEST_UNUSABLE.error(
            f"unknown kind {kind!r}", "use the version of rayfwd that made it"
        )
    if not there:
        return "gone"
    if really:
        command(words)
    return "removed"


def _undo_file(entry: Entry, purge: bool, really: bool) -> str:
    path = Path(entry["path"])
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "gone"
    if digest(data) != entry.get("sha256") and not purge:
        if really and os.geteuid() == 0:
            # Its group is about to go, and another may get the number.
            os.chown(path, -1, 0, follow_symlinks=False)
        return "kept (edited; --purge removes it)"
    if really:
        path.unlink()
        if entry["kind"] == "key":
            _public(path).unlink(missing_ok=True)
    return "removed"


def _undo_link(path: Path, target: str, really: bool) -> str:
    try:
        if os.readlink(path) != target:
            return "left (it points elsewhere now)"
    except FileNotFoundError:
        return "gone"
    except OSError:
        return "left (it is no longer a link)"
    if really:
        path.unlink()
    return "removed"


def _undo_directory(path: Path, really: bool) -> str:
    try:
        if really:
            path.rmdir()
    except FileNotFoundError:
        return "gone"
    except OSError:
        return "kept (not empty)"
    return "removed"


def _is_member(entry: Entry) -> bool:
    try:
        return entry["user"] in grp.getgrnam(entry["group"]).gr_mem
    except KeyError:
        return False


def remove_tree(path: Path, kept: Collection[Path] = ()) -> None:
    """The state of a service that is no more, but for what is `kept` in it.

    It is that service's user's, who may put links in the place of directories at any moment: each
    is opened as what it is, from the one above it, and no link is followed. Raises OSError.
    """
    if (opened := _opened(path)) is None:
        return
    try:
        _empty(opened, path, kept)
    finally:
        os.close(opened)
    if not _has_kept(path, kept):
        path.rmdir()


def _opened(name: Path | str, above: int | None = None) -> int | None:
    """That directory, in the open one `above`; None: it is none, or not there. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=above)
    except (NotADirectoryError, FileNotFoundError):
        return None
    except OSError as exc:
        if exc.errno == errno.ELOOP:  # a link
            return None
        raise


def _empty(directory: int, path: Path, kept: Collection[Path]) -> None:
    """`directory` is open, and `path` was its name."""
    for name in os.listdir(directory):
        inside = path / name
        if inside in kept:
            continue
        if (opened := _opened(name, directory)) is None:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            continue
        try:
            _empty(opened, inside, kept)
        finally:
            os.close(opened)
        if not _has_kept(inside, kept):
            os.rmdir(name, dir_fd=directory)


def _has_kept(path: Path, kept: Collection[Path]) -> bool:
    return any(path in each.parents for each in kept)


def _has(find: Any, name: str) -> bool:
    try:
        find(name)
    except KeyError:
        return False
    return True


def command(words: Sequence[str]) -> str:
    """Run one of the system's commands; what it printed. Raises ProblemError."""
    search = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = shutil.which(words[0], path=search)
    said = f"the command {words[0]} does not exist"
    if found is not None:
        ran = subprocess.run(
            [found, *words[1:]],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if ran.returncode == 0:
            return ran.stdout
        said = (ran.stderr.strip() or ran.stdout.strip()).replace("\n", "; ")
    raise codes.SETUP_COMMAND_FAILED.error(
        f"`{' '.join(words)}`: {said}",
        "correct this, then run the same command again: finished steps stay",
    )
