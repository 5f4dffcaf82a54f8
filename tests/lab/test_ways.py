"""The ways to a head that people have: jump hosts, names, slow and limited servers, noisy shells.

With real sshd throughout: w2 is the bastion between w1 and the head. Where the way is no good, the
machine that is at fault is named, with what was dialled and what was seen there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest

from tests.lab.cluster import HUB_SOCKET, Cluster, change
from tests.lab.daemon import Daemon, Event
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, until

SSH = f"{HOME}/.ssh"
NAMED = f"{HOME}/named_config"
WITHIN = 40.0
"""Seconds in which a problem is met."""

VIA_BASTION = """
Host bastion
  HostName {bastion}
Host the-head
  HostName {head}
  User ray
  ProxyJump bastion
"""


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    """A head without Ray. Each test starts w1, by a way of its own."""
    cluster = Cluster(module_lab, workers=("w1",), every={"ray.start": False})
    cluster.start(["head"])
    cluster.head.wait_event("hub_listening")
    yield cluster
    cluster.stop()


@pytest.fixture
def head(cluster: Cluster) -> Machine:
    return cluster.lab.machine("head")


@pytest.fixture
def w1(cluster: Cluster) -> Machine:
    return cluster.lab.machine("w1")


@pytest.fixture
def bastion(cluster: Cluster) -> Iterator[Machine]:
    """An sshd on w2 that lets w1 in, and is its jump host by the user's own configuration."""
    lab = cluster.lab
    machine, w1 = lab.machine("w2"), lab.machine("w1")
    machine.firewall([22])
    machine.authorize(w1.public_key)
    machine.start_sshd()
    head = lab.machine("head")
    w1.know(f"{head.address} {head.host_key}", f"{machine.address} {machine.host_key}")
    w1.write(f"{SSH}/config", VIA_BASTION.format(head=head.address, bastion=machine.address))
    yield machine
    if machine.sshd_runs:
        machine.stop_sshd()
    w1.run(["rm", "-f", f"{SSH}/config"])
    w1.give_keys()
    w1.know(f"{head.address} {head.host_key}")


@contextmanager
def worker(cluster: Cluster, **head: Any) -> Iterator[Daemon]:
    """w1's daemon, with these keys in its [head]."""
    before = deepcopy(cluster.configs["w1"])
    for key, value in head.items():
        change(cluster.configs["w1"], {f"head.{key}": value})
    try:
        daemon = cluster.start_node("w1")
        yield daemon
        assert daemon.stop() == 0
    finally:
        cluster.configs["w1"] = before


def met(daemon: Daemon, code: str) -> Event:
    return daemon.wait_event(code, WITHIN)


def up(daemon: Daemon, seconds: float = 60) -> None:
    """Both lanes stand."""
    daemon.wait_event("lane_up", seconds, {"lane": "interactive"})
    daemon.wait_event("lane_up", seconds, {"lane": "bulk-1"})


def restart_sshd(machine: Machine, *options: str) -> None:
    machine.stop_sshd()
    machine.start_sshd([word for option in options for word in ("-o", option)])


@contextmanager
def sshd_with(machine: Machine, *options: str) -> Iterator[None]:
    restart_sshd(machine, *options)
    try:
        yield
    finally:
        restart_sshd(machine)


def doctor(cluster: Cluster) -> str:
    """What w1's says."""
    ran = cluster.lab.machine("w1").run(
        [str(cluster.lab.rayfwd), "doctor", "--config", f"{HOME}/rayfwd.toml"],
        check=False,
        timeout=120,
    )
    return ran.stdout


class TestJumpHost:
    def test_it_is_dialled_once_and_a_cut_is_healed(
        self, cluster: Cluster, bastion: Machine
    ) -> None:
        log = cluster.lab.folder / "w2-sshd.log"
        before = log.read_text().count("Accepted publickey")
        with worker(cluster, ssh="the-head") as daemon:
            up(daemon)
            assert log.read_text().count("Accepted publickey") - before == 1
            cluster.lab.cut(bastion)
            daemon.wait_event("link_parked", 60)
            began = time.monotonic()
            cluster.lab.heal(bastion)
            resumed = daemon.wait_event("link_resumed", 60)
            assert time.monotonic() - began < 6.0, resumed
            assert log.read_text().count("Accepted publickey") - before == 2

    def test_its_unknown_host_key_is_its_own(
        self, cluster: Cluster, bastion: Machine, head: Machine, w1: Machine
    ) -> None:
        w1.know(f"{head.address} {head.host_key}")
        with worker(cluster, ssh="the-head") as daemon:
            said = met(daemon, "host_key_unknown")
            assert "the jump host bastion" in said["cause"]
            assert bastion.address in said["cause"]
            assert f"ssh-keyscan -p 22 {bastion.address}" in said["remedy"]
            assert "the jump host bastion" in doctor(cluster)
            w1.know(f"{head.address} {head.host_key}", f"{bastion.address} {bastion.host_key}")
            up(daemon)

    def test_its_refusal_of_the_key_is_its_own(
        self, cluster: Cluster, bastion: Machine, w1: Machine
    ) -> None:
        bastion.authorize()
        with worker(cluster, ssh="the-head") as daemon:
            said = met(daemon, "ssh_auth_refused")
            assert said["cause"].startswith("the jump host bastion refuses")
            assert "on the jump host bastion" in said["remedy"]

    def test_the_identity_is_offered_to_it(
        self, cluster: Cluster, bastion: Machine, w1: Machine
    ) -> None:
        w1.run(["mv", f"{SSH}/id_ed25519", f"{HOME}/elsewhere"])
        with worker(cluster, ssh="the-head", identity=f"{HOME}/elsewhere") as daemon:
            up(daemon)

    def test_the_file_that_is_named_is_for_it_too(
        self, cluster: Cluster, bastion: Machine, w1: Machine
    ) -> None:
        w1.run(["mv", f"{SSH}/config", NAMED])
        ran = w1.run(["ssh", "-F", NAMED, "-o", "BatchMode=yes", "the-head", "true"], check=False)
        assert ran.returncode == 0, ran.stderr
        with worker(cluster, ssh="the-head", ssh_config=NAMED) as daemon:
            up(daemon)

    def test_that_it_is_down_is_said_of_it(self, cluster: Cluster, bastion: Machine) -> None:
        bastion.stop_sshd()
        with worker(cluster, ssh="the-head") as daemon:
            said = met(daemon, "ssh_unreachable")
            assert "the jump host bastion" in said["cause"]
            assert f"{bastion.address} port 22" in said["cause"]
            bastion.start_sshd()
            up(daemon)

    def test_that_its_sshd_is_at_its_limits_is_said_of_it(
        self, cluster: Cluster, bastion: Machine, w1: Machine
    ) -> None:
        with sshd_with(bastion, "MaxStartups=1"):
            script = f"exec 3<>/dev/tcp/{bastion.address}/22; read -u 3 && echo there; sleep 60"
            idle = w1.popen(["bash", "-c", script])
            until(lambda: "there" in idle.log.read_text(), 20, lambda: "somebody in sshd's queue")
            with worker(cluster, ssh="the-head") as daemon:
                said = met(daemon, "ssh_turned_away")
                assert "the jump host bastion" in said["cause"]
                assert "MaxStartups" in said["remedy"]
                idle.signal(9)
                up(daemon)

    def test_that_it_does_not_forward_is_said_of_it(
        self, cluster: Cluster, bastion: Machine
    ) -> None:
        with (
            sshd_with(bastion, "AllowTcpForwarding=no"),
            worker(cluster, ssh="the-head") as daemon,
        ):
            said = met(daemon, "jump_refused")
            assert "AllowTcpForwarding" in said["remedy"]

    def test_a_head_that_is_down_behind_it_is_named(
        self, cluster: Cluster, bastion: Machine, head: Machine
    ) -> None:
        head.stop_sshd()
        try:
            with worker(cluster, ssh="the-head") as daemon:
                said = met(daemon, "ssh_unreachable")
                assert f"cannot connect to {head.address} port 22" in said["cause"]
                head.start_sshd()
                up(daemon)
        finally:
            if not head.sshd_runs:
                head.start_sshd()


class TestHead:
    def test_an_alias_of_the_systems_configuration(
        self, cluster: Cluster, head: Machine, w1: Machine
    ) -> None:
        lines = f"Host of-the-site\n  HostName {head.address}\n  User ray\n"
        file = w1.host_path("/etc/ssh/ssh_config.d/site.conf")
        own = ["sh", "-c", "mount -t tmpfs none /etc/ssh/ssh_config.d"]
        w1.run(own, user="root")
        try:
            file.write_text(lines)
            ran = w1.run(["ssh", "-o", "BatchMode=yes", "of-the-site", "true"], check=False)
            assert ran.returncode == 0, ran.stderr
            with worker(cluster, ssh="of-the-site") as daemon:
                up(daemon)
        finally:
            w1.run(["umount", "/etc/ssh/ssh_config.d"], user="root")

    @pytest.mark.parametrize("transport", ["asyncssh", "openssh"])
    def test_a_first_address_that_is_a_black_hole(
        self, cluster: Cluster, head: Machine, w1: Machine, transport: str
    ) -> None:
        hole = "2001:db8::77"
        w1.network_command("ip", "addr", "add", "2001:db8::2/64", "dev", "eth0", "nodad")
        silent = ("lladdr", "02:00:00:00:00:77", "dev", "eth0", "nud", "permanent")
        w1.network_command("ip", "neigh", "replace", hole, *silent)
        hosts = w1.host_path("/etc/hosts")
        before = hosts.read_text()
        hosts.write_text(f"{before}{hole} two-ways\n{head.address} two-ways\n")
        w1.know(f"{head.address} {head.host_key}", f"two-ways {head.host_key}")
        try:
            began = time.monotonic()
            # `ssh` tries one address after the other, for each lane.
            within = 8.0 if transport == "asyncssh" else 12.0
            with worker(cluster, ssh="ray@two-ways", transport=transport) as daemon:
                up(daemon, within)
                assert time.monotonic() - began < within
        finally:
            hosts.write_text(before)
            w1.network_command("ip", "addr", "del", "2001:db8::2/64", "dev", "eth0")
            w1.know(f"{head.address} {head.host_key}")

    def test_a_login_that_takes_long_comes_up_and_is_named(
        self, cluster: Cluster, head: Machine, w1: Machine
    ) -> None:
        """As with a directory service that is slow: sshd asks it twice for each key."""
        script = f"#!/bin/sh\nsleep 7\necho '{w1.public_key}'\n"
        program = head.host_path("/run/lab/slow-keys")
        program.write_text(script)
        program.chmod(0o755)
        options = (
            "AuthorizedKeysFile=none",
            "AuthorizedKeysCommand=/run/lab/slow-keys",
            "AuthorizedKeysCommandUser=root",
        )
        with sshd_with(head, *options), worker(cluster) as daemon:
            up(daemon, 100)
            said = daemon.wait_event("login_slow", 5)
            assert said["seconds"] > 13

    @pytest.mark.parametrize("second", ["password", "keyboard-interactive"])
    def test_a_second_factor_is_told_from_a_refusal(
        self, cluster: Cluster, head: Machine, second: str
    ) -> None:
        options = (
            f"AuthenticationMethods=publickey,{second}",
            "PasswordAuthentication=yes",
            "KbdInteractiveAuthentication=yes",
            "UsePAM=yes",
        )
        with sshd_with(head, *options), worker(cluster) as daemon:
            said = met(daemon, "ssh_second_factor")
            assert "accepted this machine's key" in said["cause"]
            assert not daemon.events("ssh_auth_refused")

    @pytest.mark.parametrize("second", ["PasswordAuthentication=yes", "UsePAM=yes"])
    def test_a_refusal_is_no_second_factor(
        self, cluster: Cluster, head: Machine, w1: Machine, second: str
    ) -> None:
        """Also where the server would take something else instead of a key."""
        head.authorize()
        try:
            interactive = "KbdInteractiveAuthentication=yes"
            with sshd_with(head, second, interactive), worker(cluster) as daemon:
                met(daemon, "ssh_auth_refused")
                assert not daemon.events("ssh_second_factor")
        finally:
            head.authorize(w1.public_key, cluster.lab.machine("w2").public_key)

    @pytest.mark.parametrize("option", ["AllowTcpForwarding=no", "PermitOpen=none"])
    def test_what_shuts_the_way_to_a_socket_is_named(
        self, cluster: Cluster, head: Machine, option: str
    ) -> None:
        with sshd_with(head, option), worker(cluster) as daemon:
            said = met(daemon, "channel_refused")
            assert option.split("=", maxsplit=1)[0] in said["remedy"]

    def test_a_login_shell_that_prints(self, cluster: Cluster, head: Machine) -> None:
        head.write(f"{HOME}/.bashrc", "echo 'Welcome to the cluster'\nprintf '\\033[2J'\n", 0o644)
        try:
            said = cluster.lab.machine("w1").run(["ssh", f"ray@{head.address}", "true"]).stdout
            assert "Welcome to the cluster" in said
            command = f"{cluster.lab.rayfwd} attach --socket {HUB_SOCKET}"
            with worker(cluster, via="exec", socket=None, attach_command=command) as daemon:
                up(daemon)
        finally:
            head.run(["rm", f"{HOME}/.bashrc"])


OPENSSH = {"transport": "openssh"}


class TestOpenssh:
    """The system's `ssh` as the carrier."""

    @pytest.mark.parametrize("via", ["socket", "exec"])
    def test_it_carries_and_a_cut_is_ridden_through(self, cluster: Cluster, via: str) -> None:
        command = f"{cluster.lab.rayfwd} attach --socket {HUB_SOCKET}"
        with worker(cluster, **OPENSSH, via=via, attach_command=command) as daemon:
            up(daemon)
            w1 = cluster.lab.machine("w1")
            cluster.lab.cut(w1)
            daemon.wait_event("link_parked", 60)
            began = time.monotonic()
            cluster.lab.heal(w1)
            resumed = daemon.wait_event("link_resumed", 60)
            assert time.monotonic() - began < 8.0, resumed
            assert not daemon.events("session_ended")
        assert not w1.run(["pgrep", "-x", "ssh"], check=False).stdout.split()

    def test_a_jump_host_and_the_hops_that_are_named(
        self, cluster: Cluster, bastion: Machine, w1: Machine, head: Machine
    ) -> None:
        with worker(cluster, **OPENSSH, ssh="the-head") as daemon:
            up(daemon)
            assert "the system's ssh has checked it" in doctor(cluster)
        w1.know(f"{head.address} {head.host_key}")
        with worker(cluster, **OPENSSH, ssh="the-head") as daemon:
            unknown = met(daemon, "host_key_unknown")
            assert "the jump host bastion" in unknown["cause"]
            assert f"ssh-keyscan -p 22 {bastion.address}" in unknown["remedy"]
            w1.know(f"{head.address} {head.host_key}", f"{bastion.address} {bastion.host_key}")
            up(daemon)
        bastion.authorize()
        with worker(cluster, **OPENSSH, ssh="the-head") as daemon:
            refused = met(daemon, "ssh_auth_refused")
            assert refused["cause"].startswith("the jump host bastion refuses")
            assert "the jump host bastion" in doctor(cluster)
        bastion.authorize(w1.public_key)
        head.stop_sshd()
        try:
            with worker(cluster, **OPENSSH, ssh="the-head") as daemon:
                down = met(daemon, "ssh_unreachable")
                assert f"cannot connect to {head.address} port 22" in down["cause"]
                head.start_sshd()
                up(daemon)
        finally:
            if not head.sshd_runs:
                head.start_sshd()

    def test_what_only_ssh_understands(self, cluster: Cluster, head: Machine, w1: Machine) -> None:
        """`Match exec`, and a command that dials."""
        dial = "bash -c 'exec 3<>/dev/tcp/%h/%p; cat <&3 & exec cat >&3'"
        w1.write(
            f"{SSH}/config",
            f"Match originalhost somewhere exec true\n  HostName {head.address}\n  User ray\n"
            f"  ProxyCommand {dial}\n",
        )
        try:
            with worker(cluster, **OPENSSH, ssh="somewhere") as daemon:
                up(daemon)
            w1.write(f"{SSH}/config", "Host *\n  ProxyCommand sh -c 'echo no such tunnel >&2'\n")
            with worker(cluster, **OPENSSH) as daemon:
                said = met(daemon, "ssh_unreachable")
                assert "ProxyCommand" in said["cause"]
                assert "no such tunnel" in said["cause"]
        finally:
            w1.run(["rm", "-f", f"{SSH}/config"])

    def test_another_host_key_and_a_server_that_is_away(
        self, cluster: Cluster, head: Machine, w1: Machine
    ) -> None:
        other = cluster.lab.machine("w2").host_key
        w1.know(f"{head.address} {other}")
        try:
            with worker(cluster, **OPENSSH) as daemon:
                said = met(daemon, "host_key_mismatch")
                assert f"ssh-keygen -R {head.address}" in said["remedy"]
                w1.know(f"{head.address} {head.host_key}")
                up(daemon)
            w1.write(f"{HOME}/only", f"{head.address} {other}\n")
            with worker(cluster, **OPENSSH, known_hosts=f"{HOME}/only") as daemon:
                assert f"{HOME}/only" in met(daemon, "host_key_mismatch")["cause"]
        finally:
            w1.know(f"{head.address} {head.host_key}")
        head.stop_sshd()
        try:
            with worker(cluster, **OPENSSH) as daemon:
                said = met(daemon, "ssh_unreachable")
                assert f"dialled {head.address} port 22" in said["cause"]
                head.start_sshd()
                up(daemon)
        finally:
            if not head.sshd_runs:
                head.start_sshd()

    @pytest.mark.runs("ssh -M", "ssh -M -f -N *")
    @pytest.mark.parametrize("via", ["socket", "exec"])
    def test_a_second_factor_by_a_login_that_stands(
        self, cluster: Cluster, head: Machine, w1: Machine, via: str
    ) -> None:
        """The daemon has one of two keys that are wanted; a person who has both has logged in."""
        control = f"{HOME}/control"
        w1.write(f"{SSH}/config", f"Host *\n  ControlPath {control}\n")
        if not w1.host_path(f"{HOME}/second").exists():
            w1.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{HOME}/second"])
        second = w1.run(["cat", f"{HOME}/second.pub"]).stdout.strip()
        head.authorize(w1.public_key, second)
        keys = ["-i", f"{SSH}/id_ed25519", "-i", f"{HOME}/second"]
        to = f"ray@{head.address}"
        command = f"{cluster.lab.rayfwd} attach --socket {HUB_SOCKET}"
        config = {**OPENSSH, "via": via, "attach_command": command}
        try:
            with (
                sshd_with(head, "AuthenticationMethods=publickey,publickey"),
                worker(cluster, **config, identity=f"{SSH}/id_ed25519") as daemon,
            ):
                said = met(daemon, "ssh_second_factor")
                assert "ControlMaster" in said["remedy"]
                w1.run(["ssh", "-M", "-f", "-N", *keys, to])
                up(daemon)
                assert "ControlMaster" in doctor(cluster)
                w1.run(["ssh", "-O", "exit", to])
                daemon.wait_event("link_parked", 30)
                w1.run(["ssh", "-M", "-f", "-N", *keys, to])
                daemon.wait_event("link_resumed", 30)
                w1.run(["ssh", "-O", "exit", to])
        finally:
            w1.run(["rm", "-f", f"{SSH}/config"])
            head.authorize(w1.public_key, cluster.lab.machine("w2").public_key)
