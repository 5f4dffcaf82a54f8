"""Every kind of listener that a program may have, and what another node gets that dials it.

The same at both levels: what takes connections to the node's address and is of Ray's user is
reached, what the file exposes too, and nothing else.
"""

from __future__ import annotations

import json
import signal

from tests.lab.cluster import Cluster
from tests.lab.process import until

DENIED, EXPOSED = 29599, 29598
"""Ports of the file of the machine that is dialled, under `network.deny` and `expose`."""
FILE = {"network.deny": [DENIED], "expose": [EXPOSED]}

SERVE = f"""
import contextlib, json, selectors, socket, sys
own, elsewhere, of_root = sys.argv[1], sys.argv[2], len(sys.argv) > 3
found, numbers, held = {{}}, set(), selectors.DefaultSelector()

def serve(kind, address, port=0, ipv6_only=None, shared=False, protocol=0):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ipv6_only is not None:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, ipv6_only)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((address, port))
    number = sock.getsockname()[1]
    if not port and number in numbers:
        # The kernel may give one number to IPv6 only and to IPv4, and one that was closed again.
        another = serve(kind, address, port, ipv6_only, shared, protocol)
        sock.close()
        return another
    sock.listen()
    numbers.add(number)
    found[kind] = number
    held.register(sock, selectors.EVENT_READ)
    return sock

if of_root:
    serve("of another user", "0.0.0.0")
    serve("exposed", "127.0.0.1", {EXPOSED})
else:
    gone = serve("closed again", "0.0.0.0")
    serve("on this machine's loopback", "127.0.0.1")
    serve("at another address", elsewhere)
    serve("IPv6 only", "::", ipv6_only=True)
    serve("denied", "0.0.0.0", {DENIED})
    serve("IPv6 too", "::", ipv6_only=False)
    serve("shared", "0.0.0.0", shared=True)
    serve("shared", "0.0.0.0", found["shared"], shared=True)
    serve("the node's address", own)
    serve("the node's address by IPv6", "::ffff:" + own, ipv6_only=False)
    try:
        serve("Multipath TCP", "0.0.0.0", protocol=262)  # as servers in Go
    except OSError:
        pass  # not every kernel has it
    for number in range(60):
        serve(f"one of many, {{number}}", "0.0.0.0")
    held.unregister(gone)
    gone.close()
    serve("opened last", "0.0.0.0")
print(json.dumps(found), flush=True)
while True:
    for key, _ in held.select():
        sock, peer = key.fileobj.accept()
        with sock, contextlib.suppress(OSError):  # it has been reset, and comes again
            sock.sendall(peer[0].removeprefix("::ffff:").encode())
"""
REACHED = (
    *("exposed", "IPv6 too", "shared", "the node's address", "Multipath TCP"),
    *("one of many", "opened last"),
)
"""How the names of those begin that others reach."""

DIAL = """
import concurrent.futures, json, socket, sys, time
address, wanted, others = sys.argv[1], *map(json.loads, sys.argv[2:])

def dial(port, patience):
    end = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection((address, port), 20) as sock:
                return sock.recv(99).decode() or "closed"
        except OSError as exc:
            if time.monotonic() > end:
                return type(exc).__name__
            time.sleep(0.2)

with concurrent.futures.ThreadPoolExecutor(16) as pool:
    said = {}
    # What is not to be reached would be known, or is forgotten, when the last of the others is.
    for ports, patience in ((wanted, 20), (others, 0)):
        answers = pool.map(lambda port: dial(port, patience), ports.values())
        said |= dict(zip(ports, answers))
print(json.dumps(said))
"""


def check(cluster: Cluster, where: str, on: str = "w1") -> None:
    """Have all kinds `on` a machine, and dial them from a program of Ray's user on another."""
    dialled, machine = cluster.worker(on), cluster.lab.machine(where)
    python = str(machine.ray_python(cluster.ray_version))
    address = dialled.status()["node"]["address"]
    argv = [python, "-c", SERVE, address, dialled.machine.address]
    servers = [dialled.machine.popen([*argv, "as root"], user="root")]
    until(lambda: "}" in servers[0].log.read_text(), 30, servers[0].log.read_text)
    servers.append(dialled.machine.popen(argv))
    until(lambda: "}" in servers[1].log.read_text(), 30, servers[1].log.read_text)
    ports = {kind: p for s in servers for kind, p in json.loads(s.log.read_text()).items()}
    wanted = {kind: port for kind, port in ports.items() if kind.startswith(REACHED)}
    others = {kind: port for kind, port in ports.items() if kind not in wanted}
    try:
        words = [address, json.dumps(wanted), json.dumps(others)]
        said = json.loads(machine.run([python, "-c", DIAL, *words], timeout=120).stdout)
    finally:
        for server in servers:
            server.signal(signal.SIGKILL)
            server.wait(20)
    own = next(d for d in cluster.daemons if d.machine is machine).status()["node"]["address"]
    right = dict.fromkeys(wanted, own) | {"exposed": "127.0.0.1"}
    right |= dict.fromkeys(others, "ConnectionRefusedError")
    wrong = {kind: what for kind, what in said.items() if what != right[kind]}
    assert (wrong, len(others)) == ({}, 6), wrong
