"""The booted machines themselves: were one of these not so, the other tests would prove less."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from tests.lab.machines import of_another_run
from tests.lab.process import began, boot_time, until
from tests.need import CHECKOUT
from tests.systemd import booter
from tests.systemd.machines import Lab, Machine

DIAL = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), 1.0).close()
    except TimeoutError:
        print("dropped")
    except ConnectionRefusedError:
        print("refused")
    else:
        print("open")
"""


def dial(machine: Machine, address: str, *ports: int) -> list[str]:
    return machine.run(["python3", "-c", DIAL, address, *map(str, ports)]).stdout.split()


def listens(machine: Machine) -> bool:
    return dial(machine, machine.address, 6379) == ["open"]


def test_a_whole_systemd(lab: Lab) -> None:
    for machine in lab.machines:
        assert machine.run(["cat", "/proc/1/comm"]).stdout == "systemd\n"
        assert machine.systemctl("--failed", "--no-legend") == ""
        assert machine.systemctl("is-active", "nftables", "ssh", "systemd-networkd") == (
            "active\n" * 3
        )
        machine.run(["logger", "--id", f"I am {machine.name}"])
        (entry,) = machine.journal("--grep", "^I am ", unit=None)
        assert (entry["MESSAGE"], entry["_HOSTNAME"]) == (f"I am {machine.name}", machine.name)


def test_firewalls(head: Machine, worker: Machine) -> None:
    """Ports that something listens on, reached by the machine itself and not by the other."""
    for machine, other, ssh in ((head, worker, "open"), (worker, head, "dropped")):
        served = machine.popen(["python3", "-m", "http.server", "--bind", "0.0.0.0", "6379"])
        until(partial(listens, machine), 20, lambda: "it listens")
        assert dial(other, machine.address, 22, 6379, 7) == [ssh, "dropped", "dropped"]
        served.signal(signal.SIGTERM)
        served.wait()


def test_reboot_power_off_and_power_cut(worker: Machine) -> None:
    """The disk stays, /run does not; each time another boot, with the firewall."""
    boots = []
    worker.run(["sh", "-c", "echo kept >/etc/kept; echo gone >/run/gone; sync"])
    for again in (worker.reboot, worker.poweroff, worker.power_cut):
        again()
        if not worker.is_on:
            worker.boot()
        boots.append(worker.run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout)
        assert worker.read("/etc/kept") == "kept\n"
        assert not worker.host_path("/run/gone").exists()
        assert "policy drop" in worker.network_command("nft", "list", "ruleset")
    assert len(set(boots)) == 3


def test_cable_and_cut(lab: Lab, head: Machine, worker: Machine) -> None:
    """A cable that is pulled is seen by systemd-networkd, a cut is not."""

    def online() -> str:
        state = json.loads(worker.run(["networkctl", "--json=short", "status", "eth0"]).stdout)
        return str(state["OperationalState"])

    until(lambda: online() == "routable", 20, online)
    lab.unplug(worker)
    until(lambda: online() == "no-carrier", 20, online)
    lab.plug(worker)
    until(lambda: online() == "routable", 20, online)
    until(lambda: dial(worker, head.address, 22) == ["open"], 20, online)
    lab.cut(worker)
    assert dial(worker, head.address, 22) == ["dropped"]
    assert online() == "routable"
    lab.heal(worker)
    until(lambda: dial(worker, head.address, 22) == ["open"], 20, online)


HOLD = """
import signal, sys
from pathlib import Path
from tests.lab.machines import made, tag
from tests.systemd.install import installed
from tests.systemd.machines import Lab
signal.signal(signal.SIGINT, signal.default_int_handler)
with Lab(Path(sys.argv[1]), installed("bookworm"), ["head"]) as lab:
    lab.boot()
    print(tag(), *sorted(made), flush=True)
    signal.pause()
"""


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        argv = [sys.executable, "-c", HOLD, str(tmp_path)]
        with subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as held:
            assert held.stdout is not None
            mark, *spaces = held.stdout.readline().split()
            assert len(traces(mark, spaces)) > 10, "there is something to find"
            interrupted = boot_time()
            held.send_signal(number)
        deadline = time.monotonic() + 20
        while left := traces(mark, spaces, interrupted):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def traces(mark: str, spaces: list[str], before: float = math.inf) -> list[str]:
    """Control groups, mounts, and processes that began before that time, of the machines of a run.

    The kernel gives the number of a namespace that is gone to the next, of another run maybe.
    """
    found = [str(path) for top in booter.hierarchies() for path in top.glob(f"{mark}-*")]
    found += [x for x in Path("/proc/self/mountinfo").read_text().splitlines() if f"{mark}-" in x]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            inside = {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("pid", "net", "mnt")}
        except OSError:
            continue
        theirs = inside & set(spaces) and began(int(pid)) < before
        if (theirs and not of_another_run(int(pid), mark)) or f"{mark}-" in command:
            found.append(f"{pid} {command}")
    return found


def test_nothing_hangs_when_it_boots(worker: Machine) -> None:
    """Nor when it shuts down: systemd waits 90 s for a service that does."""
    began = time.monotonic()
    worker.reboot()
    assert time.monotonic() - began < 90
