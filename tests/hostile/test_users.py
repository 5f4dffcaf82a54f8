"""Other users of the honest worker's machine, at its listeners and at rayfwd's sockets."""

from __future__ import annotations

import json
import signal

from tests.hostile.scene import HERE, Scene
from tests.lab.cluster import RUNTIME_DIR
from tests.lab.process import until

NOBODY = 65534

FLOOD = """
import json, socket, sys, time
places = json.loads(sys.argv[1])
end = time.monotonic() + float(sys.argv[2])
came = {"reset": 0, "else": 0, "read": ""}
turn = 0
while time.monotonic() < end:
    turn += 1
    with socket.socket() as sock:
        sock.settimeout(20)
        try:
            sock.connect(tuple(places[turn % len(places)]))
            sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            came["read"] += sock.recv(100).decode("latin-1")
            came["else"] += 1
        except (ConnectionResetError, BrokenPipeError):
            came["reset"] += 1
print(json.dumps(came))
"""

HELD = """
import json, socket, sys, time
places = json.loads(sys.argv[1])
held, refused = [], 0
for turn in range(int(sys.argv[2])):
    sock = socket.socket()
    sock.settimeout(20)
    try:
        sock.connect(tuple(places[turn % len(places)]))
        held.append(sock)
    except OSError:
        refused += 1
alive, end = 0, time.monotonic() + 20
for sock in held:
    try:
        sock.settimeout(max(0.01, end - time.monotonic()))
        alive += sock.recv(1) != b""
    except TimeoutError:
        alive += 1
    except OSError:
        pass
print(alive)
"""

SQUAT = """
import json, socket, sys, time
places = json.loads(sys.argv[1])
print("begun", flush=True)
while True:
    for place in places:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(tuple(place))
            sock.listen()
            print("bound", place, flush=True)
        except OSError:
            pass
        sock.close()
"""

STAND_IN = """
import json, socket, sys
listening = []
for place in json.loads(sys.argv[1]):
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(tuple(place))
    sock.listen()
    listening.append(sock)
print("listening", flush=True)
import selectors
selector = selectors.DefaultSelector()
for sock in listening:
    selector.register(sock, selectors.EVENT_READ)
while True:
    for key, _ in selector.select():
        if key.fileobj in listening:
            selector.register(key.fileobj.accept()[0], selectors.EVENT_READ)
        elif data := key.fileobj.recv(4096):
            print("was sent", data, flush=True)
        else:
            selector.unregister(key.fileobj)
"""

CONNECT = """
import socket, sys
for path in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
            print("let in")
        except OSError as exc:
            print(type(exc).__name__)
"""


def places(scene: Scene) -> str:
    """Listeners of the worker: for the head's services, and the one of its own."""
    head = scene.address
    return json.dumps([[head, 6379], [head, 8265], [head, 10001], ["127.0.0.1", HERE]])


def test_a_flood_at_the_listeners(scene: Scene) -> None:
    """Each is reset before anything is read, and all of it is a line or two of log."""
    with scene.attack(on=scene.worker, log=20_000):
        came = json.loads(scene.run_as(scene.w1, NOBODY, FLOOD, places(scene), 4))
    assert came["reset"] > 50
    assert (came["else"], came["read"]) == (0, "")
    assert len(scene.worker.events("connection_refused")) <= 4


def test_connections_that_are_held(scene: Scene) -> None:
    with scene.attack(on=scene.worker, log=20_000):
        alive = int(scene.run_as(scene.w1, NOBODY, HELD, places(scene), 2000))
    assert alive == 0


def test_the_sockets_of_a_daemon(scene: Scene) -> None:
    with scene.attack():
        for machine in (scene.head, scene.w1):
            paths = [f"{RUNTIME_DIR}/{name}" for name in ("control.sock", "hub.sock")]
            said = scene.run_as(machine, NOBODY, CONNECT, *paths).split()
            assert said == ["PermissionError"] * 2


def test_nobody_slips_in_while_the_daemon_is_restarted(scene: Scene) -> None:
    """The sockets that listen go from one process to the next."""
    squatter = scene.start_as(scene.w1, NOBODY, SQUAT, places(scene))
    until(lambda: "begun" in squatter.log.read_text(), 20, scene.lab.tails)
    before = len(scene.worker.events("rayfwd_ready"))
    scene.worker.process.signal(signal.SIGUSR2)
    until(lambda: len(scene.worker.events("rayfwd_ready")) > before, 60, scene.lab.tails)
    after = scene.honest.for_a_while()
    squatter.signal(signal.SIGKILL)
    squatter.wait()
    assert "bound" not in squatter.log.read_text()
    assert not after.failed


def test_whoever_takes_a_listeners_place_is_named_and_told_nothing(scene: Scene) -> None:
    """Where no service manager holds the sockets, a crash leaves a gap: the node knows."""
    taken = json.dumps(json.loads(places(scene))[:3])  # what stands for the head
    scene.worker.kill()
    stranger = scene.start_as(scene.w1, NOBODY, STAND_IN, taken)
    until(lambda: "listening" in stranger.log.read_text(), 20, scene.lab.tails)
    scene.cluster.start_node("w1")
    blocked = scene.worker.wait_event("listener_blocked", 60)
    assert "nobody" in blocked["cause"]
    status = scene.worker.wait_status(lambda s: s["link"]["state"] == "up", 60)
    assert status["state"] == "waiting"
    assert "listener_blocked" in {c["code"] for c in status["conditions"] if c["blocks_ready"]}
    stranger.signal(signal.SIGKILL)
    stranger.wait()
    assert "was sent" not in stranger.log.read_text()
    scene.worker.wait_status(lambda s: s["state"] == "ready", 60)
    assert not scene.honest.for_a_while().failed
