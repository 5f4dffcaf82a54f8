"""`rayfwd add` for machines as people have them: odd shells, Pythons in odd places, jump hosts.

sshd, the shells and rayfwd are real; no Ray is started.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, UID
from tests.lab.test_join import InFront, heading, said_on

pytestmark = [pytest.mark.ray, pytest.mark.thorough, pytest.mark.timeout(600)]

WELL = ("noisy", "fishy", "conda", "local", "bare", "port", "behind")
REFUSED = ("nologin", "forced", "stranger")
TWICE = "twice"
PYTHON = "/usr/bin/python3.11"
"""The system's, which is the only one there is."""

NOISY = """
echo "Welcome to $(uname -n)!"
echo "This system is for authorized users only." >&2
umask 077
export LC_ALL=POSIX PYTHONPATH=/nonexistent http_proxy=http://127.0.0.1:9 PIP_REQUIRE_VIRTUALENV=1
unset HISTFILE
"""
"""A login shell's file that greets, and leaves less than usual."""

CONFIG = """
Host far-away
    HostName {behind.address}
    User ray
    ProxyJump ray@{noisy.address}
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), names=("head", *WELL, *REFUSED, TWICE)) as lab:
        head, *others = lab.machines
        head.start_sshd()
        for machine in others:
            machine.firewall([22])
            machine.authorize(head.public_key)
            make_odd(machine)
            machine.start_sshd(["-p", "22", "-p", "2222"] if machine.name == "port" else [])
        known = {m.name: f"{m.address} {m.host_key}" for m in others}
        del known["stranger"]
        known["port"] = f"[{lab.machine('port').address}]:2222 {lab.machine('port').host_key}"
        head.know(*known.values())
        noisy, behind = lab.machine("noisy"), lab.machine("behind")
        head.write(f"{HOME}/.ssh/config", CONFIG.format(noisy=noisy, behind=behind))
        yield lab


def make_odd(machine: Machine) -> None:
    """As its name has it."""
    match machine.name:
        case "noisy":
            machine.write(f"{HOME}/.bashrc", NOISY)
        case "fishy":
            has_shell(machine, "/usr/bin/fish")
            machine.write(f"{HOME}/.config/fish/config.fish", "echo Welcome to fish\n")
        case "nologin":
            has_shell(machine, "/usr/sbin/nologin")
        case "forced":
            command = "echo This account serves backups"
            machine.authorize(f'command="{command}" {machine.lab.machine("head").public_key}')
        case "conda":
            has_python_only_at(machine, f"{HOME}/miniconda3/envs/ray/bin/python3")
        case "local":
            machine.run(["mount", "-t", "tmpfs", "none", "/usr/local/bin"], user="root")
            has_python_only_at(machine, "/usr/local/bin/python3.12")
        case "bare":
            hide(machine, "/usr/bin/tar")
            machine.run(["mount", "-o", "remount,noexec", "/tmp"], user="root")
        case "port":
            machine.firewall([2222])
        case "behind":
            machine.firewall()
            jump = machine.lab.machine("noisy").address
            machine.nft(f"insert rule inet firewall input ip saddr {jump} tcp dport 22 accept\n")


def has_shell(machine: Machine, shell: str) -> None:
    users = machine.host_path("/run/lab/etc/passwd")
    line = f":{UID}:{UID}:ray:{HOME}:"
    text = users.read_text().replace(f"{line}/bin/bash\n", f"{line}{shell}\n")
    assert shell in text
    users.write_text(text)


def has_python_only_at(machine: Machine, path: str) -> None:
    machine.write(path, "", 0o755)
    machine.run(["mount", "--bind", PYTHON, path], user="root")
    hide(machine, PYTHON)


def hide(machine: Machine, path: str) -> None:
    """Nothing is there that can be run."""
    machine.run(["mount", "--bind", "/dev/null", path], user="root")


@pytest.fixture(scope="module")
def head(odd: Lab) -> Iterator[InFront]:
    with heading(odd.machine("head")) as head:
        yield head


def target(machine: Machine) -> str:
    if machine.name == "behind":
        return "far-away"
    return f"ray@{machine.address}" + ":2222" * (machine.name == "port")


def add(head: InFront, hosts: str) -> subprocess.CompletedProcess[str]:
    head.machine.write(f"{HOME}/hosts.txt", hosts)
    return said_on(head, "add", "-f", "hosts.txt", "--set", "ray.start=false")


def up(head: InFront) -> set[str]:
    return {w["name"] for w in head.status()["workers"] if w["state"] == "up"}


def test_it_just_works(odd: Lab, head: InFront) -> None:
    """A shell that greets and says umask 077, POSIX and a proxy; fish; a Python that only conda
    has, or only /usr/local; no tar, and nothing runs in /tmp; another port; a jump host."""
    ran = add(head, "".join(f"{target(odd.machine(name))}\n" for name in WELL))
    assert ran.stdout.splitlines()[-1] == f"{len(WELL)} of {len(WELL)} in the cluster"
    assert up(head) == set(WELL)


def test_what_has_no_shell_or_is_not_known_is_said(odd: Lab, head: InFront) -> None:
    ran = add(head, "".join(f"{target(odd.machine(name))}\n" for name in REFUSED))
    lines = ran.stdout.splitlines()
    assert lines[-1].startswith("0 of 3 in the cluster; 3 failed: ")
    for name, said, to_do in (
        ("nologin", "at `look`: add_failed: {}", "usermod --shell"),
        ("forced", "at `look`: add_failed: {}", "authorized_keys"),
        ("stranger", "at `log in`: host_key_unknown: ", "`rayfwd add --fingerprint SHA256:…`"),
    ):
        at = target(odd.machine(name))
        (failed,) = [line for line in lines if line.startswith(f"{at}  FAILED")]
        runs_none = f"{at} accepts the login, but runs no command; it says: This account "
        assert said.format(runs_none) in failed
        assert to_do in lines[lines.index(failed) + 1]


def test_one_machine_in_two_lines_is_added_once(odd: Lab, head: InFront) -> None:
    """By its address and by an alias, under two names."""
    there = odd.machine(TWICE)
    head.machine.write(f"{HOME}/.ssh/config", f"Host again\n  HostName {there.address}\n")
    ran = add(head, f"ray@{there.address} --name one\nray@again --name other\n")
    lines = ran.stdout.splitlines()
    assert lines[-1].startswith("1 of 2 in the cluster; 1 failed: ")
    (failed,) = [line for line in lines if "  FAILED" in line]
    assert "at `look`: add_blocked: ray@" in failed
    assert " is the same machine and user as ray@" in failed
    (name,) = up(head) & {"one", "other"}
    first, second = f"ray@{there.address}", "ray@again"
    if name == "other":
        first, second = second, first
    ran = add(head, f"{first}\n")
    assert ran.stdout.splitlines()[-1] == "1 of 1 in the cluster; 1 unchanged"
    ran = add(head, f"{second}\n")
    assert f"{second} is the node {name} already, which was added as {first}" in ran.stdout
    assert name in up(head)
