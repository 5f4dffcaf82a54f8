"""Commands of the system that the documents name: each does what it is named for.

Those that change a machine, or need a service of one, are run by the lab and on booted machines.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.need import CHECKOUT, need, no_lab, tool
from tests.unit import loops
from tests.unit.ports import free_port
from tests.unit.real_sshd import RealSshd


def run(*argv: str | Path, input: str | None = None) -> str:  # noqa: A002  # subprocess's own name
    """What it wrote, on both."""
    program, *words = map(str, argv)
    ran = subprocess.run(
        [tool(program), *words],
        input=input,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def shell(script: str) -> str:
    return run("bash", "-c", script)


@pytest.mark.runs("ss -ltn", "ss -ltnp", "ss -lxp")
def test_who_listens_and_which_process_it_is(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        port = tcp.getsockname()[1]
        assert f" 127.0.0.1:{port} " in run("ss", "-ltn")
        for words, place in (("-ltnp", f" 127.0.0.1:{port} "), ("-lxp", f"{tmp_path / 's'} ")):
            (line,) = [line for line in run("ss", words).splitlines() if place in line]
            assert f",pid={os.getpid()}," in line


@pytest.mark.runs("ip addr", "ip -br address")
def test_the_machines_addresses() -> None:
    assert re.search(r"inet 127\.0\.0\.1/\d+ .*\blo$", run("ip", "addr"), re.MULTILINE)
    assert re.search(r"^lo .* 127\.0\.0\.1/", run("ip", "-br", "address"), re.MULTILINE)


WATCHED = """
ip monitor > ip.log & nft monitor > nft.log &
until grep -q begun0 ip.log && grep -q "add table inet begun" nft.log; do
    nft add table inet begun; nft delete table inet begun
    ip link add begun0 type bridge; ip link del begun0
    sleep 0.1
done
nft add table inet stays
nft list ruleset
kill $(jobs -p)
"""


@pytest.mark.runs("nft monitor", "ip monitor", "nft list ruleset")
def test_who_changes_the_firewall_or_the_network_is_seen(tmp_path: Path) -> None:
    """In a network of its own."""
    need(no_lab())
    script = f"cd {tmp_path}; {WATCHED}"
    assert "table inet stays {" in run("unshare", "--net", "timeout", "20", "bash", "-c", script)


@pytest.mark.runs("pgrep -af node_ip_address=*")
def test_the_process_of_an_address() -> None:
    mark = f"node_ip_address={os.getpid()}"
    child = subprocess.Popen(["sh", "-c", "echo; sleep 60", mark], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        found = run("pgrep", "-af", mark).splitlines()
    assert f"{child.pid} sh -c echo; sleep 60 {mark}" in found
    child.kill()
    child.wait(20)


@pytest.mark.runs("sysctl net.ipv4.ip_local_port_range")
def test_the_ports_that_the_kernel_chooses_from() -> None:
    file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    said = run("sysctl", "net.ipv4.ip_local_port_range")
    assert said.partition(" = ")[2].split() == file.read_text().split()


@pytest.mark.runs("ulimit -n", "ulimit -Hn", "ulimit -u")
def test_limits_of_a_shell() -> None:
    files, processes = (
        ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in found]
        for found in map(resource.getrlimit, (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    )
    assert shell("ulimit -n; ulimit -Hn; ulimit -u").split() == [*files, processes[0]]


@pytest.mark.runs("kill -CONT *", "kill [!-]*")
def test_a_process_is_continued_and_ended() -> None:
    child = subprocess.Popen(["sleep", "60"])
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    run("kill", "-CONT", str(child.pid))
    os.waitpid(child.pid, os.WCONTINUED)
    run("kill", str(child.pid))
    assert child.wait(20) == -signal.SIGTERM


def keygen(*words: str | Path) -> str:
    return run("ssh-keygen", *words)


@pytest.mark.runs("ssh-keygen -p -f *")
def test_a_passphrase_is_removed(tmp_path: Path) -> None:
    key = tmp_path / "key"
    keygen("-q", "-t", "ed25519", "-N", "sesame", "-f", key)
    with pytest.raises(AssertionError, match="incorrect passphrase"):
        keygen("-y", "-P", "", "-f", key)
    keygen("-p", "-f", key, "-P", "sesame", "-N", "")
    assert keygen("-y", "-P", "", "-f", key).startswith("ssh-ed25519 ")


@pytest.mark.runs("ssh-keygen -A")
def test_host_keys_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc/ssh").mkdir(parents=True)
    keygen("-A", "-f", tmp_path)
    assert (tmp_path / "etc/ssh/ssh_host_ed25519_key.pub").is_file()


@pytest.mark.runs("ssh-keygen -h -s * -n *")
def test_a_host_key_is_signed_for_a_name(tmp_path: Path) -> None:
    for name in ("ca", "host"):
        keygen("-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    authority, host = tmp_path / "ca", tmp_path / "host.pub"
    keygen("-q", "-h", "-s", authority, "-n", "gpu-1", "-I", "x", host)
    said = keygen("-L", "-f", tmp_path / "host-cert.pub")
    assert "host certificate" in said
    assert said.partition("Principals:")[2].split()[0] == "gpu-1"


@pytest.mark.runs("ssh-keygen -R", "ssh-keygen -R *")
def test_a_host_is_forgotten_and_no_other(tmp_path: Path) -> None:
    keygen("-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    public = (tmp_path / "key.pub").read_text()
    known = tmp_path / "known_hosts"
    known.write_text(f"gpu-1 {public}gpu-2 {public}")
    keygen("-R", "gpu-1", "-f", known)
    assert known.read_text() == f"gpu-2 {public}"


def beside_sshd(directory: Path, body: Callable[[RealSshd], None]) -> None:
    """Run this in a thread while a real sshd is up."""

    async def main() -> None:
        sshd = RealSshd(directory / "sshd")
        await sshd.start()
        try:
            await asyncio.to_thread(body, sshd)
        finally:
            await sshd.stop()

    loops.run(main)


@pytest.mark.runs("ssh-keyscan *", "ssh-keygen -lf *")
def test_a_fingerprint_over_the_network_is_that_of_the_file(tmp_path: Path) -> None:
    def body(sshd: RealSshd) -> None:
        known = sshd.known_hosts_line()
        (tmp_path / "key.pub").write_text(known.partition(" ")[2])
        scan = f"ssh-keyscan -p {sshd.port} {sshd.address} 2>/dev/null | ssh-keygen -lf -"
        assert shell(scan).split()[1] == keygen("-lf", tmp_path / "key.pub").split()[1]

    beside_sshd(tmp_path, body)


def known_in(directory: Path, sshd: RealSshd) -> list[str]:
    """Options for `ssh`, which knows this server and asks nobody."""
    (directory / "known").write_text(sshd.known_hosts_line())
    return [f"-oUserKnownHostsFile={directory}/known", "-oBatchMode=yes", "-F", "/dev/null"]


@pytest.mark.runs("ssh -v", "ssh -F")
def test_ssh_says_how_far_it_gets(tmp_path: Path) -> None:
    def body(sshd: RealSshd) -> None:
        options = known_in(tmp_path, sshd)
        target = ["-oIdentityFile=none", "-p", str(sshd.port), f"{sshd.user}@{sshd.address}"]
        with pytest.raises(AssertionError) as caught:
            run("ssh", "-v", *options, *target, "true")
        for step in ("Connecting to", "Host '[127.0.0.1]", "Permission denied (publickey)"):
            assert step in str(caught.value)

    beside_sshd(tmp_path, body)


@pytest.mark.runs("ssh -L", "ssh -L * *")
def test_a_port_is_forwarded(tmp_path: Path) -> None:
    """To what answers at the far end, as the page does."""

    def body(sshd: RealSshd) -> None:
        options = known_in(tmp_path, sshd)
        login = ["-i", str(sshd.identity), "-p", str(sshd.port), f"{sshd.user}@{sshd.address}"]
        with socket.create_server(("127.0.0.1", 0)) as far:
            here, there = free_port(), far.getsockname()[1]
            forward = ["-L", f"127.0.0.1:{here}:127.0.0.1:{there}", "-N"]
            with subprocess.Popen([tool("ssh"), *forward, *options, *login]) as ssh:
                with dialled(here) as near, far.accept()[0] as page:
                    page.sendall(b"page")
                    assert near.recv(4) == b"page"
                ssh.terminate()

    beside_sshd(tmp_path, body)


def dialled(port: int) -> socket.socket:
    """As soon as somebody listens there."""
    deadline = time.monotonic() + 15
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 15)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.runs("nc -vz * *")
def test_whether_a_port_answers() -> None:
    need(None if shutil.which("nc") else "there is no nc (Debian package netcat-openbsd)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert "succeeded" in run("nc", "-vz", "127.0.0.1", port)
    with pytest.raises(AssertionError, match="refused"):
        run("nc", "-vz", "127.0.0.1", port)


@pytest.mark.runs("nc * *")
def test_what_answers_on_a_port(tmp_path: Path) -> None:
    """An SSH server says at once what it is."""
    need(None if shutil.which("nc") else "there is no nc (Debian package netcat-openbsd)")

    def look(sshd: RealSshd) -> None:
        assert run("nc", "-N", "127.0.0.1", str(sshd.port), input="").startswith("SSH-2.0-")

    beside_sshd(tmp_path, look)


@pytest.mark.runs("chmod 600 *")
def test_a_private_key_that_others_may_read(tmp_path: Path) -> None:
    """It is not used until only its owner may."""
    key = tmp_path / "id_ed25519"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    key.chmod(0o644)
    with pytest.raises(AssertionError, match=r"UNPROTECTED PRIVATE KEY FILE(?s:.*)bad permissions"):
        run("ssh-keygen", "-y", "-f", key)
    run("chmod", "600", key)
    assert run("ssh-keygen", "-y", "-f", key).startswith("ssh-ed25519 ")


@pytest.mark.runs("jq -r *")
def test_what_a_node_waits_for() -> None:
    """By the document's own words."""
    need(None if shutil.which("jq") else "there is no jq (Debian package jq)")
    text = (CHECKOUT / "docs/status.md").read_text()
    (words,) = re.findall(r"\| (jq -r '[^']*')", text)
    causes = [{"blocks_ready": True, "cause": "this"}, {"blocks_ready": False, "cause": "no"}]
    shown = subprocess.check_output(
        ["sh", "-c", words], input=json.dumps({"conditions": causes}), text=True
    )
    assert shown == "this\n"


@pytest.mark.runs("man -M * rayfwd")
def test_man_shows_the_page() -> None:
    need(None if shutil.which("man") else "there is no man (Debian package man-db)")
    assert "makes a Ray cluster work over SSH" in run("man", "-M", CHECKOUT / "share/man", "rayfwd")


@pytest.mark.runs("find src -name * -delete")
def test_compiled_modules_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "src/rayfwd").mkdir(parents=True)
    for name in ("mux.so", "mux.py"):
        (tmp_path / "src/rayfwd" / name).touch()
    (words,) = re.findall(r"`(find src [^`]*)`", (CHECKOUT / "docs/developing.md").read_text())
    subprocess.run(["sh", "-c", words], cwd=tmp_path, check=True)
    assert [path.name for path in (tmp_path / "src/rayfwd").iterdir()] == ["mux.py"]
