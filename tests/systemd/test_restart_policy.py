"""What systemd does when rayfwd ends by itself: again and again, or once and for all."""

from __future__ import annotations

from tests.lab.process import until
from tests.systemd.cluster import Cluster
from tests.systemd.machines import Lab, Machine

LOCK = "/var/lib/rayfwd/lock"


def test_a_mistake_in_the_file_stops_it_with_one_line(lab: Lab, worker: Machine) -> None:
    cluster = Cluster(lab)
    cluster.set_up()
    config = worker.host_path("/etc/rayfwd.toml")
    good = config.read_text()
    config.write_text(good.replace("num_cpus = 1", 'num_cpus = "one"'))
    started = worker.run(["systemctl", "start", "rayfwd"], check=False)
    config.write_text(good)
    assert started.returncode != 0
    shown = worker.show()
    # Were it to be tried again, it would be `activating (auto-restart)`.
    assert (shown["ActiveState"], shown["SubState"]) == ("failed", "failed")
    assert (shown["Result"], shown["ExecMainStatus"]) == ("exit-code", "2")
    assert shown["NRestarts"] == "0"
    (said,) = [entry for entry in worker.journal() if entry["SYSLOG_IDENTIFIER"] == "rayfwd"]
    assert "/etc/rayfwd.toml" in said["MESSAGE"]
    assert "ray.num_cpus" in said["MESSAGE"]
    assert said["PRIORITY"] == "3"
    assert said["MESSAGE"] in shown["StatusText"]
    assert "ray.num_cpus" in worker.run(["systemctl", "status", "rayfwd"], check=False).stdout


def test_a_fault_that_may_pass_is_never_given_up_on(worker: Machine) -> None:
    """More failures in a row than systemd's default limit of starts; then it passes."""
    drop_in = "/etc/systemd/system/rayfwd.service.d"
    worker.run(["mkdir", "-p", drop_in])
    worker.write(f"{drop_in}/quick.conf", "[Service]\nRestartSec=50ms\n")
    worker.systemctl("daemon-reload")
    worker.run(["install", "-d", "-o", "ray", "-g", "ray", "-m", "0700", "/var/lib/rayfwd"])
    hold = worker.popen(["flock", LOCK, "sleep", "600"], user="ray")
    until(lambda: worker.host_path(LOCK).exists(), 20, lambda: "the lock is there")
    worker.systemctl("reset-failed", "rayfwd")
    worker.systemctl("start", "--no-block", "rayfwd")

    def failures() -> int:
        return int(worker.show()["NRestarts"])

    until(lambda: failures() > 6, 120, lambda: f"it fails more often than {failures()} times")
    (first, *_) = worker.events("already_running")
    assert first["PRIORITY"] == "3"
    worker.wait_for_status("cannot begin: another rayfwd is running")
    worker.run(["pkill", "-u", "ray", "-x", "sleep"])
    hold.wait(20)
    shown = worker.wait_for_status("waiting: ")
    assert (shown["ActiveState"], shown["SubState"]) == ("activating", "start")


def test_killed_it_is_started_again(worker: Machine) -> None:
    before = worker.show()
    worker.systemctl("kill", "--kill-whom=main", "--signal=SIGKILL", "rayfwd")

    def restarts() -> int:
        return int(worker.show()["NRestarts"])

    until(lambda: restarts() > int(before["NRestarts"]), 30, lambda: "another start")
    shown = worker.wait_for_status("waiting: ")
    assert shown["MainPID"] not in {"0", before["MainPID"]}
