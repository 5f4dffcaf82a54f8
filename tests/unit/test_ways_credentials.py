"""Logins by a Kerberos ticket, a security key and a token, with real sshd, a real KDC and SoftHSM.

Where this machine's side cannot be proved, that is what is said, and nothing is waited for without
end: a daemon neither types a PIN nor touches a key.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from asyncssh.sk_eddsa import _SKEd25519Key

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Code
from tests.need import tool
from tests.unit.held_keys import Authenticator, Person, Token
from tests.unit.kerberos import SERVER, Realm, realm
from tests.unit.loops import run
from tests.unit.real_sshd import RealSshd
from tests.unit.way_probe import SAID, answer
from tests.unit.way_scene import Scene, Transport, both, impatient, says, scene

TICKETS = ("GSSAPIAuthentication yes", "GSSAPIStrictAcceptorCheck no")
NO_KEY = "IdentityFile /nonexistent\n  IdentityAgent none\n"


# -- Kerberos ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kdc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    with realm(tmp_path_factory.mktemp("kerberos") / "realm") as made:
        yield made


@pytest.fixture
def tickets(kdc: Realm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Realm]:
    """The realm, in this process's environment; nobody has a ticket yet."""
    for name, value in kdc.env.items():
        monkeypatch.setenv(name, value)
    kdc.destroy_tickets()
    if not kdc.runs:
        kdc.start()
    yield kdc
    kdc.destroy_tickets()


@asynccontextmanager
async def kerberized(directory: Path, *options: str) -> AsyncIterator[tuple[Scene, HeadConfig]]:
    """A head that takes tickets alone, and the way to it by one."""
    async with scene(directory, *TICKETS, *options) as s:
        s.sshd.authorize()
        s.know(s.sshd.known_hosts_line(f"[{SERVER}]:{s.sshd.port}"))
        s.configure(f"Host *\n  GSSAPIAuthentication yes\n  AddressFamily inet\n  {NO_KEY}")
        yield s, by_ticket(s)


def by_ticket(s: Scene, transport: Transport = "openssh", **keys: Any) -> HeadConfig:
    given = {"ssh": f"{s.sshd.user}@{SERVER}:{s.sshd.port}", "identity": None, **keys}
    return s.head(transport, **given)


def test_a_ticket_is_enough(tmp_path: Path, tickets: Realm) -> None:
    async def main() -> None:
        async with kerberized(tmp_path) as (s, head):
            tickets.get_ticket()
            assert await answer(head) == SAID
            assert await answer(by_ticket(s, via="exec")) == SAID
            assert "Accepted gssapi-with-mic" in s.sshd.log

    run(main)


def test_a_keytab_of_the_daemons_own_gets_tickets_by_itself(
    tmp_path: Path, tickets: Realm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KRB5_CLIENT_KTNAME", str(tickets.client_keytab))

    async def main() -> None:
        async with kerberized(tmp_path) as (_, head):
            assert not tickets.has_ticket()
            assert await answer(head) == SAID

    run(main)


def test_a_login_by_a_ticket_that_stands_is_used(tmp_path: Path, tickets: Realm) -> None:
    """As a ControlMaster; when it has ended, the ticket is what is missed."""

    async def main() -> None:
        async with kerberized(tmp_path) as (s, head):
            s.configure(f"{s.ssh_config.read_text()}  ControlPath {tmp_path}/control\n")
            tickets.get_ticket()
            words = ["-F", str(s.ssh_config), "-o", f"UserKnownHostsFile={s.known_hosts}"]
            host = ["-p", str(s.sshd.port), f"{s.sshd.user}@{SERVER}"]
            await asyncio.to_thread(ssh, "-M", "-f", "-N", *words, *host)
            tickets.destroy_tickets()
            assert await answer(head) == SAID
            assert await answer(by_ticket(s, via="exec")) == SAID
            await asyncio.to_thread(ssh, "-O", "exit", *words, *host)
            await says(head, codes.SSH_TICKET_UNUSABLE, "has no ticket", "`kinit`")

    run(main)


def ssh(*words: str) -> None:
    subprocess.run([tool("ssh"), *words], check=True, capture_output=True, timeout=30)


def test_a_ticket_that_is_none_any_more(
    tmp_path: Path, tickets: Realm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with kerberized(tmp_path) as (s, head):
            dialled = f"(dialled 127.0.0.1 port {s.sshd.port})"
            code, who = codes.SSH_TICKET_UNUSABLE, f"{head.ssh} accepts Kerberos tickets {dialled}"
            await says(
                head, code, f"{who}, but this machine has no ticket", "`kinit`", "KRB5CCNAME"
            )
            tickets.get_ticket()
            wrapped(monkeypatch, tmp_path, f'exec {tool("faketime")} -f +30d {tool("ssh")} "$@"')
            await says(head, code, f"{who}, but this machine's ticket has expired", "`kinit`")

    run(main)


def test_clocks_that_differ(
    tmp_path: Path, tickets: Realm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with kerberized(tmp_path) as (_, head):
            tickets.get_ticket()
            wrapped(monkeypatch, tmp_path, f'exec {tool("faketime")} -f +1h {tool("ssh")} "$@"')
            words = ("clocks of this machine and the Kerberos server", "Clock skew", "timedatectl")
            await says(head, codes.SSH_TICKET_UNUSABLE, *words)

    run(main)


def wrapped(monkeypatch: pytest.MonkeyPatch, directory: Path, line: str) -> None:
    """This runs in the place of `ssh`."""
    (directory / "bin").mkdir()
    command = directory / "bin/ssh"
    command.write_text(f"#!/bin/sh\n{line}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")


def test_a_kdc_that_is_away_or_silent(
    tmp_path: Path, tickets: Realm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with kerberized(tmp_path) as (_, head):
            tickets.get_ticket()
            tickets.stop()
            await says(head, codes.SSH_TICKET_UNUSABLE, "is not reached", "KDC", "krb5.conf")
            impatient(monkeypatch)
            with socket.create_server(("127.0.0.1", tickets.port)):
                await says(head, codes.SSH_TICKET_UNUSABLE, "nothing came of it", "port 88")

    run(main)


def test_a_server_that_is_not_in_the_realm(tmp_path: Path, tickets: Realm) -> None:
    async def main() -> None:
        async with kerberized(tmp_path) as (s, _):
            s.know(s.sshd.known_hosts_line())
            tickets.get_ticket()
            head = by_ticket(s, ssh=s.sshd.target)
            words = (
                "does not know it under the name",
                "not found in Kerberos database",
                "HostName",
            )
            await says(head, codes.SSH_TICKET_UNUSABLE, *words)

    run(main)


def test_a_ticket_of_somebody_else(tmp_path: Path, tickets: Realm) -> None:
    async def main() -> None:
        async with kerberized(tmp_path) as (s, head):
            tickets.get_ticket("other")
            words = ("refused this machine's", f"may log in as {s.sshd.user}", ".k5login")
            await says(head, codes.SSH_TICKET_UNUSABLE, *words)

    run(main)


def test_who_has_keys_is_told_of_keys(tmp_path: Path, tickets: Realm) -> None:
    """As where the system's configuration has GSSAPIAuthentication, and nobody uses it."""
    del tickets

    async def main() -> None:
        async with kerberized(tmp_path) as (s, _):
            own = s.key("own")
            s.configure(s.ssh_config.read_text().replace("/nonexistent", str(own)))
            await says(by_ticket(s), codes.SSH_AUTH_REFUSED, "authorized_keys")
            s.configure(s.ssh_config.read_text().replace("tion yes", "tion no"))
            await says(by_ticket(s), codes.SSH_AUTH_REFUSED, "authorized_keys")

    run(main)


@both
def test_a_server_that_takes_tickets_alone(
    tmp_path: Path, tickets: Realm, transport: Transport
) -> None:
    """And who does not show any."""

    async def main() -> None:
        async with kerberized(tmp_path, "PubkeyAuthentication no") as (s, _):
            tickets.get_ticket()
            s.configure(s.ssh_config.read_text().replace("tion yes", "tion no"))
            head = by_ticket(s, transport)
            wanted = {
                "asyncssh": ('transport = "openssh"', "AsyncSSH offers none", "`kinit`"),
                "openssh": ("`GSSAPIAuthentication yes`", "offers none", "`kinit`"),
            }[transport]
            await says(head, codes.SSH_TICKET_UNUSABLE, *wanted)

    run(main)


def test_a_jump_host_that_wants_a_ticket(tmp_path: Path, tickets: Realm) -> None:
    async def main() -> None:
        async with kerberized(tmp_path) as (s, head):
            behind = RealSshd(tmp_path / "behind", "127.0.0.3")
            await behind.start()
            s.know(s.known_hosts.read_text(), behind.known_hosts_line())
            s.configure(f"Host 127.0.0.3\n  ProxyJump {head.ssh}\n{s.ssh_config.read_text()}")
            there = s.head("openssh", ssh=behind.target, identity=behind.identity)
            try:
                called = f"the jump host {head.ssh} accepts Kerberos tickets"
                code = codes.SSH_TICKET_UNUSABLE
                # The head's key is offered to the jump host too, and refused there.
                await says(there, codes.SSH_AUTH_REFUSED, f"the jump host {head.ssh}")
                await s.sshd.stop()
                await s.sshd.start(*TICKETS, "PubkeyAuthentication no")
                await says(there, code, called, "no ticket")
                tickets.get_ticket()
                assert await answer(there) == SAID
            finally:
                await behind.stop()

    run(main)


# -- security keys -----------------------------------------------------------------------------


@asynccontextmanager
async def held_key(
    directory: Path, person: Person, transport: Transport, line: str = "{key}"
) -> AsyncIterator[tuple[Scene, HeadConfig, Authenticator]]:
    """A head that lets an authenticator's key in, which an agent has."""
    key = Authenticator(person)
    async with scene(directory) as s, key.agent(directory / "sk"):
        s.sshd.authorize(line.format(key=key.public_key))
        s.configure(f"IdentityAgent {directory}/sk\nIdentityFile {directory}/none\n")
        yield s, s.head(transport, identity=None), key


@both
@pytest.mark.parametrize(
    ("person", "line"),
    [
        ("touches", "{key}"),
        ("is slow", "{key}"),
        ("need not touch", "no-touch-required {key}"),
    ],
)
def test_a_security_key_in_an_agent(
    tmp_path: Path, transport: Transport, person: Person, line: str
) -> None:
    async def main() -> None:
        async with held_key(tmp_path, person, transport, line) as (_, head, key):
            assert await answer(head) == SAID
            assert key.asked == 1

    run(main)


@both
@pytest.mark.parametrize("person", ["refuses", "is away"])
def test_a_security_key_that_nobody_touches(
    tmp_path: Path, transport: Transport, person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)

    async def main() -> None:
        async with held_key(tmp_path, person, transport) as (s, head, _):
            dialled = f"(dialled 127.0.0.1 port {s.sshd.port})"
            waits = "waits for a touch" if person == "is away" else "nothing here signs with it"
            words = ("my-key", dialled, waits, "no-touch-required", "ControlMaster")
            await says(head, codes.SSH_SIGNING_FAILED, f"{head.ssh} accepts the key", *words)

    run(main)


@both
def test_a_security_key_that_was_not_touched_is_refused_there(
    tmp_path: Path, transport: Transport
) -> None:
    """The signature is a good one, and sshd wants to know of a touch."""

    async def main() -> None:
        async with held_key(tmp_path, "need not touch", transport) as (_, head, _):
            await says(head, codes.SSH_AUTH_REFUSED, "authorized_keys", "no-touch-required")

    run(main)


@both
def test_a_security_key_whose_authenticator_is_not_plugged_in(
    tmp_path: Path, transport: Transport
) -> None:
    key = Authenticator()
    private = _SKEd25519Key.make_private((key.public_bytes, "ssh:", 1, b"handle", b""))

    async def main() -> None:
        async with scene(tmp_path) as s:
            s.sshd.authorize(key.public_key)
            own = tmp_path / "id_sk"
            private.write_private_key(str(own))
            own.chmod(0o600)
            seen: dict[str, tuple[str, ...]] = {
                "asyncssh": ("support not available", 'transport = "openssh"'),
                "openssh": ("device not found", str(own)),
            }
            head = s.head(transport, identity=own)
            await says(head, codes.SSH_SIGNING_FAILED, *seen[transport])

    run(main)


# -- tokens ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Token:
    return Token(tmp_path_factory.mktemp("token"))


@asynccontextmanager
async def by_token(
    directory: Path, token: Token, transport: Transport, config: str
) -> AsyncIterator[tuple[Scene, HeadConfig]]:
    async with scene(directory) as s:
        s.sshd.authorize(token.public_key)
        s.configure(f"{config}\nIdentityFile {directory}/none\n")
        yield s, s.head(transport, identity=None)


@pytest.mark.runs("ssh-add -s *")
@both
def test_a_token_in_an_agent_that_has_its_pin(
    tmp_path: Path, transport: Transport, token: Token
) -> None:
    async def main(agent: Path) -> None:
        async with by_token(tmp_path, token, transport, f"IdentityAgent {agent}") as (_, head):
            assert await answer(head) == SAID

    with token.agent(tmp_path) as agent:
        run(lambda: main(agent))


@both
def test_a_token_that_wants_its_pin(
    tmp_path: Path, transport: Transport, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in token.env.items():
        monkeypatch.setenv(name, value)
    seen: dict[str, tuple[Code, str, str]] = {
        "asyncssh": (codes.SSH_AUTH_REFUSED, "PKCS11Provider", 'transport = "openssh"'),
        "openssh": (codes.SSH_SIGNING_FAILED, "PIN", "`ssh-add -s PROVIDER`"),
    }

    async def main() -> None:
        config = f"PKCS11Provider {token.module}\nIdentityAgent none"
        async with by_token(tmp_path, token, transport, config) as (s, head):
            code, *words = seen[transport]
            await says(head, code, *words)
            if transport == "openssh":
                s.configure("PKCS11Provider /nonexistent.so\n")
                await says(head, codes.SSH_SIGNING_FAILED, "/nonexistent.so", "cannot be loaded")

    run(main)


def test_a_token_that_wants_no_pin(
    tmp_path: Path, token: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PKCS11Provider is then all that is needed."""
    for name, value in token.env.items():
        monkeypatch.setenv(name, value)
    module = token.without_pin(tmp_path)

    async def main() -> None:
        config = f"PKCS11Provider {module}\nIdentityAgent none"
        async with by_token(tmp_path / "s", token, "openssh", config) as (_, head):
            assert await answer(head) == SAID

    run(main)
