"""`rayfwd init` and `rayfwd uninstall` on bare machines, by the README's commands."""

from __future__ import annotations

import pytest

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
    assert "to make   /etc/systemd/system/rayfwd.service" in dry
    assert files(head) == bare["head"]
    said = head.run(init).stdout
    assert said.splitlines()[0] == "head head: the machine's service, run by ray"
    assert said.splitlines()[-1].strip() == "systemctl enable --now --no-block rayfwd"
    assert (
        f"--head ray@head --head-rayfwd /usr/local/bin/rayfwd --fingerprint {head.fingerprint}"
        in said
    )
    made = files(head)
    assert "Nothing was to be done" in head.run(init).stdout
    assert "Nothing was to be done" in head.run(["rayfwd", "init", "head"]).stdout
    assert files(head) == made
    assert modes(head, "/etc/rayfwd.toml") == ["/etc/rayfwd.toml 640 root rayfwd"]
    shown = head.show()
    assert (shown["LoadState"], shown["NeedDaemonReload"], shown["User"]) == ("loaded", "no", "ray")
    assert "/etc/rayfwd.toml: valid" in head.run(["rayfwd", "check"]).stdout


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


def test_worker(head: Machine, worker: Machine) -> None:
    said = on_a_terminal(worker, "yes\n")
    assert head.fingerprint in said
    public = worker.read("/etc/rayfwd/id_ed25519.pub").strip()
    assert f'restrict,command="/usr/local/bin/rayfwd attach" {public}' in said
    assert "systemctl enable --now --no-block rayfwd" in said.splitlines()[-1]
    assert worker.read("/etc/rayfwd/known_hosts") == f"head {head.host_key}\n"
    secret = ("/etc/rayfwd.toml", "/etc/rayfwd", "/etc/rayfwd/id_ed25519")
    assert modes(worker, *secret) == [
        "/etc/rayfwd.toml 640 root rayfwd",
        "/etc/rayfwd 750 root rayfwd",
        "/etc/rayfwd/id_ed25519 600 ray ray",
    ]
    made = files(worker)
    again = worker.run([*WORKER, "--fingerprint", head.fingerprint]).stdout
    assert "Nothing was to be done" in again
    assert files(worker) == made
    assert public in again, "the line can be had again"


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
        assert "nothing to take away" in machine.run(["rayfwd", "uninstall"]).stdout
