"""`rayfwd doctor` on real machines: all passes where all is well, and each fault is named.

Before the first start, beside running daemons, and with each thing broken for real. Ray is looked
at and not run; test_stop_and_restart.py has a look at the ports of a Ray that is up.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tomli_w

from tests import shown
from tests.lab import clock
from tests.lab.cluster import HUB_SOCKET, Cluster, change
from tests.lab.daemon import CONFIG
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, until
from tests.lab.test_problems import squat
from tests.lab.test_problems_of_ray import pretend
from tests.need import need

pytestmark = pytest.mark.ray("2.60.0", "2.40.0")

WAY = ("ssh", "host_key", "auth", "channel", "hub", "place")
RAY = f"{HOME}/bin/ray"


@pytest.fixture(scope="module")
def cluster(module_lab: Lab) -> Iterator[Cluster]:
    """A head's daemon without Ray, whose version it knows all the same; workers do not run."""
    cluster = Cluster(module_lab, every={"ray.start": False})
    cluster.start([])
    start_head(cluster)
    yield cluster
    cluster.stop()


def start_head(cluster: Cluster, under: Sequence[str] = ()) -> None:
    head = cluster.start_node("head", under)
    head.wait_event("hub_listening")
    # The head says which Ray it has once it has looked for it.
    head.wait_status(lambda status: status["ray"]["version"] == "2.60.0", 60)


class Found:
    """What one run of the doctor said."""

    def __init__(self, code: int, whole: dict[str, Any]) -> None:
        self.code = code
        self.whole = whole
        self.rows: dict[str, dict[str, Any]] = {row["check"]: row for row in whole["checks"]}

    def results(self, *checks: str) -> list[str]:
        return [self.rows[check]["result"] for check in checks]

    def of(self, result: str) -> list[str]:
        return [check for check, row in self.rows.items() if row["result"] == result]


def doctor(
    cluster: Cluster,
    where: str,
    env: dict[str, str] | None = None,
    under: Sequence[str] = (),
    /,
    **keys: Any,
) -> Found:
    """Run it on that machine with its file, changed by `keys`; `under` what becomes it."""
    machine = cluster.lab.machine(where)
    config = json.loads(json.dumps(cluster.configs[where]))
    change(config, {key.replace("__", "."): value for key, value in keys.items()})
    machine.write(CONFIG, tomli_w.dumps(config))
    argv = [*under, str(cluster.lab.rayfwd), "--config", CONFIG, "doctor", "--json"]
    ran = machine.run(argv, check=False, env=env)
    assert "Traceback" not in ran.stderr, ran.stderr
    return Found(ran.returncode, json.loads(ran.stdout))


def check_ends_at(found: Found, stage: str, code: str) -> dict[str, Any]:
    """The way is well up to that stage, which fails, and nothing is said of what comes after."""
    at = WAY.index(stage)
    assert found.results(*WAY) == ["pass"] * at + ["fail"] + ["skip"] * (5 - at), found.rows
    assert found.rows[stage]["code"] == code
    assert found.rows[stage]["remedy"]
    assert found.results("versions", "ports", "clock", "link") == ["skip"] * 4
    assert found.code == 1
    return found.rows[stage]


@pytest.fixture(autouse=True)
def mended(cluster: Cluster) -> Iterator[None]:
    """What a test breaks is whole again, also where the test fails."""
    yield
    head, w1 = cluster.lab.machine("head"), cluster.lab.machine("w1")
    cluster.lab.heal(head)
    w1.firewall()
    w1.know(f"{head.address} {head.host_key}")
    head.authorize(*(cluster.lab.machine(name).public_key for name in ("w1", "w2")))


@pytest.mark.parametrize("via", ["socket", "exec"])
def test_a_good_worker_before_its_first_start(cluster: Cluster, via: str) -> None:
    command = f"{cluster.lab.rayfwd} attach --socket {HUB_SOCKET}"
    roster = cluster.head.status()["roster"]
    found = doctor(cluster, "w1", head__via=via, head__attach_command=command)
    assert found.of("fail") + found.of("warn") == [], found.rows
    assert found.of("skip") == ["daemon", "keeper", "direct", "advertise", "advertise_self"]
    assert found.code == 0
    assert abs(found.rows["clock"]["seen"]["seconds_behind"]) < 0.5, "one clock"
    assert found.rows["link"]["seen"]["down"] > 1e6
    assert found.rows["ssh"]["seen"]["server"].startswith("OpenSSH_")
    assert found.rows["auth"]["seen"]["user"] == "ray"
    assert cluster.head.status()["roster"] == roster, "nothing has joined"


def test_a_good_head(cluster: Cluster) -> None:
    """Beside its daemon, and before there is one."""
    found = doctor(cluster, "head")
    assert found.of("fail") == []
    assert found.results("socket", "sshd", "ray", "ports", "limits") == ["pass"] * 5
    assert found.of("skip") == ["keeper", "dial", "meet", "clock", "names", "link"], (
        "it runs Ray itself"
    )
    other = {"state_dir": f"{HOME}/other", "runtime_dir": f"{HOME}/other"}
    found = doctor(cluster, "head", **other, hub__port_base=25000)
    assert found.of("fail") + found.of("warn") == [], found.rows
    assert found.of("skip") == ["daemon", "keeper", "dial", "meet", "clock", "names", "link"]
    assert found.code == 0


def test_beside_a_workers_daemon(cluster: Cluster) -> None:
    """Its session does not notice, nor does the head take the doctor for the node."""
    worker = cluster.start_node("w2")
    before = worker.wait_ready()
    found = doctor(cluster, "w2")
    assert found.of("fail") + found.of("warn") == [], found.rows
    assert found.rows["daemon"]["seen"]["state"] == "ready"
    assert "w2 has 127.77.0." in found.rows["place"]["said"]
    after = worker.status()
    assert after["link"]["since"] == before["link"]["since"]
    assert after["link"]["cuts"] == 0
    assert [e["node"] for e in cluster.head.events("hub_asked")][-1] == "w2"
    assert cluster.head.events("lane_refused") == []
    assert len(cluster.head.events("session_started")) == 1
    # Another machine under its name: the hub would not let it in, and the doctor says so.
    found = doctor(cluster, "w1", name="w2")
    assert found.rows["place"]["code"] == "name_taken"
    assert worker.stop() == 0


def test_a_client(cluster: Cluster) -> None:
    """A laptop, by its file: no Ray is looked for, and nothing of a node's."""
    w1 = cluster.lab.machine("w1")
    head = {"ssh": cluster.configs["w1"]["head"]["ssh"], "socket": HUB_SOCKET}
    config = {"role": "client", "name": "laptop", "state_dir": f"{HOME}/none", "head": head}
    w1.write(CONFIG, tomli_w.dumps(config))
    argv = [str(cluster.lab.rayfwd), "--config", CONFIG, "doctor", "--json"]
    ran = w1.run(argv, check=False)
    found = Found(ran.returncode, json.loads(ran.stdout))
    assert found.of("fail") + found.of("warn") + found.of("skip") == [], found.rows
    assert (found.code, found.whole["role"]) == (0, "client")
    assert found.rows["listen"]["seen"]["dashboard"] == "127.0.0.1:8265"


def test_where_the_way_ends(cluster: Cluster) -> None:
    head, w1 = cluster.lab.machine("head"), cluster.lab.machine("w1")
    w1.know(f"{head.address} {w1.host_key}")
    check_ends_at(doctor(cluster, "w1"), "host_key", "host_key_mismatch")
    w1.know()
    check_ends_at(doctor(cluster, "w1"), "host_key", "host_key_unknown")
    w1.know(f"{head.address} {head.host_key}")

    head.authorize(cluster.lab.machine("w2").public_key)
    check_ends_at(doctor(cluster, "w1"), "auth", "ssh_auth_refused")
    plain = [str(cluster.lab.rayfwd), "--config", CONFIG, "doctor"]
    said = cluster.lab.machine("w1").run(plain, check=False).stdout
    shown.compare("docs/doctor.md", "pass  ssh", said)
    head.authorize(*(cluster.lab.machine(name).public_key for name in ("w1", "w2")))

    socket = f"{HOME}/nowhere.sock"
    row = check_ends_at(doctor(cluster, "w1", head__socket=socket), "hub", "hub_absent")
    assert socket in row["said"]
    found = doctor(cluster, "w1", head__via="exec", head__attach_command=f"{HOME}/no-such-rayfwd")
    assert "No such file" in check_ends_at(found, "hub", "hub_closed")["said"]


@pytest.fixture
def sshd(cluster: Cluster) -> Iterator[Machine]:
    """The head, whose sshd a test stops or starts otherwise."""
    head = cluster.lab.machine("head")
    yield head
    if head.sshd_runs:
        head.stop_sshd()
    head.start_sshd()


def test_sshd_forbids_streams(cluster: Cluster, sshd: Machine) -> None:
    """OpenSSH does not say so, but what it does is told from a hub that is absent."""
    sshd.stop_sshd()
    sshd.start_sshd(["-o", "AllowStreamLocalForwarding=no"])
    row = check_ends_at(doctor(cluster, "w1"), "channel", "channel_refused")
    assert 'via = "exec"' in row["remedy"]
    command = f"{cluster.lab.rayfwd} attach --socket {HUB_SOCKET}"
    assert doctor(cluster, "w1", head__via="exec", head__attach_command=command).code == 0


def test_sshd_does_not_run(cluster: Cluster, sshd: Machine) -> None:
    sshd.stop_sshd()
    row = check_ends_at(doctor(cluster, "w1"), "ssh", "ssh_unreachable")
    assert "nothing listens" in row["said"]
    found = doctor(cluster, "head")
    assert found.rows["sshd"]["code"] == "sshd_absent"


def test_the_head_is_away(cluster: Cluster) -> None:
    """Its machine does not answer at all; its name is not known."""
    head = cluster.lab.machine("head")
    cluster.lab.cut(head)
    row = check_ends_at(doctor(cluster, "w1"), "ssh", "ssh_unreachable")
    cluster.lab.heal(head)
    assert "did not answer in time" in row["said"]
    found = doctor(cluster, "w1", head__ssh="ray@head.example.invalid")
    check_ends_at(found, "ssh", "ssh_unreachable")
    assert found.rows["names"]["result"] == "fail"
    assert "head.example.invalid cannot be resolved" in found.rows["names"]["said"]


def test_ports_that_others_have(cluster: Cluster) -> None:
    w1 = cluster.lab.machine("w1")
    first = int(doctor(cluster, "w1").rows["place"]["seen"]["ports"].split("-")[0])
    squatters = [squat(w1, first + 3), squat(w1, 6379)]
    found = doctor(cluster, "w1")
    assert found.rows["ports"]["code"] == "port_in_use"
    assert f"{first + 3} (held by python" in found.rows["ports"]["said"]
    assert found.rows["listeners"]["code"] == "listener_blocked"
    assert "port 6379 is in use" in found.rows["listeners"]["said"]
    for squatter in squatters:
        squatter.signal(9)
        squatter.wait(20)
    assert doctor(cluster, "w1").results("ports", "listeners") == ["pass", "pass"]


def test_other_versions_of_ray_and_python(cluster: Cluster) -> None:
    w1 = cluster.lab.machine("w1")
    found = doctor(cluster, "w1", ray__command=str(w1.ray("2.40.0")), ray__start=True)
    assert found.results("ray", "versions") == ["pass", "fail"]
    assert found.rows["versions"]["code"] == "ray_version_differs"
    pretend(w1, ray="2.60.0", python="3.11.1")
    found = doctor(cluster, "w1", ray__command=RAY)
    assert found.rows["versions"]["code"] == "python_version_differs"
    assert "Python 3.11.1" in found.rows["versions"]["said"]
    pretend(w1, ray="2.8.1")
    found = doctor(cluster, "w1", ray__command=RAY, ray__start=True)
    assert found.rows["ray"]["code"] == "ray_version_unsupported"
    assert found.results("ray", "versions") == ["fail", "skip"]
    found = doctor(cluster, "w1", ray__command="/none/ray", ray__start=True)
    assert found.rows["ray"]["code"] == "ray_not_found"
    assert found.code == 1


def test_a_proxy_and_a_low_limit(cluster: Cluster) -> None:
    proxy = {"http_proxy": "http://ann:sesame@198.51.100.200:3128"}
    found = doctor(cluster, "w1", proxy)
    assert found.of("warn") == ["proxies"]
    assert found.rows["proxies"]["code"] == "proxy_catches"
    assert "sesame" not in json.dumps(found.whole)
    assert found.code == 4
    assert doctor(cluster, "w1", proxy | {"NO_PROXY": "127.77.0.0/16"}).code == 0

    w1 = cluster.lab.machine("w1")
    argv = [str(cluster.lab.rayfwd), "--config", CONFIG, "doctor", "--json"]
    script = 'ulimit -n 128; exec "$@"'
    ran = w1.run(["bash", "-c", script, "-", *argv], check=False)
    found = Found(ran.returncode, json.loads(ran.stdout))
    assert found.of("warn") == ["limits"]
    assert found.rows["limits"]["code"] == "descriptors_low"
    assert "128 files" in found.rows["limits"]["said"]


def check_clock(found: Found, behind: float, said: str) -> None:
    """Only the clock is wrong, by so many seconds behind the head's, and is said to be so."""
    row = found.rows["clock"]
    assert found.of("fail") == [], found.rows
    assert found.of("warn") == ["clock"], found.rows
    assert found.code == 4
    assert row["code"] == "clock_offset"
    assert f"this machine's clock is {said} the head's" in row["said"]
    assert "timedatectl set-ntp true" in row["remedy"]
    assert abs(row["seen"]["seconds_behind"] - behind) < 0.5 + row["seen"]["doubt"]


def check_no_clock(found: Found, most: float) -> None:
    assert found.of("fail") + found.of("warn") == [], found.rows
    assert abs(found.rows["clock"]["seen"]["seconds_behind"]) < most


def test_this_machines_clock_is_wrong(cluster: Cluster) -> None:
    need(clock.missing())
    check_clock(doctor(cluster, "w1", None, clock.shifted(90)), -90, "90.0 s ahead of")
    check_clock(doctor(cluster, "w1", None, clock.shifted(-10800)), 10800, "3.0 hours behind")
    check_no_clock(doctor(cluster, "w1", None, clock.shifted(1.5)), 2)
    check_no_clock(doctor(cluster, "w1"), 0.5)


def test_the_heads_clock_is_wrong(cluster: Cluster) -> None:
    """It is the daemon there that is asked, over the link."""
    need(clock.missing())
    for seconds, said in ((90.0, "90.0 s behind"), (-10800.0, "3.0 hours ahead of")):
        assert cluster.head.stop() == 0
        start_head(cluster, clock.shifted(seconds))
        check_clock(doctor(cluster, "w1"), seconds, said)
    assert cluster.head.stop() == 0
    start_head(cluster)
    check_no_clock(doctor(cluster, "w1"), 0.5)


def test_a_long_way(cluster: Cluster) -> None:
    undo = cluster.lab.lengthen(cluster.lab.machine("w1"), 0.15)
    found = doctor(cluster, "w1")
    undo()
    assert found.of("fail") == [], found.rows
    assert found.rows["link"]["code"] == "link_poor"
    assert found.rows["link"]["seen"]["rtt_ms"] > 300
    assert "a round trip takes" in found.rows["link"]["said"]
    assert found.code == 4
    assert doctor(cluster, "w1").results("link") == ["pass"]


def test_a_slow_login(cluster: Cluster, sshd: Machine) -> None:
    """The head's sshd asks for the worker's name, and the name server there does not answer."""
    resolver = sshd.host_path("/run/lab/etc/resolv.conf")
    before = resolver.read_text()
    # An address that nobody has, to which packets are sent all the same.
    nobody, nowhere = "198.51.100.77", "02:00:00:00:00:77"
    neighbour = ("ip", "neigh", "replace", nobody, "lladdr", nowhere, "dev", "eth0")
    sshd.network_command(*neighbour, "nud", "permanent")
    resolver.write_text(f"nameserver {nobody}\noptions timeout:2 attempts:2\n")
    sshd.stop_sshd()
    sshd.start_sshd(["-o", "UseDNS=yes"])
    found = doctor(cluster, "w1")
    resolver.write_text(before)
    assert found.of("fail") == [], found.rows
    assert found.of("warn") == ["auth"], found.rows
    assert found.rows["auth"]["code"] == "login_slow"
    assert "UseDNS" in found.rows["auth"]["remedy"]
    assert found.code == 4
    assert doctor(cluster, "w1").results("auth") == ["pass"]


def block(cluster: Cluster) -> tuple[int, int]:
    said = doctor(cluster, "w1", ray__advertise=cluster.lab.machine("w1").address)
    first, last = said.rows["place"]["seen"]["ports"].split("-")
    return int(first), int(last)


def test_an_advertised_address(cluster: Cluster) -> None:
    """Before anything runs on the worker: dropped, refused, open, shut to itself."""
    w1 = cluster.lab.machine("w1")
    advertise = {"ray__advertise": w1.address}
    first, last = block(cluster)
    found = doctor(cluster, "w1", **advertise)
    assert found.results("advertise", "advertise_self") == ["fail", "pass"]
    assert found.rows["advertise"]["code"] == "advertise_dropped"
    assert f"ports {first}-{last}" in found.rows["advertise"]["remedy"]

    w1.nft("add rule inet firewall input meta l4proto tcp reject with tcp reset")
    assert doctor(cluster, "w1", **advertise).rows["advertise"]["code"] == "advertise_refused"

    w1.firewall(range(first, last + 1))
    found = doctor(cluster, "w1", **advertise)
    assert found.results("advertise", "advertise_self", "place") == ["pass"] * 3
    assert found.code == 0

    w1.nft(
        f"insert rule inet firewall input ip saddr {w1.address} ip daddr {w1.address} "
        f"tcp dport {first}-{last} drop"
    )
    found = doctor(cluster, "w1", **advertise)
    assert found.results("advertise", "advertise_self") == ["pass", "fail"]
    assert found.rows["advertise_self"]["code"] == "advertise_self_unreachable"
    w1.firewall()
    found = doctor(cluster, "w1", ray__advertise=cluster.lab.machine("w2").address)
    assert found.results("advertise") == ["fail"], "another machine's address"


def test_the_hub_of_another_user(cluster: Cluster) -> None:
    """The head's daemon is root's here, and its hub is not for `ray`."""
    head = cluster.lab.machine("head")
    directory = "/run/guarded"
    head.write(f"{HOME}/guarded.toml", guarded(cluster, directory))
    argv = [str(cluster.lab.rayfwd), "run", "--config", f"{HOME}/guarded.toml"]
    log = cluster.lab.folder / "guarded.log"
    process = head.popen(argv, user="root", log=log)
    until(lambda: "hub_listening" in log.read_text(), 60, cluster.lab.tails)
    found = doctor(cluster, "w1", head__socket=f"{directory}/hub.sock")
    check_ends_at(found, "hub", "hub_not_permitted")
    process.signal(15)
    process.wait(60)


def guarded(cluster: Cluster, directory: str) -> str:
    config = json.loads(json.dumps(cluster.configs["head"]))
    change(config, {"state_dir": f"{directory}-state", "runtime_dir": directory})
    # Beside the head's own, whose that network is on this machine.
    config["hub"] = {**config.get("hub", {}), "network": "127.88.0.0/16"}
    return tomli_w.dumps(config)


def test_as_the_services_user(cluster: Cluster) -> None:
    """Root's question is answered for the user that the service runs as, or whose the file is."""
    w1 = cluster.lab.machine("w1")
    doctor(cluster, "w1")
    argv = [str(cluster.lab.rayfwd), "--config", CONFIG, "doctor"]
    ran = w1.run([*argv, "--user", "ray"], user="root", check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "pass  auth            logged in as ray" in ran.stdout
    ran = w1.run(argv, user="root", check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "pass  auth            logged in as ray" in ran.stdout, "nothing of another's is root's"


@pytest.mark.runs("rayfwd doctor --report")
def test_a_report(cluster: Cluster) -> None:
    """Beside a daemon, with its real status, configuration and log, and no secret of theirs."""
    cluster.configs["w2"]["ray"]["env"] = {"MY_API_KEY": "open-sesame"}
    worker = cluster.start_node("w2")
    worker.wait_ready()
    w2 = cluster.lab.machine("w2")
    key = w2.host_path(f"{HOME}/state/node.key").read_text().strip()
    log = f"{HOME}/copy.log"
    w2.write(log, worker.log.read_text() + f"the key is {key}\n")
    argv = [str(cluster.lab.rayfwd), "--config", CONFIG, "doctor"]
    ran = w2.run([*argv, "--report", f"{HOME}/report.txt", "--log", log], check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == f"written: {HOME}/report.txt"
    path = w2.host_path(f"{HOME}/report.txt")
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key not in text
    assert "open-sesame" not in text
    assert "PRIVATE KEY" not in text
    for part in ('"session_started"', '"state": "ready"', '"ssh": "ray@198.51.100.1"', '"said"'):
        assert part in text, part
    assert worker.stop() == 0
    del cluster.configs["w2"]["ray"]["env"]


def test_machines_are_as_they_were(cluster: Cluster) -> None:
    """The doctor leaves no process and no file behind."""
    for machine in cluster.lab.machines:
        assert not [line for line in processes(machine) if "doctor" in line.split()]
    assert not cluster.lab.machine("w1").host_path(f"{HOME}/state").exists()


def processes(machine: Machine) -> list[str]:
    return machine.run(["ps", "-eo", "args"], user="root").stdout.splitlines()
