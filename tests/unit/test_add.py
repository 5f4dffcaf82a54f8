"""`rayfwd add` and `remove`: what is decided, what is sent, and what is said; the machines' part by
a real SSH server that runs what it is told in a home of its own."""

from __future__ import annotations

import asyncio
import base64
import csv
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncssh
import pytest

from rayfwd import codes
from rayfwd.cli import add as cli_add
from rayfwd.cli import head as cli_head
from rayfwd.cli.many import at_once, summary
from rayfwd.cluster.plan import check_name
from rayfwd.config import DialConfig
from rayfwd.daemon.dialling import Dialling
from rayfwd.daemon.head import HeadRole
from rayfwd.problems import Code, Problem, ProblemError
from rayfwd.ray.install import Versions
from rayfwd.setup.manifest import Manifest
from rayfwd.setup.remote import (
    adding,
    here,
    hosts,
    install,
    keys,
    removing,
    shipment,
    sight,
    ssh,
    there,
    wheels,
)
from rayfwd.setup.remote.adding import Outcome
from rayfwd.setup.remote.calls import NodeRequest, Prepared, SelfReport
from rayfwd.setup.remote.hosts import Host, HostsError
from rayfwd.setup.remote.shipment import Needs, Shipment
from rayfwd.setup.remote.sight import Python, Sight
from rayfwd.setup.remote.ssh import Failed, Machine
from rayfwd.setup.request import Layout, user_layout
from rayfwd.setup.steps import undo
from rayfwd.ssh import dial
from rayfwd.ssh.carriers import carrier_for
from rayfwd.system.asuser import own_account
from rayfwd.wire import fields_from_wire, fields_to_wire
from tests.commands import main
from tests.unit.daemons import Site, site
from tests.unit.loops import run, run_on_fake_clock, until

FIXTURES = Path(__file__).parents[1] / "fixtures" / "status"

USUAL = Host(ssh="", ray=True, via="worker")

SEEN = Sight(
    system="Debian",
    machine="x86_64",
    root=False,
    user="ray",
    home="/home/ray",
    host="gpu-1",
    head_as="198.51.100.1",
    cpus=4,
    gpus=0,
    free=20 << 30,
    libc="glibc 2.36",
    index="no",
    prefix="/home/ray/.local/share/rayfwd",
    there=False,
    pythons=(Python("/usr/bin/python3", "3.11.2"),),
)
SENT = Shipment(
    own=Path("rayfwd-1-py3-none-any.whl"),
    needs=lambda: Needs((), "", None),
    uv=None,
    digest="d",
    python=(3, 11),
    machine="x86_64",
    libc="glibc",
)


# -- which machines -------------------------------------------------------------------------------


def test_a_hosts_file(tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text(
        "# ours\n\nray@gpu-1\nroot@203.0.113.7 -p 41022 --name rented-7 --via head  # theirs\n"
    )
    one, two = hosts.read(path, USUAL)
    assert (one.ssh, one.via, one.ray, one.name) == ("ray@gpu-1", "worker", True, None)
    assert (two.ssh, two.via, two.ray, two.name) == (
        "root@203.0.113.7:41022",
        "head",
        True,
        "rented-7",
    )
    assert two.way().ssh_target() == ("root", "203.0.113.7", 41022)


def test_a_hosts_file_of_windows_and_paths_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered of a machine is used by the head's daemon, which is elsewhere."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hosts.txt"
    path.write_bytes(b"\xef\xbb\xbfray@gpu-1 -i keys/id --known-hosts ~nobody-x/known\r\n")
    (one,) = hosts.read(path, USUAL)
    assert (one.ssh, one.identity) == ("ray@gpu-1", tmp_path / "keys" / "id")
    assert one.known_hosts == tmp_path / "~nobody-x" / "known", "as a shell leaves it"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ray@", "hosts.txt:1: ray@: must be user@host"),
        ("ray@gpu-1:0", "must be user@host"),
        ("ray@gpu-1 -p 70000", "must be user@host"),
        ("ray@gpu-1:22 -p 2222", "hosts.txt:1: --port 2222: ray@gpu-1:22 already has a port"),
        ("ray@gpu-1 --via sideways", "hosts.txt:1: argument --via: invalid choice"),
        ("ray@gpu-1 ray@gpu-2", "unrecognized arguments: ray@gpu-2"),
        ("ray@gpu-1 --name head", "another name on a worker"),
        ("ray@gpu-1 --name 'a b'", "must be 1 to 63 letters"),
        ("ray@gpu-1 --prefix ../x", "must be an absolute path"),
        ("ray@gpu-1 --fingerprint MD5:aa:bb", "must be as `ssh-keygen -lf` prints it"),
        ("ray@gpu-1 --name", "argument --name: expected one argument"),
        ("ray@gpu-1 'x", "No closing quotation"),
        ("# nobody", "it names no machine"),
    ],
)
def test_what_is_wrong_in_it_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text(f"{line}\n")
    with pytest.raises(HostsError) as told:
        hosts.read(path, USUAL)
    assert said in told.value.lines[0]


def test_a_machine_that_is_twice_in_it_is_named_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text("ray@gpu-1\n\n# again\nray@gpu-1 -p 2222 --name b\nray@gpu-1\n")
    assert list(hosts.twice(hosts.read(path, USUAL))) == [
        f"{path}:5: ray@gpu-1: is given twice, first in {path}:1"
    ]


def test_an_alias_may_be_a_nodes_name(tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text("gpu-1 --name gpu-1\ngpu-2 --name gpu-3\ngpu-3 --name gpu-2\n")
    assert list(hosts.twice(hosts.read(path, USUAL))) == []


def test_mistakes_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text("ray@gpu-1\n")
    for words, said in (
        (["add"], "give USER@HOST, or a file of machines with -f"),
        (["add", "ray@gpu-1", "-f", str(path)], "ray@gpu-1: is given twice"),
        (["add", "ray@gpu-1", "--set", "ray.num_cpu=1"], "did you mean num_cpus"),
        (["add", "ray@gpu-1", "--set", "role=head"], "--set role: cannot be set here\n"),
        (["add", "ray@gpu-1", "--set", "head.ssh=a@b"], "--set head.ssh: cannot be set here; use"),
        (["add", "ray@gpu-1", "--jobs", "0"], "--jobs 0: must be at least 1"),
        (["add", "-f", str(tmp_path / "none")], "none: No such file or directory"),
        (["add", "-f", str(path), "--name", "x"], "--name: is for one machine"),
        (["add", "ray@a", "ray@b", "--name", "x"], "--name: is for one machine"),
        (["add", "ray@a:22", "-p", "2222"], "--port 2222: ray@a:22 already has a port"),
        (["add", "-f", str(path), "-p", "2222"], "--port: is for machines of the command line"),
        (["remove", "w1", "--jobs", "-1"], "--jobs -1: must be at least 1"),
        (["remove"], "give a NAME, or a file of machines with -f"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_no_room_on_the_head_for_what_is_sent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its disk is read-only, and it has no tmpfs."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nothing")
    with pytest.raises(ProblemError) as told:
        cli_add._space()
    assert told.value.problem.code is codes.DIRECTORY_UNUSABLE
    assert "TMPDIR" in told.value.problem.remedy


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon", "0", "1e400", "9" * 400])
def test_a_time_to_wait_is_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["add", "ray@a", f"--wait-for={text}"])
    assert "must be a time, as in 90, 45m, 2h or 1d" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ssh_", "reached"),
    [
        ("root@203.0.113.7", "root@203.0.113.7:41022"),
        ("rented", "rented:41022"),
        ("root@2001:db8::7", "root@[2001:db8::7]:41022"),
        ("root@[2001:db8::7]", "root@[2001:db8::7]:41022"),
    ],
)
def test_a_port_as_ssh_takes_it(ssh_: str, reached: str) -> None:
    """Whoever rents out a machine shows `ssh -p 41022 root@203.0.113.7`."""
    assert hosts.at_port(ssh_, 41022) == reached
    assert hosts.at_port(ssh_, None) == ssh_
    assert Host(ssh=reached).way().ssh_target()[2] == 41022


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ("gpu-1.example.org", "gpu-1"),
        ("-C.0ffee-", "C"),
        ("Ubuntu 22", "Ubuntu-22"),
        ("x_y", "x_y"),
    ],
)
def test_a_name_from_the_machines_own(own: str, name: str) -> None:
    assert check_name(hosts.node_name(own)) == name


# -- looking --------------------------------------------------------------------------------------


def by_shell(script: str, **env: str) -> str:
    async def main_() -> str:
        child = await asyncio.create_subprocess_exec(
            *("sh", "-c", script), env=env, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await child.communicate()
        assert child.returncode == 0
        return out.decode()

    return asyncio.run(main_())


def test_this_machine_is_seen_by_its_shell_alone(tmp_path: Path) -> None:
    prefix, ray = tmp_path / "it's here", tmp_path / "ray"
    ray.touch(mode=0o755)
    prefix.mkdir()
    (prefix / sight.MARKER).write_text('{"wheel": "x"}\n')
    tools = tmp_path / "bin"
    tools.mkdir()
    path = f"{tools}:/usr/bin:/bin"
    for name in ("curl", "wget"):  # no network is asked
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    (tools / "python3.13").write_text("#!/bin/sh\necho 3.13.1\n")
    (tools / "python3.13").chmod(0o755)
    words = sight.script(str(prefix), [str(ray)])
    env = {"PATH": path, "HOME": str(tmp_path), "SSH_CONNECTION": "198.51.100.1 5 198.51.100.2 22"}
    seen = sight.read(by_shell(words, **env), time.time())
    assert (seen.prefix, seen.made, seen.there) == (str(prefix), {"wheel": "x"}, True)
    assert (seen.root, seen.head_as, seen.index) == (os.geteuid() == 0, "198.51.100.1", "no")
    assert seen.rays[0] == str(ray)
    assert seen.pythons[0] == Python(str(tools / "python3.13"), "3.13.1")
    assert seen.python == seen.pythons[0]
    assert seen.free > 0
    assert seen.cpus > 0
    assert seen.broken, "it has no Python"
    lock = tmp_path / "it's here.lock"
    with lock.open("w") as held:
        assert not sight.read(by_shell(words, **env)).busy
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sight.read(by_shell(words, **env)).busy, "somebody installs there"
    assert "does not reach a package index" in seen.lines()
    assert (seen.noexec, seen.readonly, seen.shut, seen.clock()) == (False, False, "", "")


LS = """#!/bin/sh
[ -e {once} ] || {{ touch {once}; {change}; }}
exec {real} "$@"
"""


def shows_to_ls(tmp_path: Path, change: str) -> str:
    """A PATH where what another machine has done shows to who opens the directory, as on NFS."""
    ls = tmp_path / "tools" / "ls"
    ls.parent.mkdir()
    real = shutil.which("ls", path=os.defpath)
    ls.write_text(LS.format(once=tmp_path / "shown", change=change, real=real))
    ls.chmod(0o755)
    return f"{ls.parent}:/usr/bin:/bin"


def test_what_another_machine_has_just_removed_is_not_there(tmp_path: Path) -> None:
    prefix = tmp_path / "rayfwd"
    prefix.mkdir()
    path = shows_to_ls(tmp_path, f"rm -r {prefix}")
    env = {"PATH": path, "HOME": str(tmp_path), "PIP_INDEX_URL": "file:///"}
    seen = sight.read(by_shell(sight.script(str(prefix), []), **env))
    assert not seen.there


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("ro", "nothing can be written where {} goes: that disk is mounted read-only"),
        ("noexec", "nothing can be run from where {} goes: that disk is mounted noexec"),
        ("size=1m", "1 MB are free where {} goes, but 262 MB are needed"),
    ],
)
def test_a_disk_on_which_nothing_can_be_installed_is_named_before(
    tmp_path: Path, options: str, said: str
) -> None:
    """And where to: `--prefix`."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a disk")
    prefix = tmp_path / "disk" / "a" / "rayfwd"
    prefix.parents[1].mkdir()
    mounted = f"mount -t tmpfs -o {options} disk {shlex.quote(str(prefix.parents[1]))} || exit 1\n"
    inner = mounted + sight.script(str(prefix), [])
    outer = "exec unshare --mount sh -c " + shlex.quote(inner)
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "PIP_INDEX_URL": "file:///"}
    seen = sight.read(by_shell(outer, **env))
    with pytest.raises(ProblemError) as told:
        install._check_place(seen, str(prefix), False, install.ROOM)
    assert told.value.problem.code is codes.ADD_BLOCKED
    assert told.value.problem.cause == said.format(prefix)
    assert "--prefix" in told.value.problem.remedy


def test_a_directory_that_is_not_this_logins_is_named() -> None:
    seen = replace(SEEN, shut="/opt")
    with pytest.raises(ProblemError) as told:
        install._check_place(seen, "/opt/rayfwd", False, install.ROOM)
    assert told.value.problem.cause.endswith(": ray may create nothing in /opt")


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (replace(SEEN, cpus=1, gpus=8), "1 CPU, 8 GPUs, "),
        (replace(SEEN, cpus=4, gpus=1), "4 CPUs, 1 GPU, "),
        (replace(SEEN, systemd=False, booted=False), ", no service manager"),
        (replace(SEEN, systemd=True, booted=True), ", systemd"),
        (replace(SEEN, systemd=False, booted=True), ", systemd, but no services of this user"),
    ],
)
def test_what_a_machine_has_is_said_in_a_line(seen: Sight, said: str) -> None:
    assert said in seen.lines()


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (1_000_010, ""),
        (1_010_800, "its clock is 3:00:00 ahead of the head's"),
        (1, "its clock is 11 days, 13:46:39 behind the head's"),
    ],
)
def test_a_wrong_clock_is_seen(theirs: int, said: str) -> None:
    seen = sight.read(f"kernel Linux\nprefix /x\nnow {theirs}\n", 1e6)
    assert seen.clock() == said
    assert seen.lines().endswith(said)
    machine = cast("Machine", SimpleNamespace(host=Host(ssh="ray@gpu-1")))
    error = "SSL: CERTIFICATE_VERIFY_FAILED certificate is not yet valid"
    problem = install._no_packages(machine, seen, PIP, error, "").problem
    assert problem.code is codes.ADD_NO_PACKAGES
    assert ("timedatectl" in problem.remedy) == bool(said)


def test_a_python_and_a_ray_beside_the_path_are_seen(tmp_path: Path) -> None:
    """A login over SSH has not the PATH of an image (conda's, a virtual environment's), nor what
    ~/.bashrc gives people."""
    home = tmp_path / "at home"
    places = [".venv", "miniconda3", "miniforge3/envs/ray", ".pyenv/versions/3.12.4"]
    places.append(".local/share/uv/python/cpython-3.13.1-linux-x86_64-gnu")
    for number, place in enumerate(places):
        for name in ("python3", "ray", "uv"):
            path = home / place / "bin" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\necho 3.1{number}.0\n")
            path.chmod(0o755)
    (home / ".pyenv/versions/empty/bin").mkdir(parents=True)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PIP_INDEX_URL": "file:///"}
    seen = sight.read(by_shell(sight.script(None, []), **env))
    found = {python.path: python for python in seen.pythons}
    for number, place in enumerate(places):
        python = str(home / place / "bin" / "python3")
        assert found[python] == Python(python, f"3.1{number}.0")
        assert str(home / place / "bin" / "ray") in seen.rays
    assert seen.uv == (shutil.which("uv", path=env["PATH"]) or str(home / ".venv/bin/uv"))
    assert seen.pythons[0].path.startswith("/usr/bin/"), "the PATH goes first"
    again = sight.read(by_shell(sight.script(None, []), **env))
    assert seen.same
    assert seen.same == again.same


def test_of_several_rays_the_one_that_is_as_the_heads_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of several environments; else the first one that works, for what is said of it."""
    rays = {"/a": None, "/b": ["2.9.3", "3.11.2"], "/c": ["2.60.0", "3.12.1"]}
    rays["/d"] = ["2.60.0", "3.11.2"]

    def find(command: str) -> dict[str, Any]:
        if rays[command] is None:
            raise codes.RAY_NOT_FOUND.error("no", "way")
        return {"ray": command, "versions": rays[command]}

    monkeypatch.setattr(there, "_ray_of_its_owner", find)

    def taken(wanted: list[str] | None) -> object:
        return asyncio.run(there.look(list(rays), [], wanted))["ray"]

    assert taken(["2.60.0", "3.11.2"]) == "/d"
    assert taken(["2.61.0", "3.11.2"]) == "/b"
    assert taken(None) == "/b"


def test_what_is_no_linux_is_told() -> None:
    for output in ("", "kernel Darwin\nprefix /x\n", "kernel Linux\nprefix x\n"):
        with pytest.raises(ValueError):
            sight.read(output)
    assert sight.read("kernel Linux\nprefix /x\nmade {]\nfree many\n").made is None


# -- by what it is installed ----------------------------------------------------------------------

OLD, AS_HERE = Python("/a", "3.10.1"), Python("/c", "3.11.9")
UV, PIP = install.Tool(uv="/u", python="3.11"), install.Tool(python="/usr/bin/python3")
NO_PYTHON, NO_PACKAGES = codes.ADD_NO_PYTHON, codes.ADD_NO_PACKAGES
BARE = Python("/e", "3.11.2", whole=False)
"""As Debian's python3-minimal."""


def by_python(python: Python) -> install.Tool:
    return install.Tool(python=python.path)


SERVICE = {"root": True, "home": "/root", "systemd": True}
"""Of another user than root."""
ROOTS = Python("/root/conda/bin/python3", "3.11.9")


@pytest.mark.parametrize(
    ("changes", "sent", "wanted", "tool"),
    [
        ({}, {}, None, install.Tool(python="/usr/bin/python3")),
        ({"uv": "/u"}, {}, None, install.Tool(uv="/u", python="/usr/bin/python3")),
        ({"uv": "/u", "pythons": ()}, {}, None, install.Tool(uv="/u", python="3.11")),
        ({"uv": "/u"}, {}, "3.12.4", install.Tool(uv="/u", python="3.12.4")),
        ({"pythons": ()}, {"uv": Path("/b")}, None, install.Tool(bring_uv=True, python="3.11")),
        ({"pythons": (OLD, Python("/b", "3.12.1"), AS_HERE)}, {}, None, install.Tool(python="/c")),
        ({"pythons": (Python("/d", "3.13.1"), BARE)}, {}, None, install.Tool(python="/d")),
        ({"pythons": (BARE,), "uv": "/u"}, {}, None, install.Tool(uv="/u", python="/e")),
        (
            {"pythons": (BARE,)},
            {"uv": Path("/b")},
            None,
            install.Tool(bring_uv=True, python="/e"),
        ),
        (SERVICE | {"pythons": (ROOTS,), "uv": "/u"}, {}, None, UV),
        (SERVICE | {"pythons": (ROOTS,), "systemd": False}, {}, None, by_python(ROOTS)),
        (
            {"pythons": (Python("/p", "3.10.1"),), "index": "yes"},
            {},
            None,
            install.Tool(bring_uv=True, old_python="/p", python="3.11"),
        ),
        (  # the head's own uv does not run there
            {"pythons": (Python("/p", "3.10.1"),), "index": "yes", "libc": "musl libc (x86_64)"},
            {"uv": Path("/b")},
            None,
            install.Tool(bring_uv=True, old_python="/p", python="3.11"),
        ),
        (
            {"pythons": (Python("/p", "3.12.1"),), "machine": "aarch64", "uv": "/u"},
            {"uv": Path("/b")},
            "3.11.7",
            install.Tool(uv="/u", python="3.11.7"),
        ),
    ],
)
def test_the_tool(changes: dict, sent: dict, wanted: str | None, tool: install.Tool) -> None:  # type: ignore[type-arg]
    assert install.choose(replace(SEEN, **changes), replace(SENT, **sent), True, wanted) == tool


@pytest.mark.parametrize(
    ("changes", "wanted", "said"),
    [
        ({"pythons": ()}, None, "no Python 3.11 or newer (it has none)"),
        ({"pythons": (Python("/p", "3.10.1"),)}, None, "(it has 3.10.1)"),
        ({}, "3.11.7", "no Python 3.11.7 (it has 3.11.2)"),
        ({"pythons": (), "machine": "aarch64"}, None, "no uv"),
        ({"pythons": (), "libc": "musl libc"}, None, "no uv"),
        ({"pythons": (OLD, BARE)}, None, "/e there is without its standard library"),
        (SERVICE | {"pythons": (OLD, ROOTS)}, None, "cannot run /root/conda/bin/python3, which is"),
    ],
)
def test_no_tool(changes: dict, wanted: str | None, said: str) -> None:  # type: ignore[type-arg]
    sent = replace(SENT, uv=Path("/uv")) if {"machine", "libc"} & changes.keys() else SENT
    with pytest.raises(ProblemError) as told:
        install.choose(replace(SEEN, **changes), sent, True, wanted)
    assert told.value.problem.code is codes.ADD_NO_PYTHON
    assert said in told.value.problem.cause


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"machine": "aarch64"}, "its processor is aarch64"),
        ({"libc": "musl libc"}, "its C library is musl libc"),
        ({"pythons": (Python("/p", "3.12.1"),)}, "its Python is 3.12"),
    ],
)
def test_whether_our_own_packages_fit(changes: dict, why: str) -> None:  # type: ignore[type-arg]
    seen = replace(SEEN, **changes)
    found = install.fits(seen, SENT, install.choose(seen, SENT, True, None))
    assert found.startswith(why) if why else not found


@pytest.mark.parametrize(
    ("tool", "said", "code", "remedy"),
    [
        (UV, "error: No interpreter found for Python 3.11 in managed", NO_PYTHON, "UV_PYTHON_"),
        (
            UV,
            "Failed to install cpython-3.11.14-linux-x86_64-gnu",
            NO_PYTHON,
            "install Python 3.11",
        ),
        (
            UV,
            "error: uv venv: Failed to fetch https://x.org/simple",
            NO_PACKAGES,
            "correct this on",
        ),
        (PIP, "No module named ensurepip", NO_PACKAGES, "python3-venv"),
        (PIP, "mkdir: /home/ray: Read-only file system", codes.ADD_BLOCKED, "--prefix"),
        (UV, "failed to write: No space left on device (os error 28)", codes.ADD_BLOCKED, "room"),
        (PIP, "No matching distribution found for pydantic", NO_PACKAGES, "correct this on"),
    ],
)
def test_what_is_said_of_an_installation_that_failed(
    tmp_path: Path, tool: install.Tool, said: str, code: Code, remedy: str
) -> None:
    machine = cast("Machine", SimpleNamespace(host=Host(ssh="ray@gpu-1")))
    problem = install._no_packages(machine, SEEN, tool, said, "").problem
    assert problem.code is code
    assert said in problem.cause
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        ({"machine": "aarch64"}, "its processor is aarch64, but the head's is x86_64", ""),
        ({"libc": "musl libc (x86_64)"}, "its C library is musl libc (x86_64), but the", ""),
        (
            {"pythons": (Python("/p", "3.12.1"),)},
            "its Python is 3.12, but the head's rayfwd has 3.11",
            ", or install the Python of the head's rayfwd there (3.11 at least): then everything "
            "goes over SSH",
        ),
    ],
)
def test_what_to_do_where_neither_the_heads_packages_nor_an_index_are_of_use(
    changes: dict[str, Any], cause: str, remedy: str
) -> None:
    """Another Python is of use only where that is all that differs."""
    seen = replace(SEEN, **changes)
    tool = install.choose(seen, SENT, True, None)
    machine = cast("Machine", SimpleNamespace(host=Host(ssh="ray@gpu-1")))
    why = install.fits(seen, SENT, tool)
    problem = install._no_packages(machine, seen, tool, "no index", why).problem
    assert problem.code is codes.ADD_NO_PACKAGES
    assert cause in problem.cause
    assert problem.remedy == f"{LET_IT_REACH_AN_INDEX}{remedy}"


LET_IT_REACH_AN_INDEX = "let that machine reach a package index (pip's index-url there)"


@pytest.mark.parametrize(
    ("host", "rays", "more", "blocked"),
    [
        (Host(ssh="a"), (), {}, True),
        (Host(ssh="a", ray=True), ("/ray",), {}, True),
        (Host(ssh="a"), ("/ray",), {}, False),
        (Host(ssh="a"), (), {"ray": {"start": False}}, False),
    ],
)
def test_a_c_library_for_which_there_is_no_ray(
    host: Host, rays: tuple[str, ...], more: dict[str, object], blocked: bool
) -> None:
    """Before anything is installed. What is there may be made by its owner."""
    shared = cast("adding.Adding", SimpleNamespace(head=None))
    one = adding._One(shared, replace(host, more=more), Outcome("a"))
    one._check_ray_can_be_there(replace(SEEN, rays=rays))
    seen = replace(SEEN, libc="musl libc (x86_64)", rays=rays)
    if not blocked:
        one._check_ray_can_be_there(seen)
        return
    with pytest.raises(ProblemError) as told:
        one._check_ray_can_be_there(seen)
    assert "musl libc (x86_64) as its C library" in told.value.problem.cause


def test_another_ray_than_the_heads_is_refused() -> None:
    head = Versions("2.60.0", "3.11.7")
    adding.check_same(Versions("2.60.0", "3.11.7"), head, "w1: ", "")
    for other, code in (
        (Versions("2.59.0", "3.11.7"), codes.RAY_VERSION_DIFFERS),
        (Versions("2.60.0", "3.11.2"), codes.PYTHON_VERSION_DIFFERS),
    ):
        with pytest.raises(ProblemError) as told:
            adding.check_same(other, head, "w1: ", "say --ray")
        assert told.value.problem.code is code


# -- what is sent ---------------------------------------------------------------------------------


def test_the_wheel_of_the_rayfwd_that_runs(tmp_path: Path) -> None:
    """Whole, by its own record, and the same again."""
    (tmp_path / "again").mkdir()
    path = shipment.own_wheel(tmp_path)
    assert path.read_bytes() == shipment.own_wheel(tmp_path / "again").read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        info = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
        rows = list(csv.reader(archive.read(f"{info}/RECORD").decode().splitlines()))
        for name, digest, size in rows[:-1]:
            data = archive.read(name)
            found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={found}", len(data))
    assert sorted(names) == sorted(row[0] for row in rows)
    for wanted in ("cli/add.py", "setup/units/rayfwd.service", "conditions.md", "py.typed"):
        assert f"rayfwd/{wanted}" in names
    assert f"{info}/entry_points.txt" in names
    assert any(name.endswith(".data/data/share/man/man1/rayfwd.1") for name in names)


def test_what_rayfwd_needs_and_what_that_needs() -> None:
    found = {wheels.name_of(d.metadata["Name"]) for d in wheels.closure(["rayfwd"])}
    assert {"asyncssh", "cryptography", "cffi", "pydantic", "pydantic-core", "rich"} <= found
    assert "pytest" not in found, "of the extra dev"
    assert "pytest" in {d.metadata["Name"] for d in wheels.closure(["rayfwd"], ["dev"])}
    with pytest.raises(wheels.WheelError):
        wheels.closure(["there-is-no-such"])


def test_a_wheel_says_for_which_pythons_it_is(tmp_path: Path) -> None:
    own = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    made = wheels.make(metadata.distribution("pydantic-core"), tmp_path)
    assert f"-{own}-{own}-" in made.name
    assert made.name.endswith(".whl")
    made = wheels.make(metadata.distribution("structlog"), tmp_path)
    assert made.name.endswith("-py3-none-any.whl")
    with pytest.raises(wheels.WheelError, match="not installed from a wheel"):
        wheels.make(metadata.Distribution.at(tmp_path / "x-1.dist-info"), tmp_path)


def test_a_program_in_a_wheel_can_be_run_where_it_is_installed(tmp_path: Path) -> None:
    """As Ray's raylet, without which no Ray starts."""
    about = {"METADATA": b"Metadata-Version: 2.1\nName: x\nVersion: 1\n"}
    about["WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {f"x-1.dist-info/{name}": text for name, text in about.items()}
    members |= {"x/run": b"#!/bin/sh\n", "x/__init__.py": b""}
    made = wheels.write(tmp_path, "x", "1", "x-1.dist-info", "py3-none-any", members, {"x/run"})
    for place in ("first", "second"):  # from the wheel, and from a wheel of what that installed
        folder = tmp_path / place
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--target"]
        subprocess.run([*pip, str(folder), str(made)], check=True, timeout=50)
        assert os.access(folder / "x" / "run", os.X_OK)
        assert not os.access(folder / "x" / "__init__.py", os.X_OK)
        made.unlink()
        made = wheels.make(metadata.Distribution.at(folder / "x-1.dist-info"), tmp_path)


# -- keys -----------------------------------------------------------------------------------------


def public() -> str:
    return asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()


def test_a_line_of_ours_among_others(tmp_path: Path) -> None:
    path = tmp_path / ".ssh" / "authorized_keys"
    assert not keys.take_back(tmp_path, "w1")
    first, second = (keys.forced_line(["a b", "--node", "w1"], public(), "w1") for _ in "ab")
    assert first.startswith("restrict,command=\"'a b' --node w1\" ssh-ed25519 ")
    assert keys.authorize(tmp_path, first, "w1")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.write_bytes(b"# caf\xe9 rayfwd-add w10\nssh-ed25519 AAAA w1\n" + path.read_bytes())
    assert not keys.authorize(tmp_path, first, "w1")
    assert keys.authorize(tmp_path, second, "w1")
    assert path.read_text(errors="replace").count("rayfwd-add w1\n") == 1
    assert keys.take_back(tmp_path, "w1")
    assert path.read_bytes() == b"# caf\xe9 rayfwd-add w10\nssh-ed25519 AAAA w1\n"


@pytest.mark.parametrize(
    "told", ["", "no key", 'command="x" ssh-ed25519 AAAA', "ssh-ed25519 AAAA\nssh-rsa BBBB"]
)
def test_what_a_machine_tells_is_a_key_or_nothing(told: str) -> None:
    with pytest.raises((ValueError, asyncssh.Error)):
        keys.public_part(told)


def test_of_a_key_only_the_key_is_taken() -> None:
    key = public()
    assert keys.public_part(f"{key} a comment") == key


# -- over SSH -------------------------------------------------------------------------------------


class Remote:
    """An SSH server that runs commands, with a noisy login shell."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        key = asyncssh.generate_private_key("ssh-ed25519")
        self.host_key = asyncssh.generate_private_key("ssh-ed25519")
        self.user_key = key.convert_to_public()
        key.write_private_key(folder / "id")
        self.host = Host(ssh="", identity=folder / "id", known_hosts=folder / "known_hosts")

    def know(self, key: asyncssh.SSHKey | None = None) -> None:
        _, _, port = self.host.way().ssh_target()
        line = (key or self.host_key).export_public_key().decode()
        assert self.host.known_hosts is not None
        self.host.known_hosts.write_text(f"[127.0.0.1]:{port} {line}")


async def passed_on(reader: asyncio.StreamReader, writer: asyncssh.SSHWriter[bytes]) -> None:
    """What a command prints, as it comes, as long as somebody wants it."""
    while data := await reader.read(1 << 16):
        with suppress(OSError):
            writer.write(data)


@asynccontextmanager
async def remote(
    folder: Path, shell: str = "echo Welcome; ", login: str = "/bin/sh"
) -> AsyncIterator[Remote]:
    """`shell`: what it does before a command; empty: no session is ever opened. `login`: which
    shell it is."""
    it = Remote(folder)

    class Server(asyncssh.SSHServer):
        def public_key_auth_supported(self) -> bool:
            return True

        def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
            return key == it.user_key

    class Silent(Server):
        async def session_requested(self) -> bool:
            await over.wait()
            return False

    over = asyncio.Event()
    children: dict[Process, asyncio.Task[None]] = {}

    async def serve(process: asyncssh.SSHServerProcess[bytes]) -> None:
        child = await asyncio.create_subprocess_exec(
            *(login, "-c", f"{shell}{process.command}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                "HOME": str(it.home),
                "PATH": os.environ["PATH"],
                "PIP_INDEX_URL": "file:///",  # no network is asked
            },
            start_new_session=True,
        )
        if (serving := asyncio.current_task()) is not None:
            children[child] = serving
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        told = asyncio.create_task(passed_on(child.stderr, process.stderr))
        with suppress(OSError):  # a command that does not read its input to the end
            child.stdin.write(await process.stdin.read())
            await child.stdin.drain()
        child.stdin.close()
        await passed_on(child.stdout, process.stdout)
        await told
        await child.wait()
        process.exit(child.returncode or 0)

    acceptor = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=Server if shell else Silent,
        server_host_keys=[it.host_key],
        process_factory=serve if shell else None,
        encoding=None,
    )
    it.host = replace(it.host, ssh=f"ray@127.0.0.1:{acceptor.get_port()}")
    it.know()
    try:
        yield it
    finally:
        over.set()
        for child, serving in children.items():
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
            await asyncio.wait([serving])
        acceptor.close()
        await acceptor.wait_closed()


def test_a_machine_runs_what_it_is_told_and_its_shells_words_are_passed_over(
    tmp_path: Path,
) -> None:
    async def main_() -> None:
        async with remote(tmp_path) as it:
            machine = await Machine.connect(it.host)
            try:
                assert await machine.sh("cat; echo '$x'", b"in\n") == b"in\n$x\n"
                with pytest.raises(Failed, match="not this"):
                    await machine.sh("echo 'not this' >&2; exit 3")
                with pytest.raises(Failed, match="not done in"):
                    await machine.sh("exec sleep 60", seconds=2.0)
                (tmp_path / "a.whl").write_bytes(b"\0" * 70000)
                for python in (sys.executable, None):
                    folder = f"{it.home}/in coming"
                    await machine.send([tmp_path / "a.whl"], folder, python)
                    assert (it.home / "in coming" / "a.whl").stat().st_size == 70000
                asked = {"rays": [], "ways": [{"ssh": it.host.ssh, "key": "other"}]}
                found = await machine.call(sys.executable, there.look, asked)
                assert found["ray"] is None
                assert found["ways"] == [f"{it.host.ssh}: another machine answers there"]
                with pytest.raises(ProblemError) as told:
                    await machine.call("/bin/false", there.look, {})
                assert told.value.problem.code is codes.RAYFWD_NOT_EXECUTABLE
            finally:
                machine.close()

    run(main_)


async def failed(host: Host, at: str) -> Problem:
    """Why a head without Ray cannot add that machine, by the step at which it is told."""
    shared = SimpleNamespace(head=SimpleNamespace(ray=None), report=lambda *_: None)
    outcome = Outcome(host.ssh)
    await adding.add(cast("adding.Adding", shared), host, outcome)
    assert outcome.at == at
    assert outcome.problem is not None
    return outcome.problem.problem


@pytest.mark.parametrize(
    ("shell", "login", "cause", "remedy"),
    [
        ("exit", "/usr/sbin/nologin", "runs no command; it says: This account is currently not av",
         "`usermod --shell /bin/sh`"),
        ("echo Backups only.; exit; ", "/bin/sh", "runs no command; it says: Backups only.",
         "`command=` in its line of authorized_keys, ForceCommand"),
        ("dd bs=40 count=1 of=/dev/null 2>/dev/null; ", "/bin/sh",
         "cannot be examined: something in its login shell files reads", "/dev/null"),
    ],
)  # fmt: skip
def test_a_login_that_runs_no_command_is_said_to_and_why(
    tmp_path: Path, shell: str, login: str, cause: str, remedy: str
) -> None:
    async def main_() -> None:
        async with remote(tmp_path, shell, login) as it:
            problem = await failed(it.host, "look")
            assert problem.code is codes.ADD_FAILED
            assert cause in problem.cause
            assert remedy in problem.remedy

    run(main_)


def test_nothing_that_unpacks_is_named(tmp_path: Path) -> None:
    """Python does where there is no tar."""
    (tmp_path / "a.whl").write_bytes(b"\0" * 70000)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dd", "rm", "mkdir"):
        (tools / name).symlink_to(shutil.which(name) or "")

    async def main_() -> None:
        async with remote(tmp_path, f"PATH={tools}; ") as it:
            machine = await Machine.connect(it.host)
            folder = it.home / "incoming"
            try:
                await machine.send([tmp_path / "a.whl"], str(folder), sys.executable)
                assert (folder / "a.whl").stat().st_size == 70000
                with pytest.raises(Failed, match="it has neither tar nor a Python that unpacks"):
                    await machine.send([tmp_path / "a.whl"], str(folder), None)
                assert not folder.exists()
            finally:
                machine.close()

    run(main_)


SHELLS = [s for s in ("bash", "dash", "zsh", "fish", "tcsh", "csh", "ksh") if shutil.which(s)]


@pytest.mark.parametrize("login", [*SHELLS, pytest.param("busybox", id="ash")])
def test_any_login_shell_passes_a_script_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    """Also one that knows no newline between quotes, takes a backslash for another, or expands an
    exclamation mark. What the script reads comes behind it."""
    shell = tmp_path / "shell"
    shell.write_text(f'#!/bin/sh\nexec {login} {"sh " * (login == "busybox")}"$@"\n')
    shell.chmod(0o755)
    data = bytes(range(256)) * 300

    async def main_() -> None:
        async with remote(tmp_path, "echo Welcome; ", str(shell)) as it:
            machine = await Machine.connect(it.host)
            try:
                script = r"""printf '%s\n' 'a\'\''!b\\' "$HOME"; cat"""
                said = await machine.sh(script, data)
                assert said == (r"a\'!b\\" + f"\n{it.home}\n").encode() + data
                with pytest.raises(Failed, match="not this"):
                    await machine.sh("echo 'not this' >&2; exit 3", data)
            finally:
                machine.close()

    run(main_)


def test_half_a_script_is_not_run(tmp_path: Path) -> None:
    """Where something in the login shell's files reads its input."""

    async def main_() -> None:
        async with remote(tmp_path, "dd bs=40 count=1 of=/dev/null 2>/dev/null; ") as it:
            machine = await Machine.connect(it.host)
            try:
                with pytest.raises(Failed, match="login shell files reads their standard input"):
                    await machine.sh(f"touch {it.home}/a\ntouch {it.home}/b\ntouch {it.home}/c")
            finally:
                machine.close()
            assert not list(it.home.iterdir())

    run(main_)


SLOW_DISK = """#!/bin/sh
exec sleep 60
"""


@pytest.mark.parametrize(
    ("shell", "seconds", "cause", "remedy"),
    [
        ("", 0.2, "its sshd opened no session in 0 s", "if that hangs too, restart sshd"),
        ("sleep 60; ", 0.2, "its login shell ran no command in 0 s", "(~/.profile, ~/.bashrc)"),
        (
            'PATH="{}:$PATH"; ',
            4.0,
            "a command was not done in 4 s: it hangs at the disk that has /",
            "log in",
        ),
    ],
)
def test_a_machine_that_hangs_after_its_login_is_said_to_and_how_far_it_came(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shell: str,
    seconds: float,
    cause: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(adding, "LOOK_SECONDS", seconds)
    if not shell:  # of the others, a session is opened however busy this machine is
        monkeypatch.setattr(ssh, "SESSION_SECONDS", seconds)
    (tmp_path / "df").write_text(SLOW_DISK)
    (tmp_path / "df").chmod(0o755)

    async def main_() -> None:
        async with remote(tmp_path, shell.format(tmp_path)) as it:
            problem = await failed(it.host, "look")
            assert problem.code is codes.ADD_FAILED
            assert problem.cause.startswith(f"{it.host.ssh} accepts the login, but {cause}")
            assert remedy in problem.remedy
            _, _, port = it.host.way().ssh_target()
            assert f"`ssh -i {it.host.identity} -p {port} ray@127.0.0.1" in problem.remedy

    run(main_)


@pytest.mark.parametrize(
    "answer",
    ["{}", "[]", "7", "null", '{"ray": null, "ways": []}', '{"ray": 1, "versions": 2, "ways": 3}'],
)
def test_an_answer_that_makes_no_sense_is_that_machines_alone(tmp_path: Path, answer: str) -> None:
    """It was added once, and somebody else has it now. The other machines go on."""
    there_ = tmp_path / "there"
    (there_ / "bin").mkdir(parents=True)
    (there_ / sight.MARKER).write_text('{"wheel": "w", "name": "gpu-1"}')
    python = there_ / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho '{{\"result\": {answer}}}'\n")
    python.chmod(0o755)

    async def nothing(*_: object) -> list[Any]:
        return []

    head = SimpleNamespace(
        ray=None,
        config=SimpleNamespace(name="head"),
        added=dict,
        remember=lambda *_: None,
        is_up=nothing,
        ways=nothing,
    )
    shared = SimpleNamespace(
        head=head, shipment=SimpleNamespace(digest="w"), names={}, report=lambda *_: None
    )

    async def main_() -> None:
        async with remote(tmp_path) as it:
            outcome = Outcome(it.host.ssh)
            host = replace(it.host, name="gpu-1", prefix=str(there_))
            await adding.add(cast("adding.Adding", shared), host, outcome)
            assert outcome.problem is not None
            problem = outcome.problem.problem
            assert problem.code in {codes.ADD_FAILED, codes.RAY_NOT_FOUND}
            if problem.code is codes.ADD_FAILED:
                assert "gives an answer that makes no sense" in problem.cause

    run(main_)


def test_where_a_machine_says_that_it_is_reached_from_is_an_address_or_nothing() -> None:
    head = here.Head(cast("Any", SimpleNamespace()), Path("/nowhere"))
    assert head._candidates("192.0.2.1")[0].endswith("@192.0.2.1")
    for told in ("", "a b", "-oProxyCommand=x", "evil.example.org", "192.0.2.1/24", "::1"):
        assert not any(told and told in place for place in head._candidates(told))


def test_a_call_that_hangs_is_no_broken_installation(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(SLOW_DISK)
    python.chmod(0o755)

    async def main_() -> None:
        async with remote(tmp_path) as it:
            machine = await Machine.connect(it.host)
            try:
                with pytest.raises(ProblemError) as told:
                    await machine.call(str(python), there.look, {}, seconds=2.0)
            finally:
                machine.close()
            assert told.value.problem.code is codes.ADD_FAILED
            assert (
                told.value.problem.cause
                == f"{it.host.ssh}: {python} there: a command was not done in 2 s"
            )

    run(main_)


@pytest.mark.parametrize(
    ("shell", "prints"),
    [
        ("yes Welcome; ", "Welcome"),
        ("yes Welcome >&2; ", "Welcome"),
        ('PATH="{}:$PATH"; ', "more and more"),
    ],
)
def test_a_machine_that_prints_for_ever_is_ended_and_named(
    tmp_path: Path, shell: str, prints: str
) -> None:
    """Its login shell, by either of its streams, or a program there. Without an end to what is
    kept, the head would collect for a minute and a half what a machine sends at full speed."""
    (tmp_path / "uname").write_text("#!/bin/sh\nexec yes 'more and more' >&2\n")
    (tmp_path / "uname").chmod(0o755)

    async def main_() -> None:
        tracemalloc.start()
        try:
            async with remote(tmp_path, shell.format(tmp_path)) as it:
                problem = await failed(it.host, "look")
                _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert problem.code is codes.ADD_FAILED
        printed = "cannot be examined: a command printed more than 4 MiB and was ended"
        assert f"{it.host.ssh} {printed}; its output ends with: {prints}" in problem.cause
        assert "(~/.profile, ~/.bashrc)" in problem.remedy
        assert most < 64 << 20

    run(main_)


def test_a_server_that_accepts_and_says_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "LOGIN_TIMEOUT", 0.3)

    async def main_() -> None:
        accepted: list[asyncio.StreamWriter] = []
        server = await asyncio.start_server(lambda _, it: accepted.append(it), "127.0.0.1", 0)
        ssh_ = f"ray@127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            problem = await failed(Host(ssh=ssh_), "log in")
        finally:
            server.close()
            for writer in accepted:
                writer.close()
        assert problem.code is codes.SSH_UNREACHABLE
        assert problem.cause.startswith(ssh_)
        assert "accepts the connection" in problem.cause
        assert "the head" not in str(problem)

    run(main_)


@pytest.mark.parametrize("listens", [True, False])
def test_a_daemon_that_hangs_there_is_named_with_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    monkeypatch.setattr(there, "HANGS_SECONDS", 0.2)
    path = tmp_path / "control.sock"
    config, command = tmp_path / "rayfwd.toml", str(tmp_path / "rayfwd")
    layout = cast("Layout", SimpleNamespace(runtime=tmp_path, config=config, command=command))
    assert there._pid(layout) is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hanging:
        hanging.bind(str(path))
        if not listens:
            assert there._pid(layout) is None, "of one that has ended"
            return
        hanging.listen(8)
        with pytest.raises(ProblemError) as told:
            there._pid(layout)
    assert told.value.problem.code is codes.ADD_BLOCKED
    assert f"its rayfwd (process {os.getpid()}) hangs" in told.value.problem.cause
    assert f"`kill -9 {os.getpid()}`" in told.value.problem.remedy


def places_below(home: Path) -> Layout:
    """Of a user with that home, whose rayfwd runs in the background."""
    layout = user_layout(home, os.getuid(), str(home / "rayfwd"), sys.executable, None)
    return replace(layout, runtime=layout.state / "run")


def placed_below(home: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """The same, and that is what is found."""
    layout, account = places_below(home), replace(own_account(), home=home)
    monkeypatch.setattr(there, "own_account", lambda: account)
    monkeypatch.setattr(there, "layout_of", lambda service, apart=False: layout)
    monkeypatch.setattr(there, "_link", list)
    return layout


def prepared(ray: str = "ray", **more: object) -> Prepared:
    """As the head has it made, by JSON both ways."""
    request = NodeRequest(
        name="w1",
        ray=ray,
        service=False,
        head="ray@192.0.2.1",
        host_key="192.0.2.1 ssh-ed25519 AAAA\n",
        attach="rayfwd",
        more=more,
    )
    asked = json.loads(json.dumps(fields_to_wire(request)))
    told = json.loads(json.dumps(there.prepare(asked)))
    return fields_from_wire(Prepared, told, "prepared")


def test_a_machine_that_has_lost_its_state_directory_is_added_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file says whose it is. It gets a new key, for the head's line; what was edited stays."""
    layout = placed_below(tmp_path, monkeypatch)
    first, text = prepared(), layout.config.read_text()
    for edited in ("", "# mine\n"):
        shutil.rmtree(layout.state)
        layout.config.write_text(text + edited)
        again = prepared()
        assert again.key not in {None, first.key}
        assert again.kept == (str(layout.config),) * bool(edited)
        assert layout.config.read_text() == text + edited
        assert prepared().changed == ()
        made = Manifest(layout.manifest).of(str(layout.config))
        assert made is not None
        assert undo(made, purge=True, really=False) == "removed", "by `rayfwd remove`"

    layout.config.write_text(text.replace("w1", "w2"))
    shutil.rmtree(layout.state)
    with pytest.raises(ProblemError, match="this machine is w2 already, and would be w1"):
        prepared()
    layout.config.write_text('name = "w1"\nrole = "worker"\n')
    with pytest.raises(ProblemError, match="`rayfwd add` did not make it"):
        prepared()


@pytest.mark.parametrize(
    ("status", "words", "said"),
    [
        ("worker-ready", ["join", "ray@head"], "`rayfwd join` runs on this machine as the same"),
        ("head-ready", ["head"], "`rayfwd head` runs on this machine as the same user: "),
        ("worker-ready", ["run", "--config", "join.toml"], ""),
    ],
)
def test_a_node_that_has_no_file_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, words: list[str], said: str
) -> None:
    """It has the directories that ours would have: it was ended, and ours started in its place.
    Also the head itself, where its own machine is added."""
    layout = placed_below(tmp_path, monkeypatch)
    argv = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        told = json.loads((FIXTURES / f"{status}.json").read_text())["status"]
        monkeypatch.setattr(there, "ask", lambda *_, **__: told | {"pid": other.pid})
        try:
            if not said:
                assert prepared().changed
                return
            with pytest.raises(ProblemError, match=said) as blocked:
                prepared()
            assert f"`kill {other.pid}`" in blocked.value.problem.remedy
            assert not layout.config.exists()
            with pytest.raises(ProblemError, match=said):
                there.take_away(False, "head-of-w1")
            assert other.poll() is None
        finally:
            other.kill()


def test_machines_are_remembered_in_a_form_that_an_older_remove_reads(tmp_path: Path) -> None:
    """It takes a key that is there for one that says something."""
    config = cast("Any", SimpleNamespace(state_dir=tmp_path, name="h"))
    head = here.Head(config, tmp_path / "control.sock")
    assert head.added() == {}
    first = here.Added("ray@gpu-1", "worker", "/p", service=True, identity="/id", own_program=True)
    second = here.Added("ray@gpu-2", prefix="/p")
    head.remember("w1", first)
    head.remember("w2", second)
    assert json.loads((tmp_path / here.RECORD).read_text()) == {
        "w1": {
            "ssh": "ray@gpu-1",
            "way": "worker",
            "prefix": "/p",
            "service": True,
            "own_program": True,
            "identity": "/id",
        },
        "w2": {"ssh": "ray@gpu-2", "prefix": "/p", "service": False},
    }
    assert head.added() == {"w1": first, "w2": second}
    head.remember("w1", None)
    assert head.added() == {"w2": second}
    (tmp_path / here.RECORD).write_text('{"w2": "ray@gpu-2"}')
    with pytest.raises(ProblemError, match="remove it, then add its machines again"):
        head.added()


def test_a_machine_that_is_off_may_be_gone(tmp_path: Path) -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        ssh_ = f"ray@127.0.0.1:{nobody_listens.getsockname()[1]}"
        head = cast("here.Head", SimpleNamespace(added=lambda: {"w1": here.Added(ssh_)}))
        outcome = Outcome(ssh_)
        run(lambda: removing.remove(head, ssh_, False, lambda *_: None, outcome))
    assert outcome.problem is not None
    problem = outcome.problem.problem
    assert problem.code is codes.SSH_UNREACHABLE
    assert problem.remedy.endswith("run `rayfwd remove --gone w1`")


def test_a_daemon_whose_socket_has_gone_with_its_state_directory_is_found(tmp_path: Path) -> None:
    layout = places_below(tmp_path)
    Path(layout.command).write_text("import time\nprint(flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, *there._daemon_words(layout)], stdout=subprocess.PIPE
    ) as daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        assert there._pid(layout) == daemon.pid
        assert there._pid(places_below(tmp_path / "other")) is None
        daemon.kill()


@pytest.mark.parametrize(
    ("named", "up", "blocked"),
    [
        (None, False, "if this machine takes the place of the other one, which is gone, use --na"),
        ("w1", True, "choose another name with --name, or run `rayfwd remove` for the other mach"),
        ("w1", False, ""),
    ],
)
def test_a_machine_at_another_address_takes_the_place_of_one_that_has_gone(
    named: str | None, up: bool, blocked: str
) -> None:
    """Where that is what was said, and never while the other one is there."""

    class Head:
        async def is_up(self, name: str) -> bool:
            return up

    said: list[str] = []
    shared = SimpleNamespace(head=Head(), report=lambda _host, _at, came: said.append(came))
    host = Host(ssh="root@203.0.113.8:41022", name=named)
    one = adding._One(cast("adding.Adding", shared), host, Outcome("w1"))
    known = {"w1": here.Added("root@203.0.113.7:41022")}

    async def main_() -> None:
        if not blocked:
            await one._check_nobody_has("w1", known, SEEN)
            return
        with pytest.raises(ProblemError) as told:
            await one._check_nobody_has("w1", known, SEEN)
        assert told.value.problem.code is codes.ADD_BLOCKED
        assert blocked in told.value.problem.remedy

    run(main_)
    assert said == ["takes the place of root@203.0.113.7:41022, which is not connected"] * (
        not blocked
    )


def test_a_machine_that_was_added_by_another_way_is_known_again() -> None:
    """By its alias, say: it would get the host name, or be taken for another machine."""
    known = {"w1": here.Added("root@203.0.113.7:41022")}
    seen = replace(SEEN, host="gpu-1", made={"wheel": "x", "name": "w1"})
    head = SimpleNamespace(added=lambda: known, config=SimpleNamespace(name="head"))
    shared = SimpleNamespace(head=head, names={}, looks={})
    one = adding._One(cast("adding.Adding", shared), Host(ssh="root@rented"), Outcome("rented"))
    with pytest.raises(ProblemError) as told:
        asyncio.run(one._name(seen))
    problem = told.value.problem
    assert problem.code is codes.ADD_BLOCKED
    assert problem.cause == "root@rented is the node w1 already, which was added as " + (
        "root@203.0.113.7:41022"
    )
    assert "run `rayfwd add root@203.0.113.7:41022` for it" in problem.remedy
    assert "use --name w1" in problem.remedy


@pytest.mark.parametrize(("host", "up", "apart"), [
    ("gpu-1", True, False), ("gpu-2", False, False), ("gpu-2", True, True),
])  # fmt: skip
def test_a_machine_with_the_home_of_another_one_is_not_taken_for_it(
    host: str, up: bool, apart: bool
) -> None:
    """As in a laboratory, where homes are on NFS. A machine that was made anew may have another
    host name, too, but then the one before is not there."""

    class Head:
        config = SimpleNamespace(name="head")

        def added(self) -> dict[str, here.Added]:
            return {"gpu-2": here.Added("ray@gpu-2")}

        async def is_up(self, name: str) -> bool:
            return up

        async def names_up(self) -> set[str]:
            return {"gpu-2"} if up else set()

    class There:
        async def call(self, *_: object) -> dict[str, Any]:
            return {"apart": False, "name": None}

    seen = replace(SEEN, host="gpu-1", made={"wheel": "x", "name": "gpu-2", "host": host})
    shared_ = SimpleNamespace(head=Head(), names={}, looks={})
    one = adding._One(cast("adding.Adding", shared_), Host(ssh="ray@gpu-1"), Outcome("gpu-1"))
    found = asyncio.run(one._apart(cast("Machine", There()), seen))
    assert (found.made == {"wheel": "x"}) == apart
    if apart:
        assert asyncio.run(one._name(found)) == "gpu-1"
        return
    with pytest.raises(ProblemError, match="is the node gpu-2 already"):
        asyncio.run(one._name(found))


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProblemError) as told:
        there._opened(tmp_path / "file" / "rayfwd.log")
    assert told.value.problem.code is codes.DIRECTORY_UNUSABLE
    assert "rayfwd.log cannot be written: File exists" in told.value.problem.cause


FAKE_UV = """#!/bin/sh
[ "$1" = venv ] || exit 0
for target in "$@"; do :; done
[ -z "$UV_PYTHON_INSTALL_DIR" ] || mkdir "$UV_PYTHON_INSTALL_DIR"
mkdir -p "$target/bin"
touch "$target/bin/python"
chmod 755 "$target/bin/python"
"""


class Here:
    """This machine in the place of one over SSH."""

    def __init__(self) -> None:
        self.sent: list[Path] = []

    async def send(self, files: list[Path], folder: str, python: str | None) -> None:
        self.sent.append(Path(folder))
        self.sent[-1].mkdir()

    async def sh(self, script: str, data: bytes = b"", seconds: float = 0.0) -> bytes:
        child = await asyncio.create_subprocess_exec("sh", "-c", script)
        assert await child.wait() == 0
        return b""


FLOCK = """#!/bin/sh
echo tried >>{tried}
exec {real} "$@"
"""


def test_an_installation_waits_for_one_that_an_interrupted_add_has_left_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are its own, and those of one that ended long ago are taken away."""
    target, uv = tmp_path / "a place", tmp_path / "uv"
    old, young = (Path(f"{target}.incoming.{age}") for age in ("old", "young"))
    for path in (old, young):
        path.mkdir()
    os.utime(old, (0, 0))
    uv.write_text(FAKE_UV)
    uv.chmod(0o755)
    made = {"wheel": "x", "name": "w1"}
    tried, flock = tmp_path / "tried", tmp_path / "bin" / "flock"
    flock.parent.mkdir()
    flock.write_text(FLOCK.format(tried=tried, real=shutil.which("flock")))
    flock.chmod(0o755)
    monkeypatch.setenv("PATH", f"{flock.parent}:{os.environ['PATH']}")
    here = Here()
    machine = cast("Machine", here)

    lock = Path(f"{target}.lock").open("w")  # noqa: SIM115  # let go of midway

    async def main_() -> None:
        tool = install.Tool(uv=str(uv), python="3.11")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            order = install.Order(str(target), [], "true", made, same=made)
            work = install._install(machine, order, tool)
            installing = asyncio.create_task(work)
            await until(lambda: tried.exists() and tried.read_text().count("tried") > 1)
            assert not target.exists()
        await installing
        assert json.loads((target / sight.MARKER).read_text()) == made
        # Another machine with the same home, which waited, finds that it is done.
        python = target / "bin" / "python"
        python.parent.mkdir(exist_ok=True)
        python.touch(mode=0o755)
        theirs, same = {**made, "name": "w2"}, {"wheel": "x"}
        order = install.Order(str(target), [], "false", theirs, same)
        await install._install(machine, order, tool)
        assert json.loads((target / sight.MARKER).read_text()) == made
        assert list(tmp_path.glob("a place.incoming.*")) == [young]
        seen = replace(SEEN, prefix=str(target), made=made)
        assert await install.remove(machine, seen) == [str(target)]
        assert list(tmp_path.glob("a place*")) == []

    run(main_)


def test_what_another_machine_has_just_installed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "rayfwd"
    (tmp_path / sight.MARKER).write_text('{"wheel": "x", "name": "w2"}\n')
    change = f"mkdir -p {target}/bin; touch {target}/bin/python; chmod 755 {target}/bin/python; "
    change += f"cp {tmp_path}/{sight.MARKER} {target}"
    monkeypatch.setenv("PATH", shows_to_ls(tmp_path, change))
    order = install.Order(str(target), [], "false", {"wheel": "x", "name": "w1"}, {"wheel": "x"})
    run(lambda: install._install(cast("Machine", Here()), order, install.Tool(uv="false")))
    assert json.loads((target / sight.MARKER).read_text())["name"] == "w2"


def test_two_machines_may_remove_the_same_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that comes too late is told so by NFS, in the middle of it."""
    target, rm = tmp_path / "rayfwd", tmp_path / "tools" / "rm"
    target.mkdir()
    rm.parent.mkdir()
    stale = "rm: cannot remove 'x': Stale file handle"
    real = shutil.which("rm")
    rm.write_text(f'#!/bin/sh\n{real} $0\necho "{stale}" >&2\nexit 1\n')
    rm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{rm.parent}:{os.environ['PATH']}")
    seen = replace(SEEN, prefix=str(target), made={"wheel": "x"})

    async def main_() -> None:
        assert await install.remove(cast("Machine", Here()), seen) == [str(target)]

    run(main_)
    assert not target.exists()
    assert not rm.exists(), "the first one failed"


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    """Once there is room, the same command does it."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a disk")
    uv, own = tmp_path / "uv", tmp_path / "rayfwd-1-py3-none-any.whl"
    uv.write_text(FAKE_UV)
    uv.chmod(0o755)
    own.write_bytes(bytes(3 << 20))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "disk", str(disk)]
    subprocess.run(mount, check=True)

    async def main_() -> None:
        async with remote(tmp_path) as it:
            machine = await Machine.connect(it.host)
            seen = replace(SEEN, prefix=str(disk / "rayfwd"), uv=str(uv))
            sent = replace(SENT, own=own)
            try:
                with pytest.raises(ProblemError) as told:
                    await install.rayfwd(machine, seen, sent, "w1")
                problem = told.value.problem
                assert problem.code is codes.ADD_BLOCKED
                assert problem.cause.startswith(f"nothing can be written where {disk}/rayfwd goes")
                assert "make room there" in problem.remedy
                left = [path.name for path in disk.rglob("*") if not path.name.endswith(".lock")]
                assert left == []
                again = ["mount", "-o", "remount,size=16m", str(disk)]
                await asyncio.to_thread(subprocess.run, again, check=True)
                assert await install.rayfwd(machine, seen, sent, "w1")
            finally:
                machine.close()

    try:
        run(main_)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_what_is_broken_is_installed_anew(tmp_path: Path) -> None:
    """As where the system's Python has gone to another version, or a disk was full."""
    target, uv = tmp_path / "rayfwd", tmp_path / "uv"
    (target / "bin").mkdir(parents=True)
    (target / "bin" / "python").symlink_to(tmp_path / "python3.9")
    made = {"wheel": SENT.digest, "name": "w1"}
    (target / sight.MARKER).write_text(json.dumps(made))
    (target / "half").touch()
    uv.write_text(FAKE_UV)
    uv.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_INDEX_URL": "file:///"}
    seen = sight.read(by_shell(sight.script(str(target), []), **env))
    assert (seen.made, seen.broken) == (made, True)
    machine = cast("Machine", Here())

    async def main_() -> None:
        place = replace(seen, uv=str(uv))
        assert await install.rayfwd(machine, place, SENT, "w1")
        assert not (target / "half").exists()
        assert not await install.rayfwd(machine, replace(place, broken=False), SENT, "w1")

    run(main_)


@pytest.mark.parametrize("service", [True, False])
def test_a_python_that_uv_gets_for_a_service_is_where_its_user_reaches_it(
    tmp_path: Path, service: bool
) -> None:
    """And not in root's home; it goes with what was added."""
    target, uv = tmp_path / "rayfwd", tmp_path / "uv"
    uv.write_text(FAKE_UV)
    uv.chmod(0o755)
    seen = replace(SEEN, prefix=str(target), uv=str(uv), pythons=(), root=True, home="/root")
    seen = replace(seen, systemd=service, made={"name": "w1"}, broken=True)
    machine = cast("Machine", Here())

    async def main_() -> None:
        assert await install.rayfwd(machine, seen, SENT, "w1")
        assert Path(f"{target}.python").exists() == service
        await install.remove(machine, seen)
        assert list(tmp_path.glob("rayfwd*")) == []

    run(main_)


@pytest.mark.parametrize(
    ("link", "up_here", "blocked"),
    [("up", False, True), ("up", True, False), ("parked", False, False)],
)
def test_a_machine_in_another_heads_cluster_is_left_alone(
    tmp_path: Path, link: str, up_here: bool, blocked: bool
) -> None:
    """One whose head is gone is not."""
    told = json.loads((FIXTURES / "worker-ready.json").read_text())["status"]
    told["link"]["state"] = link

    class Head:
        async def is_up(self, name: str) -> bool:
            assert name == told["name"]
            return up_here

    async def main_() -> None:
        async with remote(tmp_path) as it:
            prefix = it.home / "rayfwd"
            (prefix / "bin").mkdir(parents=True)
            (prefix / "bin" / "rayfwd").write_text(f"#!/bin/sh\ncat {tmp_path}/status\nexit 3\n")
            (prefix / "bin" / "rayfwd").chmod(0o755)
            (tmp_path / "status").write_text(json.dumps(told))
            machine = await Machine.connect(it.host)
            seen = replace(SEEN, prefix=str(prefix), made={"wheel": "x", "name": "w1"})
            shared = cast("adding.Adding", SimpleNamespace(head=Head(), report=None))
            one = adding._One(shared, it.host, Outcome("w1"))
            try:
                with pytest.raises(ProblemError) as exc:
                    await one._check_it_is_free(machine, seen, "w2")
                assert "is 'w1' already, and would be w2" in exc.value.problem.cause
                if not blocked:
                    await one._check_it_is_free(machine, seen, "w1")
                    return
                with pytest.raises(ProblemError) as exc:
                    await one._check_it_is_free(machine, seen, "w1")
                assert exc.value.problem.code is codes.ADD_BLOCKED
                assert "in another cluster, of the head ray@" in exc.value.problem.cause
                (prefix / "bin" / "rayfwd").write_text("#!/bin/sh\nexit 127\n")
                await one._check_it_is_free(machine, seen, "w1")
            finally:
                machine.close()

    run(main_)


def test_a_machines_host_key_is_checked_and_its_fingerprint_writes_it_down(tmp_path: Path) -> None:
    async def main_() -> None:
        async with remote(tmp_path) as it:
            known = it.host.known_hosts
            assert known is not None
            it.know(asyncssh.generate_private_key("ssh-ed25519"))
            with pytest.raises(ProblemError) as told:
                await Machine.connect(it.host)
            assert told.value.problem.code is codes.HOST_KEY_MISMATCH
            assert "the head" not in str(told.value.problem)
            known.write_text("")
            with pytest.raises(ProblemError) as told:
                await Machine.connect(replace(it.host, fingerprint="SHA256:other"))
            assert told.value.problem.code is codes.HOST_KEY_MISMATCH
            assert not known.read_text()
            fingerprint = it.host_key.get_fingerprint()
            (await Machine.connect(replace(it.host, fingerprint=fingerprint))).close()
            assert len(known.read_text().splitlines()) == 1
            (await Machine.connect(it.host)).close()

    run(main_)


@pytest.mark.parametrize("by_options", [False, True])
def test_what_is_wrong_on_the_way_names_the_options_of_add(
    tmp_path: Path, by_options: bool
) -> None:
    """On a head with a file, and on one of `rayfwd head`."""
    if by_options:
        cli_head.speak()

    async def main_() -> None:
        async with remote(tmp_path) as it:
            known = it.host.known_hosts
            assert known is not None
            line = known.read_text()
            known.write_text("")
            with pytest.raises(ProblemError) as told:
                await Machine.connect(it.host)
            assert told.value.problem.code is codes.HOST_KEY_UNKNOWN
            assert "`rayfwd add --fingerprint SHA256:…`" in told.value.problem.remedy
            known.write_text(line)
            with pytest.raises(ProblemError) as told:
                await Machine.connect(replace(it.host, identity=tmp_path / "none"))
            assert "correct --identity" in told.value.problem.remedy
            asyncssh.generate_private_key("ssh-ed25519").write_private_key(tmp_path / "other")
            with pytest.raises(ProblemError) as told:
                await Machine.connect(replace(it.host, identity=tmp_path / "other"))
            assert "set --identity to a key that is already there" in told.value.problem.remedy
            assert "head" not in told.value.problem.remedy

    run(main_)


# -- on the head ----------------------------------------------------------------------------------


def the_dialling(s: Site) -> Dialling:
    role = s.head.role
    assert isinstance(role, HeadRole)
    return role._dialling


def test_a_worker_is_dialled_from_now_on_and_after_a_restart(tmp_path: Path) -> None:
    async def main_() -> None:
        async with site(tmp_path, "w1") as s:
            await s.head.start()
            dialling = the_dialling(s)
            dial = {"name": "w2", "ssh": "ray@192.0.2.1", "via": "exec"}
            assert (await dialling.dial_verb({"dial": dial}))["new"] is True
            assert (await dialling.dial_verb({"dial": dial}))["new"] is False
            for wrong in (None, {"ssh": "ray@"}, {"ssh": "h", "x": 1}):
                with pytest.raises(ProblemError) as told:
                    await dialling.dial_verb({"dial": wrong})
                assert told.value.problem.code is codes.CONTROL_BAD_REQUEST
            board = s.head.role.node.board
            await until(lambda: any(c.subject == "w2" for c in board.conditions))
            await s.head.restart()
            dialling = the_dialling(s)
            assert dialling._added == {"w2": DialConfig.model_validate(dial)}
            assert await dialling.undial_verb({"name": "w3"}) == {"undialled": None}
            assert await dialling.undial_verb({"name": "w2"}) == {"undialled": "w2"}
            board = s.head.role.node.board
            await until(lambda: not any(c.subject == "w2" for c in board.conditions))
            assert not dialling._added

    run(main_)


def test_a_worker_is_not_dialled_by_parts_of_another_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dials is loaded when there is somebody to dial: rayfwd may have been upgraded by then,
    and the daemon not restarted."""

    async def main_() -> None:
        async with site(tmp_path, "w1") as s:
            await s.head.start()
            dialling = the_dialling(s)
            monkeypatch.setattr(dialling, "_make", lambda dial: carrier_for(dial.way()))
            monkeypatch.setitem(sys.modules, "rayfwd.ssh.asyncssh_carrier", None)
            with pytest.raises(ProblemError) as told:
                await dialling.dial_verb({"dial": {"name": "w2", "ssh": "ray@192.0.2.1"}})
            assert told.value.problem.code is codes.CONTROL_BAD_REQUEST
            assert "rayfwd was replaced on this machine" in told.value.problem.cause
            assert "restart the daemon" in told.value.problem.remedy
            assert not dialling._added

    run(main_)


def test_a_wait_that_ended_says_what_the_machine_says() -> None:
    how = SelfReport("waiting", (codes.RAY_NOT_FOUND.problem("no ray", "get it"),))
    problem = adding.not_ready("w1", 3.0, how).problem
    assert problem.code is codes.ADD_NOT_READY
    assert problem.cause.endswith("after 3 s: waiting; ray_not_found: no ray")
    assert problem.remedy == "get it"
    silent = SelfReport("silent", log="Traceback")
    assert "Traceback" in adding.not_ready("w1", 3.0, silent).problem.cause


def test_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    bad = codes.ADD_FAILED.error("x", "y")
    outcomes = [Outcome("a", changed=True), Outcome("b"), Outcome("c\x1b", problem=bad)]
    for outcome in outcomes:
        outcome.ended = True
    assert summary(outcomes, "in") == 1
    assert capsys.readouterr().out == "2 of 3 in; 1 unchanged; 1 failed: c\\x1b\n"
    assert summary(outcomes[:2], "in") == 0


def test_a_machine_that_does_not_answer_holds_up_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its place is the next one's; once it has answered, it waits for one again."""
    ended: dict[str, float] = {}
    at_work: set[str] = set()

    async def work(machine: str, outcome: Outcome) -> None:
        async with outcome.slot.lent(lambda: print(machine, "is slow")):
            await asyncio.sleep({"slow": 22, "dead": 90}.get(machine, 1))
            if machine == "dead":
                return
        at_work.add(machine)
        assert len(at_work) <= 2
        await asyncio.sleep(9)
        at_work.remove(machine)
        ended[machine] = asyncio.get_running_loop().time()

    async def main_() -> None:
        began = asyncio.get_running_loop().time()
        machines = ["slow", "dead", "a", "b", "c", "d"]
        assert await at_once(machines, str, work, 2, "in") == 0
        took = {machine: round(at - began) for machine, at in ended.items()}
        assert took == {"a": 20, "b": 20, "c": 30, "d": 30, "slow": 39}

    run_on_fake_clock(main_)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["slow is slow", "dead is slow"]
    assert said[-1] == "6 of 6 in; 6 unchanged"


def test_an_interruption_says_how_far_each_came(capsys: pytest.CaptureFixture[str]) -> None:
    """Two at a time: one is done, one failed, one is at work, one has not begun."""

    hanging: list[Outcome] = []

    async def work(machine: str, outcome: Outcome) -> None:
        outcome.at = "install"
        if machine == "hangs":
            hanging.append(outcome)
            await asyncio.Event().wait()
        if machine == "fails":
            outcome.problem = codes.ADD_FAILED.error("x", "y")

    async def main_() -> None:
        machines = ["good", "fails", "hangs", "hangs", "waits"]
        task = asyncio.create_task(at_once(machines, str, work, 2, "in"))
        await until(lambda: len(hanging) == 2)
        capsys.readouterr()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main_)
    assert capsys.readouterr().out.splitlines() == [
        "hangs  STOPPED   at `install`; run the same command again",
        "hangs  STOPPED   at `install`; run the same command again",
        "waits  STOPPED   before its first step; run the same command again",
        "1 of 5 in; 1 unchanged; 1 failed: fails; 3 interrupted",
    ]
