"""What people have in their SSH configuration and accounts, with real sshd and by both transports:
what `ssh` makes of it, or better.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.ssh import agent as agent_module
from tests.need import tool
from tests.unit.loops import run
from tests.unit.real_sshd import RealSshd
from tests.unit.way_probe import SAID, answer
from tests.unit.way_scene import Transport, both, impatient, keygen, says, scene

RELAY = """
import os, socket, sys, threading
print("connecting", file=sys.stderr, flush=True)
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def up():
    while data := os.read(0, 65536):
        s.sendall(data)
    s.shutdown(1)
threading.Thread(target=up, daemon=True).start()
while data := s.recv(65536):
    print(len(data), "bytes", file=sys.stderr, flush=True)
    os.write(1, data)
"""


# -- names, ports, host keys -------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("ssh", "config"),
    [
        ("{user}@{host}:{port}", ""),
        ("{user}@[{host}]:{port}", ""),
        ("{user}@{host}", "Port {port}"),
        ("{host}:{port}", "User {user}"),
        ("the-head", "Host the-*\n  HostName {host}\n  Port {port}\n  User {user}"),
        ("the-head:{port}", "Host the-head\n  HostName {host}\n  Port 1\n  User {user}"),
        ("the-head", "Host=the-head\n  HostName={host}\n  Port={port}\n  User = {user}"),
        ("h.example", "Host *.example !x.*\n  HostName {host}\n  Port {port}\n  User {user}"),
        ("the-head", "Match originalhost the-head exec true\n  HostName {host}\n  Port {port}\n"
         "  User {user}"),
        ("{user}@the-head", "Match user {user} host the-head\n  HostName {host}\n  Port {port}"),
        ("the-head", "Match exec false\n  HostName 192.0.2.1\nMatch all\n  HostName {host}\n"
         "  Port {port}\n  User {user}"),
    ],
)  # fmt: skip
def test_a_name_and_a_port_in_every_form(
    tmp_path: Path, transport: Transport, ssh: str, config: str
) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            words = {"host": s.sshd.address, "port": s.sshd.port, "user": s.sshd.user}
            s.configure(config.format(**words) + "\n")
            assert await answer(s.head(transport, ssh=ssh.format(**words))) == SAID

    run(main)


@both
def test_files_that_are_included(tmp_path: Path, transport: Transport) -> None:
    """In the order of their names, by a pattern, and one in the other."""

    async def main() -> None:
        async with scene(tmp_path) as s:
            parts = tmp_path / "config.d"
            parts.mkdir()
            for number in range(9):
                wrong = f"Host the-head\n  HostName 192.0.2.{number}\n"
                (parts / f"{number + 1}0.conf").write_text(wrong)
            (parts / "00.conf").write_text(f"Include {tmp_path}/inner\n")
            (tmp_path / "inner").write_text(f"Host the-head\n  HostName {s.sshd.address}\n")
            s.configure(
                f"Include {parts}/*.conf\nHost the-head\n  Port {s.sshd.port}\n"
                f"  User {s.sshd.user}\n"
            )
            assert await answer(s.head(transport, ssh="the-head")) == SAID

    run(main)


@both
def test_a_host_key_under_another_name(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            s.configure("HostKeyAlias of-the-head\n")
            s.know(s.sshd.known_hosts_line("of-the-head"))
            assert await answer(s.head(transport)) == SAID
            s.know(s.sshd.known_hosts_line())
            await says(s.head(transport), codes.HOST_KEY_UNKNOWN, s.sshd.address)

    run(main)


@both
def test_a_file_of_known_hosts_whose_names_are_hashed(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            keygen("-H", "-f", str(s.known_hosts))
            assert "|1|" in s.known_hosts.read_text()
            assert await answer(s.head(transport)) == SAID
            s.know(RealSshd(tmp_path / "other").known_hosts_line(f"[127.0.0.1]:{s.sshd.port}"))
            keygen("-H", "-f", str(s.known_hosts))
            named = f"`ssh-keygen -R '[127.0.0.1]:{s.sshd.port}' -f {s.known_hosts}`"
            await says(s.head(transport), codes.HOST_KEY_MISMATCH, named)

    run(main)


@both
def test_several_files_of_known_hosts_with_percent_signs(
    tmp_path: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNOWN", str(tmp_path))

    async def main() -> None:
        async with scene(tmp_path) as s:
            s.known_hosts.rename(tmp_path / f"of-{s.sshd.user}-{s.sshd.port}")
            files = f"{tmp_path}/none ${{KNOWN}}/of-%r-%p"
            s.configure(f"UserKnownHostsFile {files}\nGlobalKnownHostsFile none\n")
            assert await answer(s.head(transport, known_hosts=None)) == SAID
            (tmp_path / f"of-{s.sshd.user}-{s.sshd.port}").write_text("")
            unknown = f"not in {tmp_path}/of-{s.sshd.user}-{s.sshd.port}"
            head = s.head(transport, known_hosts=None)
            await says(head, codes.HOST_KEY_UNKNOWN, unknown, f">> {tmp_path}/none")

    run(main)


# -- commands that dial ------------------------------------------------------------------------


@both
@pytest.mark.parametrize("fdpass", [False, True])
def test_a_proxycommand_is_the_shells(tmp_path: Path, transport: Transport, fdpass: bool) -> None:
    """With percent signs, redirections and quotes."""

    async def main() -> None:
        async with scene(tmp_path) as s:
            script = tmp_path / "relay.py"
            script.write_text(RELAY)
            noted = tmp_path / "it is noted"
            s.configure(
                f"Host the-head\n  HostName {s.sshd.address}\n  Port {s.sshd.port}\n"
                f"  User {s.sshd.user}\n"
                f"  ProxyCommand {sys.executable} {script} %h %p %r@%n 100%% 2>'{noted}'\n"
            )
            assert await answer(s.head(transport, ssh="the-head")) == SAID
            assert "bytes" in noted.read_text()
            s.configure(s.ssh_config.read_text().replace(f" 2>'{noted}'", ""))
            assert await answer(s.head(transport, ssh="the-head")) == SAID
            jump = RealSshd(tmp_path / "jump", "127.0.0.2")
            jump.authorize(s.sshd.public_key)
            s.know(s.sshd.known_hosts_line(), jump.known_hosts_line())
            s.configure(
                f"Host 127.0.0.2\n  ProxyCommand {sys.executable} {script} %h %p 2>/dev/null\n"
                f"Host 127.0.0.1\n  ProxyJump {jump.target}\n"
                f"  ProxyUseFdpass {'yes' if fdpass else 'no'}\n"
            )
            await jump.start()
            try:
                assert await answer(s.head(transport)) == SAID
            finally:
                await jump.stop()

    run(main)


@both
def test_a_proxycommand_is_not_preceded_by_bashrc(
    tmp_path: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service has no shell above it, and bash takes a socket for a login by rshd."""
    (tmp_path / ".bashrc").write_text("exit 1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.delenv("SHLVL", raising=False)

    async def main() -> None:
        async with scene(tmp_path) as s:
            script = tmp_path / "relay.py"
            script.write_text(RELAY)
            s.configure(f"Host *\n  ProxyCommand {sys.executable} {script} %h %p 2>/dev/null\n")
            assert await answer(s.head(transport)) == SAID

    run(main)


# -- keys --------------------------------------------------------------------------------------


@contextmanager
def agent(directory: Path, key: Path) -> Iterator[Path]:
    """The socket of one that has that key."""
    path = directory / "agent"
    words = [tool("ssh-agent"), "-s", "-a", str(path)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    try:
        env = {**os.environ, "SSH_AUTH_SOCK": str(path)}
        subprocess.run([tool("ssh-add"), "-q", str(key)], env=env, check=True)
        yield path
    finally:
        os.kill(int(said.partition("SSH_AGENT_PID=")[2].partition(";")[0]), signal.SIGTERM)


@both
@pytest.mark.parametrize("named", ["{agent}", "SSH_AUTH_SOCK", "$MY_AGENT", "${{MY_AGENT}}"])
def test_an_agent_that_is_named(
    tmp_path: Path, transport: Transport, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            with agent(tmp_path, s.sshd.identity) as path:
                monkeypatch.setenv("SSH_AUTH_SOCK", str(path if "SOCK" in named else "/nowhere"))
                monkeypatch.setenv("MY_AGENT", str(path))
                no_file = f"IdentityFile {tmp_path}/none\n"
                s.configure(f"IdentityAgent {named.format(agent=path)}\n{no_file}")
                assert await answer(s.head(transport, identity=None)) == SAID
                s.configure(f"IdentityAgent none\n{no_file}")
                await says(s.head(transport, identity=None), codes.SSH_AUTH_REFUSED)

    run(main)


@both
def test_an_agent_that_is_silent_is_blamed_and_no_server(
    tmp_path: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was forwarded over a connection that is dead."""
    monkeypatch.setattr(agent_module, "ANSWERS_WITHIN", 0.2)
    impatient(monkeypatch)

    async def main() -> None:
        async with scene(tmp_path) as s:
            with socket.socket(socket.AF_UNIX) as silent:
                silent.bind(str(tmp_path / "silent"))
                silent.listen(9)
                s.configure(f"IdentityAgent {tmp_path}/silent\nIdentityFile {tmp_path}/none\n")
                await says(
                    s.head(transport, identity=None),
                    codes.SSH_LOGIN_TIMEOUT,
                    f"the SSH agent here, at {tmp_path}/silent, does not answer",
                )

    run(main)


@both
def test_a_certificate_of_the_users(tmp_path: Path, transport: Transport) -> None:
    """That the server takes while it holds; and one that has run out is named."""

    async def main() -> None:
        authority = tmp_path / "ca.pub"
        async with scene(tmp_path, f"TrustedUserCAKeys {authority}") as s:
            ca, own = s.key("ca"), s.key("own")
            sign = ["-s", str(ca), "-I", "x", "-n", s.sshd.user]
            keygen(*sign, f"{own}.pub")
            certificate = (tmp_path / "own-cert.pub").rename(tmp_path / "elsewhere")
            s.configure(f"IdentityFile {own}\nCertificateFile {certificate}\n")
            assert await answer(s.head(transport, identity=None)) == SAID
            keygen(*sign, "-V", "20200101:20200102", f"{own}.pub")
            assert certificate.exists()
            certificate.unlink()
            s.configure(f"IdentityFile {own}\n")
            await says(
                s.head(transport, identity=None),
                codes.SSH_AUTH_REFUSED,
                f"{own}-cert.pub is expired",
                "clock",
            )

    run(main)


# -- what would be in the way ------------------------------------------------------------------


@both
@pytest.mark.parametrize("via", ["socket", "exec"])
def test_options_that_are_meant_for_people(tmp_path: Path, transport: Transport, via: str) -> None:
    """A forward whose port is taken, a command, a terminal, what ends or hides a session."""
    options = [
        "ExitOnForwardFailure yes",
        "RemoteCommand exec tmux attach",
        "RequestTTY force",
        "ForkAfterAuthentication yes",
        "StdinNull yes",
        "SessionType none",
        "LogLevel QUIET",
        "ControlMaster auto",
        f"ControlPath {tmp_path}/control",
        "ControlPersist yes",
        "BatchMode no",
        "ForwardAgent yes",
        "PermitLocalCommand yes",
        f"LocalCommand touch {tmp_path}/ran",
        "VisualHostKey yes",
    ]

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            options.append(f"LocalForward 127.0.0.1:{port} 127.0.0.1:9")
            async with scene(tmp_path) as s:
                for last in ("", "ClearAllForwardings yes"):
                    s.configure("\n".join([*options, last, ""]))
                    assert await answer(s.head(transport, via=via)) == SAID
                    assert not (tmp_path / "control").exists()
                    assert not (tmp_path / "ran").exists()

    run(main)


# -- what the head's account has ---------------------------------------------------------------


@both
def test_a_shell_whose_files_print(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            noise = "echo Welcome to the cluster; echo 'module: not found' >&2\n"
            (tmp_path / ".bashrc").write_text(noise + "printf '\\033[2J'\n")
            for via in ("exec", "socket"):
                assert await answer(s.head(transport, via=via)) == SAID

    run(main)


@both
def test_a_forced_command_that_is_not_there(tmp_path: Path, transport: Transport) -> None:
    async def main() -> None:
        async with scene(tmp_path) as s:
            s.sshd.authorize(f'restrict,command="/opt/rayfwd attach" {s.sshd.public_key}')
            await says(
                s.head(transport, via="exec"), codes.HUB_CLOSED, "/opt/rayfwd", "is found there"
            )

    run(main)


@both
@pytest.mark.parametrize("option", ["ForceCommand /bin/false", "MaxSessions 0", "MaxSessions 1"])
def test_a_head_that_runs_nothing_is_reached_by_its_socket(
    tmp_path: Path, transport: Transport, option: str
) -> None:
    """As with the login shell /usr/sbin/nologin."""

    async def main() -> None:
        async with scene(tmp_path, option) as s:
            assert await answer(s.head(transport)) == SAID

    run(main)
