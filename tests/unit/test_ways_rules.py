"""What the rules of an sshd, an account and a file of known hosts make of a login, with real sshd
and by both transports.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Code
from tests.need import need, tool
from tests.unit.loops import run
from tests.unit.other_user import OTHER, needs_root
from tests.unit.real_sshd import RealSshd
from tests.unit.test_ways_real import agent_with_other_keys
from tests.unit.way_probe import SAID, answer
from tests.unit.way_scene import Scene, Transport, both, says, scene

ATTACHED = r"printf '\000rayfwd attach\000\n'; exec cat"
"""What `rayfwd attach` does, as far as a lane needs it here."""


# -- what the head's sshd allows ---------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "rule",
    [
        "AllowStreamLocalForwarding no",
        "AllowTcpForwarding no",
        "PermitOpen 127.0.0.1:6379",
        "Match Address 127.0.0.0/8\n  AllowTcpForwarding no\nMatch all",
        "Match LocalPort {port}\n  DisableForwarding yes\nMatch all",
    ],
)
def test_a_head_that_forbids_the_way_to_a_socket(
    tmp_path: Path, transport: Transport, rule: str
) -> None:
    """Both ways to it are shut or open by rules of their own."""

    async def main() -> None:
        async with ruled(tmp_path, rule) as s:
            await says(
                s.head(transport),
                codes.CHANNEL_REFUSED,
                'via = "exec"',
                "AllowStreamLocalForwarding",
            )
            assert await answer(s.head(transport, via="exec")) == SAID

    run(main)


@asynccontextmanager
async def ruled(directory: Path, *rules: str) -> AsyncIterator[Scene]:
    """`Match` is the last thing of an sshd_config, so it is given as a file of its own."""
    async with scene(directory) as s:
        await s.sshd.stop()
        file = directory / "rules"
        file.write_text("\n".join(rules).format(port=s.sshd.port) + "\n")
        await s.sshd.start(f"Include {file}", f"SetEnv HOME={directory}")
        yield s


@both
@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("ForceCommand echo this account is for git", ("this account is for git",)),
        ("ForceCommand internal-sftp", ("login shell",)),
        ("Match User {user}\n  ForceCommand /opt/none/rayfwd attach", ("/opt/none/rayfwd",)),
    ],
)
def test_a_command_that_sshd_forces(
    tmp_path: Path, transport: Transport, rule: str, words: Sequence[str]
) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            await s.sshd.stop()
            (tmp_path / "rules").write_text(rule.format(user=s.sshd.user) + "\n")
            await s.sshd.start(f"Include {tmp_path}/rules", f"SetEnv HOME={tmp_path}")
            await says(s.head(transport, via="exec"), codes.HUB_CLOSED, *words)
            assert await answer(s.head(transport)) == SAID

    run(main)


@both
def test_a_socket_at_which_nobody_listens(tmp_path: Path, transport: Transport) -> None:
    """It was left behind; there is none; or its path is another."""

    async def main() -> None:
        async with scene(tmp_path) as s:
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(tmp_path / "left.sock"))
            for path in (tmp_path / "left.sock", tmp_path / "none/hub.sock"):
                words = (f"nothing answers at {path}", "start rayfwd on the head")
                await says(s.head(transport, socket=path), codes.HUB_ABSENT, *words)

    run(main)


@needs_root
@both
def test_a_socket_of_somebody_else(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with account(tmp_path, "UsePAM no") as s:
            shut = of_someone(s, transport, via="socket")
            await says(shut, codes.HUB_NOT_PERMITTED, "may not enter its directory", "hub.users")
            place = Path(tempfile.mkdtemp(prefix="rayfwd-"))
            try:
                place.chmod(0o755)
                hub = place / "hub.sock"
                os.link(s.hub, hub)
                hub.chmod(0o600)
                head = of_someone(s, transport, via="socket", socket=hub)
                owned = ("belongs to uid 0 with mode 0600", "hub.users")
                await says(head, codes.HUB_NOT_PERMITTED, *owned)
                hub.chmod(0o666)
                assert await answer(head) == SAID
            finally:
                shutil.rmtree(place)

    run(main)


@both
def test_one_session_for_each_connection(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path, "MaxSessions 1") as s:
            assert await answer(s.head(transport, via="exec")) == SAID

    run(main)


# -- accounts ----------------------------------------------------------------------------------


@asynccontextmanager
async def account(
    directory: Path,
    *options: str,
    shadow: str = "someone:*:19000:0:99999:7:::",
    shell: str = "/bin/sh",
    pam: str = "account required pam_unix.so\nsession required pam_permit.so\n",
    files: dict[str, str] | None = None,
) -> AsyncIterator[Scene]:
    """A head with a user `someone`, in files of its own: passwd(5), shadow(5), pam.d(5)."""
    need(None if os.path.isabs(tool("unshare")) else "there is no unshare")
    async with scene(directory) as s:
        await s.sshd.stop()
        own = directory / "etc"
        own.mkdir()
        passwd = Path("/etc/passwd").read_text()
        (own / "passwd").write_text(f"{passwd}someone:x:{OTHER}:{OTHER}::/mnt:{shell}\n")
        (own / "shadow").write_text(f"{Path('/etc/shadow').read_text()}{shadow}\n")
        (own / "sshd").write_text(pam)
        for name, text in (files or {}).items():
            (own / name).write_text(text)
        (own / "keys").write_text(f"{s.sshd.public_key}\n")
        script = (
            'mount -t tmpfs none /mnt && cp "$0"/* /mnt && chmod 755 /mnt && chmod 644 /mnt/* && '
            f"chown {OTHER} /mnt && "
            "mount --bind /mnt/passwd /etc/passwd && mount --bind /mnt/shadow /etc/shadow && "
            'mount --bind /mnt/sshd /etc/pam.d/sshd && exec "$@"'
        )
        s.sshd.within = ["unshare", "--mount", "sh", "-c", script, str(own)]
        await s.sshd.start("AuthorizedKeysFile /mnt/keys", *options)
        yield s


def of_someone(s: Scene, transport: Transport, **keys: Any) -> HeadConfig:
    there = f"someone@{s.sshd.address}:{s.sshd.port}"
    return s.head(transport, ssh=there, attach_command=ATTACHED, **{"via": "exec", **keys})


@needs_root
@both
@pytest.mark.parametrize(
    ("pam", "shadow", "code", "words"),
    [
        (False, "someone:!:19000:0:99999:7:::", codes.SSH_AUTH_REFUSED, ("locked",)),
        (
            False,
            "someone:*:19000:0:99999:7::1:",
            codes.SSH_AUTH_REFUSED,
            ("locked or not allowed",),
        ),
        (True, "someone:*:19000:0:99999:7::1:", codes.SSH_LOST, ("expired", "in the middle")),
        (True, "someone:*:0:0:99999:7:::", codes.CHANNEL_REFUSED, ("password", "chage")),
    ],
)
def test_an_account_that_is_locked_or_has_expired(
    tmp_path: Path,
    transport: Transport,
    pam: bool,
    shadow: str,
    code: Code,
    words: Sequence[str],
) -> None:
    async def main() -> None:
        use = f"UsePAM {'yes' if pam else 'no'}"
        async with account(tmp_path, use, shadow=shadow) as s:
            await says(of_someone(s, transport), code, *words)

    run(main)


@needs_root
@both
@pytest.mark.parametrize(
    ("limit", "code", "words"),
    [
        ("maxlogins 0", codes.HUB_CLOSED, ("too many logins",)),
        ("nproc 0", codes.CHANNEL_REFUSED, ("nproc",)),
    ],
)
def test_limits_of_pam(
    tmp_path: Path, transport: Transport, limit: str, code: Code, words: Sequence[str]
) -> None:
    pam = "account required pam_permit.so\nsession required pam_limits.so conf=/mnt/limits\n"

    async def main() -> None:
        limits = {"limits": f"someone hard {limit}\n"}
        async with account(tmp_path, "UsePAM yes", pam=pam, files=limits) as s:
            await says(of_someone(s, transport), code, *words)

    run(main)


@needs_root
@both
def test_a_machine_that_boots_or_stops(tmp_path: Path, transport: Transport) -> None:
    """/run/nologin."""
    pam = "account required pam_nologin.so file=/mnt/nologin\nsession required pam_permit.so\n"
    said = {"nologin": "The machine is going down at noon.\n"}

    async def main() -> None:
        async with account(tmp_path, "UsePAM yes", pam=pam, files=said) as s:
            await says(of_someone(s, transport), codes.SSH_LOST, "nologin")

    run(main)


@needs_root
@both
@pytest.mark.parametrize("shell", ["/usr/sbin/nologin", "/bin/false"])
def test_a_login_shell_that_is_none(tmp_path: Path, transport: Transport, shell: str) -> None:
    async def main() -> None:
        async with account(tmp_path, "UsePAM no", shell=shell) as s:
            await says(of_someone(s, transport), codes.HUB_CLOSED, "login shell")

    run(main)


# -- keys and known hosts ----------------------------------------------------------------------


@both
@pytest.mark.parametrize("revoked", [False, True])
def test_a_host_certificate(tmp_path: Path, transport: Transport, revoked: bool) -> None:
    """Of an authority that known_hosts trusts, for this name, or that it has revoked since."""

    async def main() -> None:
        async with scene(tmp_path) as s:
            authority = s.key("ca")
            own = s.host_certificate(authority, "-n", "127.0.0.1")
            kind, key, *_ = authority.with_suffix(".pub").read_text().split()
            lines = [f"@cert-authority [127.0.0.1]:{s.sshd.port} {kind} {key}\n"]
            lines += [f"@revoked * {kind} {key}\n"] * revoked
            s.know(*lines)
            await s.sshd.stop()
            await s.sshd.start(f"HostCertificate {own}-cert.pub", f"SetEnv HOME={tmp_path}")
            if revoked:
                await says(s.head(transport), codes.HOST_KEY_REVOKED, "@revoked")
            else:
                assert await answer(s.head(transport)) == SAID

    run(main)


@both
def test_a_host_key_that_is_revoked(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            line = s.sshd.known_hosts_line()
            s.know(line, f"@revoked {line}")
            await says(s.head(transport), codes.HOST_KEY_REVOKED, str(s.known_hosts), "owner")

    run(main)


def test_a_file_of_revoked_keys(tmp_path: Path) -> None:
    """RevokedHostKeys, which AsyncSSH does not read."""

    async def main() -> None:
        async with scene(tmp_path) as s:
            public = s.sshd.known_hosts_line().split(" ", 1)[1]
            (tmp_path / "revoked").write_text(public)
            s.configure(f"RevokedHostKeys {tmp_path}/revoked\n")
            await says(s.head("openssh"), codes.HOST_KEY_REVOKED, f"{tmp_path}/revoked")

    run(main)


@both
def test_another_host_key_under_a_name_and_behind_a_jump_host(
    tmp_path: Path, transport: Transport
) -> None:
    """Of three, the one whose key has changed is named, with the line that removes the old one."""

    async def main() -> None:
        async with chain(tmp_path, 2) as (s, jumps):
            other = RealSshd(tmp_path / "other")
            s.know(
                other.known_hosts_line("of-the-head"),
                *(sshd.known_hosts_line() for sshd in jumps),
            )
            s.configure(f"{s.ssh_config.read_text()}\n  HostKeyAlias of-the-head\n")
            removed = f"`ssh-keygen -R of-the-head -f {s.known_hosts}`"
            await says(s.head(transport), codes.HOST_KEY_MISMATCH, removed)

    run(main)


@both
@pytest.mark.parametrize("named", ["none", "/dev/null"])
def test_no_file_of_known_hosts(tmp_path: Path, transport: Transport, named: str) -> None:
    """It means that no key is known, and never that any will do."""

    async def main() -> None:
        async with scene(tmp_path) as s:
            s.configure(
                f"StrictHostKeyChecking no\nUserKnownHostsFile {named}\nGlobalKnownHostsFile none\n"
            )
            head = s.head(transport, known_hosts=None)
            await says(head, codes.HOST_KEY_UNKNOWN, "ssh-keyscan", "head.known_hosts")

    run(main)


@both
@pytest.mark.parametrize("only", [False, True])
def test_an_agent_with_more_keys_than_the_server_hears(
    tmp_path: Path, transport: Transport, only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MaxAuthTries; `IdentitiesOnly yes` is the remedy, and helps."""

    async def main() -> None:
        async with scene(tmp_path, "MaxAuthTries 3") as s:
            own = f"IdentitiesOnly yes\nIdentityFile {s.sshd.identity}\n" if only else ""
            s.configure(own or f"IdentityFile {tmp_path}/none\n")
            head = s.head(transport, identity=None)
            if only:
                assert await answer(head) == SAID
            else:
                named = ("several of this machine's keys", "head.identity", "IdentitiesOnly yes")
                await says(head, codes.SSH_AUTH_REFUSED, *named)

    with agent_with_other_keys(tmp_path) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        run(main)


# -- this machine's own side -------------------------------------------------------------------


def test_no_room_for_a_socket_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or one that cannot be written to; the link goes on dialling."""

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/rayfwd/ssh-x")

    async def main() -> None:
        async with scene(tmp_path) as s:
            with monkeypatch.context() as patched:
                patched.setattr(tempfile, "mkdtemp", full)
                words = ("No space left on device", "/run/rayfwd", "`df`", 'via = "exec"')
                await says(s.head("openssh"), codes.SSH_FAILED, *words)
                assert await answer(s.head("openssh", via="exec")) == SAID
            assert await answer(s.head("openssh")) == SAID

    run(main)


# -- several hosts -----------------------------------------------------------------------------


@asynccontextmanager
async def chain(directory: Path, count: int) -> AsyncIterator[tuple[Scene, list[RealSshd]]]:
    """A head behind so many jump hosts."""
    async with scene(directory) as s, AsyncExitStack() as stack:
        jumps = [RealSshd(directory / f"j{n}", f"127.0.0.{2 + n}") for n in range(count)]
        for sshd in jumps:
            sshd.authorize(s.sshd.public_key)
            await sshd.start()
            stack.push_async_callback(sshd.stop)
        s.know(*(sshd.known_hosts_line() for sshd in (s.sshd, *jumps)))
        names = ",".join(sshd.target for sshd in jumps)
        s.configure(f"Host 127.0.0.1\n  ProxyJump {names}\n")
        yield s, jumps


@both
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_of_three_jump_hosts_one_is_dead(tmp_path: Path, transport: Transport, dead: int) -> None:
    """Each in turn, the one in the middle as well; the one before it says so."""

    async def main() -> None:
        async with chain(tmp_path, 3) as (s, jumps):
            if dead == 1:
                assert await answer(s.head(transport)) == SAID
            await jumps[dead].stop()
            where = f"{jumps[dead].address} port {jumps[dead].port}"
            called = f"the jump host {jumps[dead].target}"
            words = [f"nothing listens on the SSH port of {called} (dialled {where})"]
            if dead:
                before = jumps[dead - 1].target
                words = [f"the jump host {before} cannot connect to {where} for {called}"]
            await says(s.head(transport), codes.SSH_UNREACHABLE, *words)

    run(main)


@both
def test_a_name_that_is_made_canonical(
    tmp_path: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `Host` and `Match canonical` of the full name, and its key in known_hosts."""
    resolved(monkeypatch, tmp_path, "the-head.cluster.example")

    async def main() -> None:
        async with scene(tmp_path) as s:
            s.configure(
                "CanonicalizeHostname yes\nCanonicalDomains other.example cluster.example\n"
                f"Host *.cluster.example\n  Port {s.sshd.port}\n"
                f"Match canonical host *.cluster.example\n  User {s.sshd.user}\n"
            )
            s.know(s.sshd.known_hosts_line(f"[the-head.cluster.example]:{s.sshd.port}"))
            assert await answer(s.head(transport, ssh="the-head")) == SAID
            s.know("")
            full = f"ssh-keyscan -p {s.sshd.port} the-head.cluster.example"
            await says(s.head(transport, ssh="the-head"), codes.HOST_KEY_UNKNOWN, full)

    run(main)


def resolved(monkeypatch: pytest.MonkeyPatch, directory: Path, name: str) -> None:
    """To 127.0.0.1, for this process and what it runs as `ssh`; no other name of this kind is."""
    real = socket.getaddrinfo

    def found(host: Any, *args: Any, **keys: Any) -> Any:
        if not str(host).startswith("the-head"):
            return real(host, *args, **keys)
        if host != name:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = real("127.0.0.1", *args, **keys)
        return [(*each[:3], name if keys.get("flags") else each[3], each[4]) for each in answers]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    need(None if os.geteuid() == 0 else "only root can have a file of hosts of its own")
    hosts = directory / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n127.0.0.1 {name} {name}.\n")
    (directory / "bin").mkdir()
    command = directory / "bin/ssh"
    bind = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts"
    command.write_text(
        f'#!/bin/sh\nexec unshare --mount sh -c \'{bind} && exec {tool("ssh")} "$@"\' ssh "$@"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
