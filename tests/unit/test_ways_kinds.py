"""What keeps an SSH login from standing, of many kinds, with real sshd and by both transports.

Each names the hop, what was dialled, what was seen there, and one remedy that is right for it.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayfwd import codes
from rayfwd.config import DialConfig, DirectConfig, HeadConfig
from rayfwd.problems import Code
from rayfwd.ssh import dial, openssh, openssh_carrier
from tests.need import tool
from tests.unit.loops import run
from tests.unit.real_sshd import RealSshd
from tests.unit.way_probe import SAID, answer, problem
from tests.unit.way_scene import Scene, Transport, both, impatient, keygen, says, scene

NEWKEYS = b"\x15"
HTTP = b"HTTP/1.1 400 Bad Request\r\n\r\n"


# -- the login ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("shuts", ["DenyUsers *", "StrictModes yes"])
def test_a_key_that_is_there_and_not_taken(
    tmp_path: Path, transport: Transport, shuts: str
) -> None:
    async def main() -> None:
        async with scene(tmp_path, shuts) as s:
            s.sshd.directory.chmod(0o777)
            option = shuts.partition(" ")[0]
            dialled = f"(dialled {s.sshd.address} port {s.sshd.port})"
            await says(s.head(transport), codes.SSH_AUTH_REFUSED, option, s.sshd.user, dialled)

    run(main)


@both
def test_a_banner_says_what_it_likes(tmp_path: Path, transport: Transport) -> None:
    """5 KB of it, with what `ssh` itself would say."""
    lies = [
        "Authenticated to nobody",
        "x@y: Permission denied (all).",
        "REMOTE HOST IDENTIFICATION",
    ]
    lies += ["Host key verification failed.", *["*" * 79] * 64]
    (tmp_path / "banner").write_text("\n".join(lies) + "\n")

    async def main() -> None:
        async with scene(tmp_path, f"Banner {tmp_path}/banner") as s:
            assert await answer(s.head(transport)) == SAID
            assert await answer(s.head(transport, via="exec")) == SAID
            s.sshd.authorize()
            await says(s.head(transport), codes.SSH_AUTH_REFUSED, "refuses this machine's SSH keys")

    run(main)


@both
def test_a_key_with_a_passphrase_is_named(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            locked = s.directory / "locked"
            keygen("-t", "ed25519", "-N", "secret", "-f", str(locked))
            s.configure(f"IdentityFile {locked}\n")
            await says(
                s.head(transport, identity=None),
                codes.SSH_AUTH_REFUSED,
                f"{locked} has a passphrase",
                f"`ssh-add {locked}`",
            )

    run(main)


def test_a_key_that_others_may_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            s.sshd.identity.chmod(0o644)
            await says(s.head("openssh"), codes.SSH_KEY_UNUSABLE, "bad permissions", "chmod 600")

    run(main)


# -- the host key ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (("-n", "127.0.0.1", "-V", "20200101:20200102"), "expired"),
        (("-n", "127.0.0.1", "-V", "20400101:20410102"), "not yet valid"),
        (("-n", "elsewhere"), "principal"),
    ],
)
def test_a_host_certificate_that_does_not_hold(
    tmp_path: Path, transport: Transport, words: Sequence[str], seen: str
) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            authority = s.key("ca")
            own = s.host_certificate(authority, *words)
            trusted = authority.with_suffix(".pub").read_text().split()
            s.know(f"@cert-authority * {trusted[0]} {trusted[1]}\n")
            await s.sshd.stop()
            await s.sshd.start(f"HostCertificate {own}-cert.pub")
            await says(
                s.head(transport),
                codes.HOST_CERTIFICATE_INVALID,
                seen,
                "clock",
                s.sshd.target,
            )

    run(main)


@both
def test_a_host_key_of_another_type_than_is_known(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            keygen("-t", "ecdsa", "-N", "", "-f", str(s.directory / "ec"))
            public = (s.directory / "ec.pub").read_text().split()
            s.know(f"[127.0.0.1]:{s.sshd.port} {public[0]} {public[1]}\n")
            await says(s.head(transport), codes.HOST_KEY_MISMATCH, "ssh-keygen -R")

    run(main)


# -- what answers ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("has", "what"),
    [
        ("Ciphers aes128-cbc", "cipher"),
        ("KexAlgorithms diffie-hellman-group1-sha1", "key exchange"),
    ],
)
def test_a_server_of_another_time(
    tmp_path: Path, transport: Transport, has: str, what: str
) -> None:
    async def main() -> None:
        async with scene(tmp_path, has) as s:
            offers = has.split()[1]
            await says(s.head(transport), codes.SSH_ALGORITHMS, what, offers, "upgrade sshd")

    run(main)


@asynccontextmanager
async def speaking(
    s: Scene, words: bytes, stays: bool = False, transport: Transport = "asyncssh"
) -> AsyncIterator[HeadConfig]:
    """The way to something that says this, where sshd is expected."""
    over = asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        if stays:
            await over.wait()
        else:
            await reader.read(100)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield s.head(transport, ssh=f"ray@127.0.0.1:{port}")
    finally:
        over.set()
        server.close()


@both
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize(
    "words", [HTTP, b"220 mail.example ESMTP\r\n", b"\x15\x03\x01\x00\x02\x02\x0a"]
)
def test_something_else_than_sshd(
    tmp_path: Path,
    transport: Transport,
    stays: bool,
    words: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    impatient(monkeypatch)

    async def main() -> None:
        async with speaking(Scene(tmp_path / "s"), words, stays, transport) as head:
            said = words.decode(errors="replace").strip()[:12] if words[:1].isalnum() else ""
            await says(head, codes.SSH_UNREACHABLE, "not an SSH server", repr(said)[1:-1])

    run(main)


@both
def test_why_it_closes_at_once_is_quoted(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        words = b"Not allowed at this time\r\n"
        async with speaking(Scene(tmp_path / "s"), words, transport=transport) as head:
            await says(head, codes.SSH_TURNED_AWAY, "Not allowed at this time", "MaxStartups")
        async with scene(tmp_path, "MaxStartups 1") as s:
            idle, banner = None, b""
            while not banner.startswith(
                b"SSH-"
            ):  # until the server has done with whoever came before
                if idle is not None:
                    idle.close()
                reader, idle = await asyncio.open_connection(s.sshd.address, s.sshd.port)
                banner = await reader.readline()
            assert idle is not None
            where = f"(dialled {s.sshd.address} port {s.sshd.port})"
            await says(s.head(transport), codes.SSH_TURNED_AWAY, where, "MaxStartups")
            idle.close()

    run(main)


@both
def test_a_path_that_loses_long_packets(
    tmp_path: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The banner comes through, and the key exchange, whose packets are long, does not."""
    impatient(monkeypatch)
    banner = b"SSH-2.0-OpenSSH_9.9\r\n"

    async def main() -> None:
        async with speaking(Scene(tmp_path), banner, stays=True, transport=transport) as head:
            await says(head, codes.SSH_UNREACHABLE, "answers as SSH", "MTU", "key exchange")

    run(main)


@both
def test_a_login_that_takes_too_long(
    tmp_path: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key exchange is over, and what the server asks for the keys is silent."""
    impatient(monkeypatch)

    async def main() -> None:
        async with scene(tmp_path) as s, silent_after_keys(s.sshd) as port:
            there = f"{s.sshd.user}@127.0.0.1:{port}"
            s.know(s.sshd.known_hosts_line(f"[127.0.0.1]:{port}"))
            await says(
                s.head(transport, ssh=there),
                codes.SSH_LOGIN_TIMEOUT,
                f"{there} answers as SSH (dialled 127.0.0.1 port {port}), but the login does not",
                "LDAP",
            )

    run(main)


@asynccontextmanager
async def silent_after_keys(sshd: RealSshd) -> AsyncIterator[int]:
    """A port that leads to that server, which hears nothing after the key exchange."""
    over = asyncio.Event()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, to_them = await asyncio.open_connection(sshd.address, sshd.port)

        async def back() -> None:
            while data := await theirs.read(1 << 16):
                writer.write(data)

        copying = asyncio.create_task(back())
        to_them.write(await reader.readline())
        kind = b""
        while kind != NEWKEYS:
            length = await reader.readexactly(4)
            packet = await reader.readexactly(int.from_bytes(length, "big"))
            to_them.write(length + packet)
            kind = packet[1:2]
        await over.wait()
        copying.cancel()
        for end in (writer, to_them):
            end.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        over.set()
        server.close()


@both
@pytest.mark.parametrize("behind", [False, True])
def test_a_resolver_that_does_not_answer(
    tmp_path: Path, transport: Transport, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "CONNECT_TIMEOUT", 0.5)
    monkeypatch.setattr(openssh_carrier, "RESOLVES_WITHIN", 0.2)
    # As `ssh` does, which says nothing while it waits for one.
    real = tool("ssh")
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin/ssh"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *-G*) exec {real} "$@";; esac\nexec sleep 20\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(openssh_carrier, "LOGIN_TIMEOUT", 0.5)
    monkeypatch.setattr(openssh_carrier, "CONNECT_TIMEOUT", 0)
    asked: asyncio.Event

    async def never(*args: object, **kwargs: object) -> None:
        await asked.wait()

    async def main() -> None:
        nonlocal asked
        asked = asyncio.Event()
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never)
        s = Scene(tmp_path)
        if behind:
            s.configure("Host the-head\n  ProxyJump ray@a-name.example\n")
        head = s.head(transport, ssh="ray@the-head" if behind else "ray@a-name.example")
        called = "the jump host ray@a-name.example" if behind else "ray@a-name.example"
        words = f"no answer for the name a-name.example of {called}"
        await says(head, codes.SSH_UNREACHABLE, "resolver", words, "DNS")

    run(main)


# -- commands, sessions, other hosts -----------------------------------------------------------


@both
def test_a_proxycommand_that_brings_nothing(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            s.configure("Host *\n  ProxyCommand sh -c 'echo no such tunnel >&2; exit 1'\n")
            await says(
                s.head(transport),
                codes.SSH_UNREACHABLE,
                f"the ProxyCommand of {s.sshd.target} did not lead to an SSH server: "
                "no such tunnel",
                "check that the command works",
            )

    run(main)


@both
def test_sessions_that_are_shut(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path, "MaxSessions 0") as s:
            await says(s.head(transport, via="exec"), codes.CHANNEL_REFUSED, "MaxSessions")

    run(main)


@both
def test_a_shell_that_says_something_else(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            head = s.head(transport, via="exec", attach_command="echo not available; exit 1")
            await says(head, codes.HUB_CLOSED, "not available", "login shell")

    run(main)


@both
def test_of_two_jump_hosts_the_one_that_forbids_it(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            first = RealSshd(tmp_path / "first", "127.0.0.2")
            second = RealSshd(tmp_path / "second", "127.0.0.3")
            jumps = (first, second)
            for sshd in jumps:
                sshd.authorize(s.sshd.public_key)
            s.know(*(sshd.known_hosts_line() for sshd in (s.sshd, *jumps)))
            s.configure(f"Host 127.0.0.1\n  ProxyJump {first.target},{second.target}\n")
            await first.start()
            await second.start("PermitOpen 127.0.0.9:22")
            try:
                await says(s.head(transport), codes.JUMP_REFUSED, "PermitOpen", second.address)
                await second.stop()
                await second.start("DenyUsers *")
                await says(
                    s.head(transport), codes.SSH_AUTH_REFUSED, "the jump host", second.address
                )
            finally:
                await second.stop()
                await first.stop()

    run(main)


@asynccontextmanager
async def behind_a_jump_host(
    directory: Path, *options: str
) -> AsyncIterator[tuple[Scene, RealSshd]]:
    """A head, and before it a jump host with these options."""
    async with scene(directory) as s:
        jump = RealSshd(directory / "jump", "127.0.0.2")
        jump.authorize(s.sshd.public_key)
        s.know(s.sshd.known_hosts_line(), jump.known_hosts_line())
        s.configure(f"Host 127.0.0.1\n  ProxyJump {jump.target}\n")
        await jump.start(*options)
        try:
            yield s, jump
        finally:
            await jump.stop()


@both
@pytest.mark.parametrize("option", ["MaxSessions 0", "ForceCommand /bin/false", "PermitTTY no"])
def test_what_a_jump_host_may_forbid_and_is_not_needed(
    tmp_path: Path, transport: Transport, option: str
) -> None:
    """It passes connections on, and runs nothing."""

    async def main() -> None:
        async with behind_a_jump_host(tmp_path, option) as (s, _):
            assert await answer(s.head(transport)) == SAID

    run(main)


@both
def test_a_second_factor_at_the_jump_host(tmp_path: Path, transport: Transport) -> None:
    second = ("AuthenticationMethods publickey,password", "PasswordAuthentication yes")

    async def main() -> None:
        async with behind_a_jump_host(tmp_path, *second) as (s, jump):
            await says(
                s.head(transport),
                codes.SSH_SECOND_FACTOR,
                f"the jump host {jump.target} accepted this machine's key",
                f"(dialled {jump.address} port {jump.port})",
                f"on the jump host {jump.target}",
            )

    run(main)


@both
def test_another_host_key_at_the_jump_host(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with behind_a_jump_host(tmp_path) as (s, jump):
            another = s.sshd.known_hosts_line(f"[{jump.address}]:{jump.port}")
            s.know(s.sshd.known_hosts_line(), another)
            await says(
                s.head(transport),
                codes.HOST_KEY_MISMATCH,
                f"the jump host {jump.target}",
                f"ssh-keygen -R '[{jump.address}]:{jump.port}'",
            )

    run(main)


@both
def test_a_jump_host_that_takes_long_to_log_in(
    tmp_path: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a connection may take: the head behind it has its own time."""
    monkeypatch.setattr(dial, "CONNECT_TIMEOUT", 1.0)
    monkeypatch.setattr(openssh_carrier, "CONNECT_TIMEOUT", 1)

    async def main() -> None:
        async with behind_a_jump_host(tmp_path) as (s, jump), slowly(jump) as port:
            there = f"{jump.user}@{jump.address}:{port}"
            known = jump.known_hosts_line(f"[{jump.address}]:{port}")
            s.know(s.sshd.known_hosts_line(), known)
            s.configure(f"Host 127.0.0.1\n  ProxyJump {there}\n")
            assert await answer(s.head(transport)) == SAID

    run(main)


@asynccontextmanager
async def slowly(sshd: RealSshd) -> AsyncIterator[int]:
    """A port that leads to that server, where what is said after the banner takes its time."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, to_them = await asyncio.open_connection(sshd.address, sshd.port)

        async def copy(
            source: asyncio.StreamReader, sink: asyncio.StreamWriter, pause: float
        ) -> None:
            sink.write(await source.readline())
            await asyncio.sleep(pause)
            while data := await source.read(1 << 16):
                sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, to_them, 1.5), copy(theirs, writer, 0.0))

    server = await asyncio.start_server(relay, sshd.address, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize("words", [b"", b"SSH-2.0-OpenSSH_9.9\r\n"])
@both
def test_a_jump_host_that_falls_silent(
    tmp_path: Path, transport: Transport, words: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or after its banner."""
    impatient(monkeypatch)

    async def main() -> None:
        s = Scene(tmp_path)
        async with speaking(s, words, stays=True) as head:
            jump, port = head.ssh, head.ssh_target()[2]
            s.configure(f"Host the-head\n  ProxyJump {jump}\n")
            seen = "answers as SSH" if words else "accepts the connection"
            called = f"the jump host {jump} {seen} (dialled 127.0.0.1 port {port})"
            await says(s.head(transport, ssh="ray@the-head"), codes.SSH_UNREACHABLE, called)

    run(main)


@both
@pytest.mark.parametrize(
    ("option", "code", "seen"),
    [
        ("Ciphers aes128-cbc", codes.SSH_ALGORITHMS, "no cipher"),
        ("DenyUsers *", codes.SSH_AUTH_REFUSED, "refuses this machine's SSH keys"),
        ("PermitOpen none", codes.JUMP_REFUSED, "may not connect to 127.0.0.1"),
        ("AllowTcpForwarding no", codes.JUMP_REFUSED, "may not connect to 127.0.0.1"),
        ("DisableForwarding yes", codes.JUMP_REFUSED, "may not connect to 127.0.0.1"),
    ],
)
def test_what_a_jump_host_forbids_is_its_own(
    tmp_path: Path, transport: Transport, option: str, code: Code, seen: str
) -> None:
    async def main() -> None:
        async with behind_a_jump_host(tmp_path, option) as (s, jump):
            await says(s.head(transport), code, f"jump host {jump.target}", seen)

    run(main)


@both
def test_a_jump_host_whose_connection_onwards_comes_to_nothing(
    tmp_path: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a firewall that drops it, or a resolver that is silent there."""
    monkeypatch.setattr(dial, "CONNECT_TIMEOUT", 1.0)
    monkeypatch.setattr(openssh_carrier, "CONNECT_TIMEOUT", 1)
    monkeypatch.setattr(openssh, "LOGIN_TIMEOUT", 1.0)

    async def main() -> None:
        async with behind_a_jump_host(tmp_path) as (s, jump):
            with a_full_backlog("127.0.0.3") as port:
                s.configure(f"Host hole\n  HostName 127.0.0.3\n  ProxyJump {jump.target}\n")
                await says(
                    s.head(transport, ssh=f"ray@hole:{port}"),
                    codes.SSH_UNREACHABLE,
                    f"the jump host {jump.target} was asked to connect to 127.0.0.3 port {port}",
                    "firewalls between the two",
                )

    run(main)


@contextmanager
def a_full_backlog(address: str) -> Iterator[int]:
    """A port at which the kernel drops every further SYN."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind((address, 0))
        server.listen(0)
        at = server.getsockname()
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(at)
        yield at[1]


@both
def test_a_jump_hosts_name_that_is_not_found(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        s = Scene(tmp_path)
        s.configure("Host 127.0.0.1\n  ProxyJump me@no-such-host.invalid\n")
        await says(
            s.head(transport),
            codes.SSH_UNREACHABLE,
            "no-such-host.invalid of the jump host me@no-such-host.invalid cannot be resolved",
        )

    run(main)


@both
def test_ipv6_as_a_head_and_as_a_jump_host(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path, address="::1") as s:
            assert f"@[::1]:{s.sshd.port}" in s.sshd.target
            assert await answer(s.head(transport)) == SAID
            s.know("")
            await says(
                s.head(transport),
                codes.HOST_KEY_UNKNOWN,
                f"ssh-keyscan -p {s.sshd.port} ::1",
            )
            behind = RealSshd(tmp_path / "behind")
            behind.authorize(s.sshd.public_key)
            await behind.start()
            s.know(s.sshd.known_hosts_line(), behind.known_hosts_line())
            s.configure(f"Host 127.0.0.1\n  ProxyJump {s.sshd.target}\n")
            try:
                assert await answer(s.head(transport, ssh=behind.target)) == SAID
                s.configure(f"Host ::1\n  ProxyJump {behind.target}\n")
                assert await answer(s.head(transport)) == SAID
            finally:
                await behind.stop()

    run(main, 60)


# -- the configuration -------------------------------------------------------------------------


def test_what_has_no_effect_on_asyncssh_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            s.configure(f"Host *\n  KnownHostsCommand /bin/cat {s.known_hosts}\n")
            unknown = s.head(known_hosts=None)
            await says(
                unknown, codes.HOST_KEY_UNKNOWN, "KnownHostsCommand", 'transport = "openssh"'
            )
            assert await answer(s.head("openssh", known_hosts=None)) == SAID
            s.configure(f"Host elsewhere\n  RevokedHostKeys {tmp_path}/revoked\n")
            assert await answer(s.head()) == SAID
            s.configure(f"RevokedHostKeys {tmp_path}/revoked\n")
            await says(s.head(), codes.SSH_CONFIG_INVALID, "RevokedHostKeys", "@revoked")

    run(main)


@pytest.mark.parametrize("listens", [False, True])
def test_a_controlmaster_that_is_dead(
    tmp_path: Path, listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket is there; nobody listens, or whoever does says nothing."""
    monkeypatch.setattr(openssh, "CHECK_TIMEOUT", 0.5)

    async def main() -> None:
        async with scene(tmp_path) as s:
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(tmp_path / "control"))
                if listens:
                    left.listen(1)
                s.configure(f"Host *\n  ControlPath {tmp_path}/control\n")
                assert await answer(s.head("openssh")) == SAID

    run(main)


@both
@pytest.mark.parametrize("kind", [DialConfig, DirectConfig])
def test_a_workers_problem_is_a_workers(
    tmp_path: Path, transport: Transport, kind: type[DialConfig | DirectConfig]
) -> None:
    """Whoever dials it: what is said names it, and neither a head nor a head's keys."""

    async def main() -> None:
        async with scene(tmp_path) as s:
            given: dict[str, Any] = {
                "ssh": s.sshd.target,
                "known_hosts": s.known_hosts,
                "ssh_config": s.ssh_config,
                "identity": s.sshd.identity,
                "transport": transport,
                **({"node": "gpu-2"} if kind is DirectConfig else {}),
            }
            name = "gpu-2" if kind is DirectConfig else "the worker"

            async def meets(code: Code, **keys: Any) -> None:
                found = await problem(kind(**{**given, **keys}).way())
                assert found.code is code
                assert name in found.cause + found.remedy or "[[hub.dial]]" in found.remedy
                assert not re.search(r"\b(head|hub)\b(?!\.dial)", found.cause + found.remedy)

            nobody = {"socket": tmp_path / "nobody.sock", "via": "socket"}
            await meets(codes.HUB_ABSENT, **nobody)
            await meets(codes.HUB_CLOSED, via="exec", attach_command="exit 3")
            await meets(codes.SSH_FILE_UNREADABLE, identity=tmp_path / "no-key")
            s.sshd.authorize()
            await meets(codes.SSH_AUTH_REFUSED)
            s.know("")
            await meets(codes.HOST_KEY_UNKNOWN)

    run(main, 60)
