"""`rayfwd init` without root on two machines, and what the printed line of authorized_keys allows.

The daemons run as the files say that were made; Ray is found and not started.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import Daemon
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, UID, until

pytestmark = pytest.mark.ray

FILE = f"{HOME}/.config/rayfwd.toml"
STATE = f"{HOME}/.local/state/rayfwd"
HEAD = "ray@198.51.100.1"


def rayfwd(machine: Machine, *words: str, check: bool = True) -> str:
    """What `rayfwd` says to the machine's ordinary user."""
    argv = [str(machine.lab.rayfwd), *words]
    ran: subprocess.CompletedProcess[str] = machine.run(argv, check=check)
    return ran.stdout + ran.stderr


def printed(said: str, begin: str) -> str:
    """The line that was printed to be copied."""
    return next(line.strip() for line in said.splitlines() if line.startswith(f"    {begin}"))


def start(machine: Machine) -> Daemon:
    """What the unit does, with a Ray that is not started."""
    file = machine.host_path(FILE)
    file.write_text(file.read_text() + "start = false\n")
    machine.host_path(f"/run/user/{UID}").mkdir(parents=True)
    run = machine.host_path(f"/run/user/{UID}/rayfwd")
    run.mkdir(mode=0o755)  # systemd's RuntimeDirectory=
    os.chown(run, UID, UID)
    argv = [str(machine.lab.rayfwd), "--config", FILE, "run"]
    return Daemon(machine, machine.popen(argv, log=machine.lab.folder / f"{machine.name}-run.log"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab")) as made:
        head, w1 = made.machine("head"), made.machine("w1")
        head.authorize()
        w1.know()
        head.start_sshd()
        yield made


@pytest.fixture(scope="module")
def line(lab: Lab) -> str:
    """Both machines set up; the line that the worker's has printed."""
    head, w1 = lab.machine("head"), lab.machine("w1")
    said = rayfwd(head, "init", "head", "--ray", str(head.ray()))
    assert "enable-linger ray" in said
    assert "Ray 2.60.0" in said
    assert printed(said, "systemctl --user enable") in said.splitlines()[-1]
    wanted = ["init", "worker", "--head", HEAD, "--ray", str(w1.ray())]
    fingerprint = fingerprint_of(head)
    refused = rayfwd(w1, *wanted, "--fingerprint", "SHA256:" + "A" * 43, check=False)
    assert "host_key_mismatch" in refused
    assert fingerprint in refused
    nobody = rayfwd(w1, *wanted, check=False)
    assert "--fingerprint: must be given" in nobody
    assert rayfwd(w1, "init", "worker", "--head", HEAD, "--ray", "/none", check=False).startswith(
        "rayfwd: ray_not_found"
    )
    dry = rayfwd(w1, *wanted, "--fingerprint", fingerprint, "--dry-run")
    assert "to create" in dry
    assert not w1.host_path(f"{HOME}/.config").exists()
    said = rayfwd(w1, *wanted, "--fingerprint", fingerprint)
    again = rayfwd(w1, "init", "worker")
    assert "Nothing had to be done" in again
    assert printed(again, "restrict,") == printed(said, "restrict,")
    found = printed(said, "restrict,")
    head.authorize(found)
    return found


def fingerprint_of(machine: Machine) -> str:
    public = Path(machine.lab.folder / f"{machine.name}-host.pub")
    ran = subprocess.run(["ssh-keygen", "-lf", public], capture_output=True, text=True, check=True)
    return ran.stdout.split()[1]


@pytest.fixture(scope="module")
def linked(lab: Lab, line: str) -> None:
    """The daemons run, and the link stands."""
    head, w1 = start(lab.machine("head")), start(lab.machine("w1"))
    del head

    def up() -> bool:
        said = w1.machine.run([str(lab.rayfwd), "status", "--json"], check=False).stdout
        return re.search(r'"state": "up"', said) is not None

    until(up, 60, lab.tails)


def test_the_line_is_exact(line: str) -> None:
    assert re.fullmatch(
        r'restrict,command="\S+/bin/rayfwd attach" ssh-ed25519 [A-Za-z0-9+/=]+ rayfwd w1', line
    )


def test_a_direct_way_has_its_section_and_its_line(lab: Lab, line: str) -> None:
    """On the worker that dials, which is set up again, and for the key of one that dials it."""
    w1, w2 = lab.machine("w1"), lab.machine("w2")
    said = rayfwd(w1, "init", "worker", "--direct", f"w2=ray@{w2.address}")
    key = line.partition('attach" ')[2]
    peers = f'restrict,command="{lab.rayfwd} attach --peer" {key}'
    assert printed(said, "restrict,command=") == line
    assert f"    {peers}" in said.splitlines()
    assert printed(said, "ssh-keyscan") == (
        f"ssh-keyscan -p 22 {w2.address} >> ~ray/.ssh/known_hosts"
    )
    assert "direct" in said, "what the doctor has found"
    (direct,) = tomllib.loads(w1.host_path(FILE).read_text())["direct"]
    assert (direct["node"], direct["ssh"]) == ("w2", f"ray@{w2.address}")
    assert "Nothing had to be done" in rayfwd(w1, "init", "worker")
    told = rayfwd(w1, "init", "worker", "--peer-key", w2.public_key, "--dry-run")
    theirs = f'    restrict,command="{lab.rayfwd} attach --peer" {w2.public_key}'
    assert theirs in told.splitlines()


@pytest.mark.runs(
    "rayfwd init",
    "rayfwd init head --ray *",
    "rayfwd init worker --head * --ray * --fingerprint *",
    "rayfwd init worker",
    "rayfwd run",
    "rayfwd status",
    "rayfwd status --json",
)
def test_the_link_stands_with_that_key_alone(lab: Lab, linked: None) -> None:
    said = lab.machine("head").run([str(lab.rayfwd), "status", "--json"], check=False).stdout
    assert '"w1"' in said


@pytest.mark.parametrize(
    "options",
    [
        ["-W", "127.0.0.1:22"],
        ["-W", "198.51.100.1:22"],
        ["-N", "-R", "17171:127.0.0.1:22"],
        ["-N", "-R", "/tmp/remote.sock:127.0.0.1:22"],
    ],
)
def test_the_key_forwards_nothing(lab: Lab, linked: None, options: list[str]) -> None:
    said = ssh(lab, ["-o", "ExitOnForwardFailure=yes", *options])
    assert "administratively prohibited" in said or "remote port forwarding failed" in said, said
    assert "SSH-2.0" not in said


def test_the_key_reaches_no_socket(lab: Lab, linked: None) -> None:
    """Not even the hub's, but by `rayfwd attach`."""
    w1 = lab.machine("w1")
    local = "/tmp/through.sock"
    argv = ["timeout", "20", "ssh", *options(), "-N", "-L"]
    argv += [f"{local}:/run/user/{UID}/rayfwd/hub.sock", HEAD]
    process = w1.popen(argv, log=lab.folder / "through.log")
    until(w1.host_path(local).exists, 20, lab.tails)
    ask = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/tmp/through.sock'); "
    ask += "s.settimeout(10); print(s.recv(9))"
    assert w1.run([str(w1.ray_python()), "-c", ask]).stdout == "b''\n"
    assert "refused streamlocal port forward" in (lab.folder / "head-sshd.log").read_text()
    process.signal(15)
    process.wait(20)


@pytest.mark.parametrize("command", [[], ["id; touch proof"], ["/bin/sh"]])
def test_the_key_runs_no_command(lab: Lab, linked: None, command: list[str]) -> None:
    said = ssh(lab, ["-tt"], *command)
    assert "uid=" not in said
    assert "$ " not in said
    assert "PTY allocation request failed" in said
    assert not lab.machine("head").host_path(f"{HOME}/proof").exists()


def test_the_key_reads_no_files(lab: Lab, linked: None) -> None:
    w1 = lab.machine("w1")
    argv = ["sftp", *options(), "-b", "-", HEAD]
    ran = w1.run(argv, check=False, input=f"get {FILE} {HOME}/stolen\n")
    assert ran.returncode != 0
    assert not w1.host_path(f"{HOME}/stolen").exists()


@pytest.mark.runs("rayfwd uninstall", "rayfwd uninstall --purge")
def test_uninstall_keeps_what_was_edited(lab: Lab, linked: None) -> None:
    """The configuration was, by `start`; what the daemon has written is its own."""
    w1 = lab.machine("w1")
    said = rayfwd(w1, "uninstall")
    assert re.search(rf"kept \(edited.* {re.escape(FILE)}", said)
    assert w1.host_path(FILE).exists()
    assert not w1.host_path(f"{STATE}/id_ed25519").exists()
    assert not list(w1.host_path(f"{HOME}/.config/systemd").rglob("*.service"))
    rayfwd(w1, "uninstall", "--purge")
    assert not w1.host_path(f"{HOME}/.config").exists()
    assert not w1.host_path(f"{HOME}/.local").exists()


def options() -> list[str]:
    key = ["-i", f"{STATE}/id_ed25519", "-o", "IdentitiesOnly=yes", "-F", "none"]
    known = ["-o", f"UserKnownHostsFile={STATE}/known_hosts", "-o", "StrictHostKeyChecking=yes"]
    return [*key, *known, "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]


def ssh(lab: Lab, further: list[str], *command: str) -> str:
    """What an attempt with the worker's key says, in all."""
    argv = ["timeout", "20", "ssh", *options(), *further, HEAD, *command]
    ran = lab.machine("w1").run(argv, check=False)
    return ran.stdout + ran.stderr
