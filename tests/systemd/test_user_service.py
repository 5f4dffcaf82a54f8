"""The same without root: services of an ordinary user, who lingers, on both machines."""

from __future__ import annotations

import pytest

from tests import shown
from tests.systemd.cluster import Cluster
from tests.systemd.machines import Lab, Machine


@pytest.fixture(scope="module")
def own(lab: Lab) -> Cluster:
    """Set up by user `ray`, and ready."""
    cluster = Cluster(lab, user="ray")
    for machine in lab.machines:
        machine.run(["loginctl", "enable-linger", "ray"])  # as init says
    cluster.set_up()
    cluster.start()
    cluster.wait_ready()
    return cluster


def test_it_is_a_cluster(own: Cluster) -> None:
    assert own.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]
    for machine in own.lab.machines:
        assert machine.show("rayfwd")["LoadState"] == "not-found", "nothing of root's"
        assert machine.status(user="ray")["state"] == "ready"
        config = machine.run(["stat", "-c", "%a %U", "/home/ray/.config/rayfwd.toml"]).stdout
        assert config == "600 ray\n"


@pytest.mark.runs("systemctl --user restart rayfwd", "systemctl --user")
def test_a_restart_costs_no_call_and_leaves_ray_alone(own: Cluster) -> None:
    """A user's service manager keeps descriptors, and says what it is about, as the machine's."""
    job, raylets = own.job(), own.raylets()
    for machine in (own.worker, own.head):
        taken = own.restart(machine)
        assert taken["RESET"] == "0"
        assert int(taken["STREAMS"]) > 5
        assert machine.events("ray_left_running", user="ray")[-1]["OURS"] == "true"
        assert machine.show(user="ray")["NFileDescriptorStore"] == "1", "the listeners'"
    own.goes_on(job)
    job.finish()
    job.check()
    assert own.raylets() == raylets


def test_the_doctor_beside_it(own: Cluster) -> None:
    """And its report, in which a user finds what that user's own journal has."""
    for machine in own.lab.machines:
        argv = ["rayfwd", "doctor", "--report", "/home/ray/report.txt", "--with-logs"]
        said = machine.run(argv, user="ray").stdout
        assert "pass  keeper          rayfwd-ray.service answers on /run/user/1000/" in said
        report = machine.read("/home/ray/report.txt")
        journal = report.partition("\n== journal\n")[2].partition("\n== ")[0]
        assert "rayfwd_ready" in journal
        assert "keeper_listening" in journal
        machine.run(["rm", "/home/ray/report.txt"])


@pytest.mark.runs("loginctl enable-linger", "loginctl show-user --property=Linger")
@pytest.mark.runs("journalctl --user")
def test_said_again_it_changes_nothing(own: Cluster) -> None:
    shown = own.worker.run(["loginctl", "show-user", "--property=Linger", "ray"]).stdout
    assert shown == "Linger=yes\n"
    mine = ["journalctl", "--user", "--no-pager", "-u", "rayfwd"]
    assert "rayfwd_ready" in own.worker.run(mine, user="ray").stdout
    said = own.init_worker()
    assert "Nothing had to be done" in said
    assert "loginctl enable-linger ray" in said


def test_it_comes_up_at_boot(own: Cluster) -> None:
    own.worker.reboot()
    own.worker.wait_for("user@1000", ActiveState="active")  # its manager can be asked
    own.wait_ready()
    assert own.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]


def test_a_stop_ends_ray_in_order(own: Cluster) -> None:
    worker = own.worker
    worker.systemctl("stop", "rayfwd", user="ray")
    assert worker.events("ray_stopped", user="ray")[-1]["KILLED"] == "0"
    worker.wait_for("rayfwd-ray", 20, user="ray", ActiveState="inactive")
    assert worker.show(user="ray")["Result"] == "success"
    assert ray_left(worker) == ""


def ray_left(machine: Machine) -> str:
    """Processes of Ray's, and of rayfwd's."""
    names = "raylet|gcs_server|ray::|rayfwd"
    return machine.run(["pgrep", "-u", "ray", "-f", names], check=False).stdout


def test_uninstall(own: Cluster) -> None:
    uninstalled(own.worker)


def uninstalled(machine: Machine) -> None:
    """Take it away, and see that nothing of it is left."""
    machine.run(["rayfwd", "uninstall", "--purge"], user="ray", timeout=150)
    left = machine.run(["find", "/home/ray", "-iname", "*rayfwd*"]).stdout
    assert left == ""
    assert machine.show(user="ray")["LoadState"] == "not-found"
    assert ray_left(machine) == ""


@pytest.mark.runs("rayfwd add * --fingerprint *")
@pytest.mark.parametrize("login", ["ray", pytest.param("root", marks=pytest.mark.thorough)])
def test_a_machine_is_added_from_the_head(own: Cluster, login: str) -> None:
    """It has Ray and sshd, and its system's Python: a service of the user's, or the machine's."""
    head, worker = own.head, own.worker
    open_to_ssh(head, worker)
    if login == "root":
        worker.run(["rm", "-r", "/opt/rayfwd", "/usr/local/bin/rayfwd"])
    words = [f"{login}@worker", "--fingerprint", worker.fingerprint]
    for key in ("num_cpus=1", "object_store_memory=100000000"):
        words += ["--set", f"ray.{key}"]
    said = on_head(head, "add", *words)
    kind = {"ray": "a service of this user (lingering is on)", "root": "the machine's service"}
    assert f"worker  start     started: {kind[login]}\n" in said
    assert said.splitlines()[-1] == "1 of 1 in the cluster"
    shown.compare("README.md", "ray@gpu-1.example.org  look", said)
    assert worker.show(user=login)["ActiveState"] == "active"
    assert own.addresses_that_work() == ["127.77.0.1", "127.77.0.2"]
    assert on_head(head, "remove", "worker").splitlines()[-1] == "1 of 1 removed"
    assert worker.show(user=login)["LoadState"] == "not-found"
    assert ray_left(worker) == ""
    places = {"ray": ["/home/ray"], "root": ["/root", "/etc", "/opt", "/var/lib", "/usr/local"]}
    assert worker.run(["find", *places[login], "-iname", "*rayfwd*"]).stdout == ""


def test_uninstall_on_the_head(own: Cluster) -> None:
    uninstalled(own.head)


def open_to_ssh(head: Machine, worker: Machine) -> None:
    """The head's user has a key, which lets in on the worker."""
    worker.firewall(22)
    key = "/home/ray/.ssh/id_ed25519"
    if not head.host_path(key).exists():
        head.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], user="ray")
    for home, owner in (("/home/ray", "ray"), ("/root", "root")):
        worker.run(["install", "-d", "-m", "0700", "-o", owner, f"{home}/.ssh"])
        keys = f"{home}/.ssh/authorized_keys"
        worker.write(keys, head.read(f"{key}.pub"), owner, 0o600)


def on_head(head: Machine, *words: str) -> str:
    ran = head.run(["rayfwd", *words], user="ray", timeout=250, check=False)
    print(ran.stdout, ran.stderr)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
