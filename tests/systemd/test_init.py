"""`rayfwd init` and `rayfwd uninstall` on bare machines, by the README's commands."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.systemd.cluster import Cluster
from tests.systemd.machines import RAY, Machine

FILES = r"""
find /etc /home /opt/rayfwd/bin /root /usr/local /var/lib \
    \( -path /var/lib/systemd -o -name '*-' -o -name '.pwd.lock' \) -prune -o \
    \( -type d -printf '%p %m %U %G\n' -o -printf '%p %m %U %G %s %l\n' \) | sort
cat /etc/passwd /etc/group
"""
WORKER = ("rayfwd", "init", "worker", "--head", "ray@head", "--ray", RAY)


def files(machine: Machine) -> list[str]:
    """All that `init` could have touched: path, mode, owners, size, and where a link leads."""
    return machine.run(["sh", "-c", FILES]).stdout.splitlines()


def modes(machine: Machine, *paths: str) -> list[str]:
    return machine.run(["stat", "-c", "%n %a %U %G", *paths]).stdout.splitlines()


@pytest.fixture(scope="module")
def bare(head: Machine, worker: Machine) -> dict[str, list[str]]:
    """What was there before: by machine."""
    return {machine.name: files(machine) for machine in (head, worker)}


def test_head(head: Machine, bare: dict[str, list[str]]) -> None:
    init = ["rayfwd", "init", "head", "--ray", RAY]
    dry = head.run([*init, "--dry-run"]).stdout
    assert "to create /etc/systemd/system/rayfwd.service" in dry
    assert files(head) == bare["head"]
    said = head.run(init).stdout
    assert said.splitlines()[0] == "head, named head: the machine's service, run by ray"
    assert said.splitlines()[-1].strip() == "systemctl enable --now --no-block rayfwd"
    flags = f"--head-rayfwd /usr/local/bin/rayfwd --fingerprint {head.fingerprint} --ray {RAY}"
    assert f"    rayfwd init worker --head ray@head {flags}\n" in said
    rows = doctors(said)
    assert (rows["config"], rows["keeper"], rows["sshd"], rows["ray"]) == ("pass",) * 4
    assert rows["daemon"] == "skip", "none runs yet"
    made = files(head)
    assert "Nothing had to be done" in head.run(init).stdout
    assert "Nothing had to be done" in head.run(["rayfwd", "init", "head"]).stdout
    assert files(head) == made
    assert modes(head, "/etc/rayfwd.toml") == ["/etc/rayfwd.toml 640 root rayfwd"]
    shown = head.show()
    assert (shown["LoadState"], shown["NeedDaemonReload"], shown["User"]) == ("loaded", "no", "ray")
    assert "/etc/rayfwd.toml: valid" in head.run(["rayfwd", "check"]).stdout


def doctors(said: str) -> dict[str, str]:
    """The doctor's rows in what `init` said: check to result."""
    plain = re.sub("\x1b\\[[0-9;]*m", "", said).replace("\r", "")
    part = plain.partition("Health check (`rayfwd doctor` repeats it):\n\n")[2]
    rows = [line.split()[:2] for line in part.partition("\n\n")[0].splitlines()]
    return {check: result for result, check in rows if result != "do"}


def test_man_finds_its_pages(head: Machine) -> None:
    """In a directory where man looks, whose link leads to the page."""
    for page in ("man1/rayfwd.1", "man5/rayfwd.toml.5"):
        text = head.run(["cat", f"/usr/local/share/man/{page}"]).stdout
        assert ".SH NAME" in text


def test_units_as_systemd_reads_them(head: Machine) -> None:
    """systemd-analyze names every directive that it does not know or ignores."""
    units = head.run(["sh", "-c", "ls /etc/systemd/system/rayfwd*"]).stdout.split()
    assert units
    verified = head.run(["systemd-analyze", "--man=no", "verify", *units])
    said = verified.stdout + verified.stderr
    assert [line for line in said.splitlines() if "rayfwd" in line] == []


def test_a_host_key_is_never_taken_unseen(
    head: Machine, worker: Machine, bare: dict[str, list[str]]
) -> None:
    alone = worker.run(WORKER, check=False)
    assert (alone.returncode, "--fingerprint" in alone.stderr) == (2, True), alone.stderr
    wrong = worker.run([*WORKER, "--fingerprint", "SHA256:" + "A" * 43], check=False)
    assert (wrong.returncode, "host_key_mismatch" in wrong.stderr) == (1, True), wrong.stderr
    for answer in ("no", ""):
        asked = on_a_terminal(worker, f"{answer}\n")
        assert head.fingerprint in asked, "shown before it is asked for"
        assert "host_key_unknown" in asked or "--fingerprint" in asked
    assert files(worker) == bare["worker"]


def on_a_terminal(machine: Machine, typed: str) -> str:
    """What init said to somebody who types that at its question."""
    line = " ".join(WORKER)
    return machine.run(["script", "-qec", line, "/dev/null"], input=typed, check=False).stdout


@pytest.mark.runs("rayfwd init worker --head * --ray *", "rayfwd init worker --fingerprint *")
def test_worker(head: Machine, worker: Machine) -> None:
    said = on_a_terminal(worker, "yes\n")
    assert head.fingerprint in said
    public = worker.read("/etc/rayfwd/id_ed25519.pub").strip()
    assert f'restrict,command="/usr/local/bin/rayfwd attach" {public}' in said
    assert "systemctl enable --now --no-block rayfwd" in said.splitlines()[-1]
    rows = doctors(said)
    assert (rows["host_key"], rows["auth"], rows["hub"]) == ("pass", "fail", "skip")
    assert "add the line below to authorized_keys there: this machine's key is new" in said
    assert "(the service waits until what fails above is corrected, and then goes on)" in said
    assert worker.read("/etc/rayfwd/known_hosts") == f"head {head.host_key}\n"
    secret = ("/etc/rayfwd.toml", "/etc/rayfwd", "/etc/rayfwd/id_ed25519")
    assert modes(worker, *secret) == [
        "/etc/rayfwd.toml 640 root rayfwd",
        "/etc/rayfwd 750 root rayfwd",
        "/etc/rayfwd/id_ed25519 600 ray ray",
    ]
    made = files(worker)
    again = worker.run([*WORKER, "--fingerprint", head.fingerprint]).stdout
    assert "Nothing had to be done" in again
    assert files(worker) == made
    assert public in again, "the line can be had again"


@pytest.mark.runs("rayfwd uninstall --dry-run")
def test_uninstall_leaves_nothing(
    head: Machine, worker: Machine, bare: dict[str, list[str]]
) -> None:
    """From a worker whose service is up and dials, and from a head that was never started."""
    worker.systemctl("enable", "--now", "--no-block", "rayfwd")
    worker.wait_for_status("waiting: ")
    assert worker.run(["pgrep", "-u", "ray", "-f", "rayfwd"]).stdout
    for machine in (worker, head):
        made = files(machine)
        dry = machine.run(["rayfwd", "uninstall", "--purge", "--dry-run"]).stdout
        assert "to remove /etc/rayfwd.toml" in dry
        assert files(machine) == made
    worker.run(["rayfwd", "uninstall", "--purge"], timeout=150)
    head.run(["rayfwd", "uninstall"])
    for machine in (worker, head):
        assert files(machine) == bare[machine.name]
        assert machine.show()["LoadState"] == "not-found"
        assert machine.run(["pgrep", "-u", "ray"], check=False).stdout == ""
        assert "nothing to remove" in machine.run(["rayfwd", "uninstall"]).stdout


AS_OF_NFS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")
"""Root has no way into a home that is closed to others, as where NFS squashes it."""


@pytest.fixture
def far_home(head: Machine, worker: Machine) -> Iterator[str]:
    """A key, and the host keys that are known, in a directory of the user's alone that lies on
    another file system, in a home that is closed to others; its path."""
    ssh, script = "/home/ray/.ssh", "mount -t tmpfs tmpfs /mnt && mkdir /mnt/ssh /home/ray/.ssh"
    worker.run(["sh", "-c", f"{script} && chmod 0700 /mnt/ssh /home/ray"])
    worker.run(["chown", "ray:ray", "/mnt/ssh", ssh])
    worker.run(["mount", "--bind", "/mnt/ssh", ssh])
    worker.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{ssh}/id"], user="ray")
    worker.write(f"{ssh}/known_hosts", f"head {head.host_key}\n", "ray")
    alias = f"Host far\n  HostName head\n  User ray\n  IdentityFile {ssh}/id\n"
    worker.write(f"{ssh}/config", alias, "ray")
    yield ssh
    worker.run(["sh", "-c", f"umount {ssh} && umount /mnt && rmdir {ssh} && chmod 755 /home/ray"])
    head.run(["rm", "-r", "/home/ray/.ssh"])


def test_a_home_on_another_file_system(head: Machine, worker: Machine, far_home: str) -> None:
    """The confined service reads it, and comes up by itself when it is mounted late."""
    init = [*AS_OF_NFS, "rayfwd", "init", "worker", "--head", "far", "--ray", RAY]
    init += ["--identity", f"{far_home}/id"]
    asked = worker.run(init, check=False)
    assert (asked.returncode, asked.stderr.count("\n")) == (2, 1)
    assert f"--user: root may not look at {RAY}" in asked.stderr
    said = worker.run([*init, "--user", "ray"]).stdout
    assert worker.read(f"{far_home}/id.pub").split()[1] in said
    assert "Add this line to ~ray/.ssh/authorized_keys on the head:" in said
    Cluster(head.lab).authorize(said)
    worker.run(["umount", far_home])
    worker.systemctl("start", "--no-block", "rayfwd")
    shown = worker.wait_for_status(f"waiting: {far_home}/id")
    assert "No such file" in shown["StatusText"]
    assert [p["code"] for p in worker.status()["conditions"] if p["blocks_ready"]] == [
        "ssh_file_unreadable"
    ]
    worker.run(["mount", "--bind", "/mnt/ssh", far_home])
    # In, with that key, to a head that has no hub.
    worker.wait_for_status("waiting: on the head: no hub answers")
    assert worker.show()["NRestarts"] == "0"
    worker.run(["rayfwd", "uninstall", "--purge"], timeout=150)
