"""Runs every kind of Ray work against every node and prints one JSON line a check.

Run by Ray's own Python on a machine of the lab; it needs the standard library and Ray only, so
that it runs with every version of Ray. A line is
`{"check": …, "node": …, "ok": …, "seconds": …, "error": …}`; `node` is a node's address, or
`from>to` where two take part. Every wait has an end: what hangs is a named failure. Nothing is
retried (`max_retries=0`): what is lost once is seen.

Exit code 0 if all went well, 1 if a check failed, 2 if it could not begin.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["RAY_DEDUP_LOGS"] = "0"  # every line of every worker is to be seen

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

SMALL = 2_000
ESSENTIAL = (
    "small_tasks",
    "large_results",
    "large_arguments",
    "actors",
    "borrowed_large",
    "borrowed_small",
    "nested_tasks",
    "worker_to_worker",
)
FURTHER = (
    "placement_group",
    "log_lines",
    "dashboard_page",
    "dashboard_agents",
    "list_nodes",
    "job_submit",
    "ray_client",
    "runtime_env",
)


class Settings:
    """What the command line says."""

    patience = 60.0
    large = 50_000_000
    dashboard = "http://127.0.0.1:8265"
    client = "127.77.0.1:10001"
    results = sys.stdout


def content(label: str, size: int) -> bytes:
    """Bytes that no other label has and that both sides can make."""
    return hashlib.shake_256(label.encode()).digest(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetch(reference: Any) -> Any:
    return ray.get(reference, timeout=Settings.patience)


def expect(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise AssertionError(f"{what}: {str(found)[:200]} instead of {str(wanted)[:200]}")


def say(check: str, node: str, ok: bool, began: float, error: str | None = None) -> bool:
    line = {
        "check": check,
        "node": node,
        "ok": ok,
        "seconds": round(time.monotonic() - began, 2),
        "error": error,
    }
    print(json.dumps(line), file=Settings.results, flush=True)
    return ok


class Node:
    def __init__(self, entry: dict[str, Any]) -> None:
        self.id = entry["NodeID"]
        self.address = entry["NodeManagerAddress"]

    def here(self) -> Any:
        return NodeAffinitySchedulingStrategy(self.id, soft=False)


# Remote functions. What they need of this file travels with them: a worker cannot import it.


def _remote(function: Callable[..., Any]) -> Any:
    return ray.remote(max_retries=0)(function)


@_remote
def where(number: int) -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), number + 1


@_remote
def make(label: str, size: int) -> bytes:
    return hashlib.shake_256(label.encode()).digest(size)


@_remote
def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@_remote
def digest_of_borrowed(references: list[Any], patience: float) -> str:
    return hashlib.sha256(ray.get(references[0], timeout=patience)).hexdigest()


@_remote
def outer(target: str, label: str, patience: float) -> tuple[str, Any]:
    strategy = NodeAffinitySchedulingStrategy(target, soft=False)

    def inner(text: str) -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), text[::-1]

    there = ray.remote(max_retries=0, scheduling_strategy=strategy)(inner)
    found = ray.get(there.remote(label), timeout=patience)
    return ray.get_runtime_context().get_node_id(), found


@_remote
def speak(line: str) -> str:
    print(line, flush=True)
    return str(ray.get_runtime_context().get_node_id())


@_remote
def read_file(name: str) -> tuple[str, str]:
    with open(name) as file:
        return ray.get_runtime_context().get_node_id(), file.read()


class _Keeper:
    """An actor that counts, makes objects of its own and keeps references of others."""

    def __init__(self) -> None:
        self.count = 0
        self.kept: list[Any] = []

    def add(self, number: int) -> tuple[str, int]:
        self.count += number
        return ray.get_runtime_context().get_node_id(), self.count

    def put(self, label: str, size: int) -> list[Any]:
        """A reference that this actor owns."""
        return [ray.put(hashlib.shake_256(label.encode()).digest(size))]

    def small(self, label: str, size: int, node: str) -> list[Any]:
        """A reference to a small result that only its owner, this actor, has in memory."""

        def tiny() -> bytes:
            return hashlib.shake_256(label.encode()).digest(size)

        here = NodeAffinitySchedulingStrategy(node, soft=False)
        return [ray.remote(max_retries=0, num_cpus=0, scheduling_strategy=here)(tiny).remote()]

    def keep(self, references: list[Any]) -> None:
        self.kept = references

    def digest_of_kept(self, patience: float) -> str:
        return hashlib.sha256(ray.get(self.kept[0], timeout=patience)).hexdigest()


Keeper = ray.remote(max_restarts=0, max_task_retries=0, num_cpus=0)(_Keeper)


Ends = Iterator[tuple[str, Callable[[], None]]]
"""Of each node (or `from>to`) the function that awaits the end and looks at it."""


class Run:
    """One driver's checks. A check is begun on every node, then its ends are awaited."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.actors: dict[str, Any] = {}

    def actor(self, node: Node) -> Any:
        if node.id not in self.actors:
            self.actors[node.id] = Keeper.options(scheduling_strategy=node.here()).remote()
        return self.actors[node.id]

    def pairs(self) -> list[tuple[Node, Node]]:
        return [(a, b) for a in self.nodes for b in self.nodes if a is not b]

    def small_tasks(self) -> Ends:
        for node in self.nodes:
            made = [where.options(scheduling_strategy=node.here()).remote(n) for n in range(20)]

            def end(node: Node = node, made: Any = made) -> None:
                expect(fetch(made), [(node.id, n + 1) for n in range(20)], "node and result")

            yield node.address, end

    def large_results(self) -> Ends:
        for node in self.nodes:
            label = f"result {node.id}"
            made = make.options(scheduling_strategy=node.here()).remote(label, Settings.large)

            def end(label: str = label, made: Any = made) -> None:
                data = fetch(made)
                expect(len(data), Settings.large, "length")
                expect(digest(data), digest(content(label, Settings.large)), "digest")

            yield node.address, end

    def large_arguments(self) -> Ends:
        for node in self.nodes:
            data = content(f"argument {node.id}", Settings.large)
            there = digest_of.options(scheduling_strategy=node.here()).remote(data)

            wanted = digest(data)

            def end(there: Any = there, wanted: str = wanted) -> None:
                expect(fetch(there), wanted, "digest")

            yield node.address, end

    def actors_(self) -> Ends:
        for node in self.nodes:
            made = [self.actor(node).add.remote(n) for n in range(1, 51)]

            def end(node: Node = node, made: Any = made) -> None:
                wanted = [(node.id, n * (n + 1) // 2) for n in range(1, 51)]
                expect(fetch(made), wanted, "node and sum")

            yield node.address, end

    def borrowed_large(self) -> Ends:
        yield from self._borrowed(
            "large", Settings.large, lambda owner, label: owner.put.remote(label, Settings.large)
        )

    def borrowed_small(self) -> Ends:
        yield from self._borrowed("small", SMALL, None)

    def _borrowed(self, kind: str, size: int, put: Callable[[Any, str], Any] | None) -> Ends:
        """The driver's own reference to every node, and every node's to every other."""
        for node in self.nodes:
            label = f"driver's {kind} {node.id}"
            mine = ray.put(content(label, size)) if put else make.remote(label, size)
            task = digest_of_borrowed.options(scheduling_strategy=node.here())
            there = task.remote([mine], Settings.patience)
            kept = self.actor(node).keep.remote([mine])

            def end(
                node: Node = node, label: str = label, there: Any = there, kept: Any = kept
            ) -> None:
                fetch(kept)
                wanted = digest(content(label, size))
                expect(fetch(there), wanted, "digest in a task")
                actor = self.actor(node)
                found = fetch(actor.digest_of_kept.remote(Settings.patience))
                expect(found, wanted, "digest in an actor")

            yield f"driver>{node.address}", end
        for a, b in self.pairs():
            label = f"{kind} {a.id} {b.id}"

            def end_pair(a: Node = a, b: Node = b, label: str = label) -> None:
                owner = self.actor(a)
                given = put(owner, label) if put else owner.small.remote(label, size, a.id)
                task = digest_of_borrowed.options(scheduling_strategy=b.here())
                there = task.remote(fetch(given), Settings.patience)
                expect(fetch(there), digest(content(label, size)), "digest")

            yield f"{a.address}>{b.address}", end_pair

    def nested_tasks(self) -> Ends:
        for a in self.nodes:
            for b in self.nodes:
                label = f"{a.id} {b.id}"

                def end(a: Node = a, b: Node = b, label: str = label) -> None:
                    task = outer.options(scheduling_strategy=a.here())
                    found = fetch(task.remote(b.id, label, Settings.patience))
                    expect(found, (a.id, (b.id, label[::-1])), "nodes and result")

                yield f"{a.address}>{b.address}", end

    def worker_to_worker(self) -> Ends:
        """The driver passes a result on without ever fetching it."""
        for a, b in self.pairs():
            label = f"pulled {a.id} {b.id}"

            def end(a: Node = a, b: Node = b, label: str = label) -> None:
                made = make.options(scheduling_strategy=a.here()).remote(label, Settings.large)
                there = digest_of.options(scheduling_strategy=b.here()).remote(made)
                expect(fetch(there), digest(content(label, Settings.large)), "digest")

            yield f"{a.address}>{b.address}", end

    def placement_group(self) -> Ends:
        def end() -> None:
            group = placement_group([{"CPU": 1}] * len(self.nodes), strategy="STRICT_SPREAD")
            try:
                fetch(group.ready())
                made = []
                for bundle in range(len(self.nodes)):
                    strategy = PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=bundle
                    )
                    made.append(where.options(scheduling_strategy=strategy).remote(bundle))
                found = sorted(node for node, _ in fetch(made))
                expect(found, sorted(node.id for node in self.nodes), "nodes")
            finally:
                remove_placement_group(group)

        yield "all", end

    def log_lines(self) -> Ends:
        for node in self.nodes:
            line = f"a line of {uuid.uuid4().hex}"
            spoken = speak.options(scheduling_strategy=node.here()).remote(line)

            def end(node: Node = node, line: str = line, spoken: Any = spoken) -> None:
                expect(fetch(spoken), node.id, "node")
                wait_until(lambda: line in own_output(), "the line is not in the driver's output")

            yield node.address, end

    def dashboard_page(self) -> Ends:
        def end() -> None:
            page = get(Settings.dashboard + "/").decode()
            expect("<title>Ray Dashboard</title>" in page, True, "the page's title is there")
            script = page.split('src="./', 1)[1].split('"', 1)[0]
            body = get(f"{Settings.dashboard}/{script}")
            expect(len(body) > 500_000, True, f"{script} has more than 500,000 bytes")

        yield "head", end

    def dashboard_agents(self) -> Ends:
        """An agent reports every few seconds; without reports the entry has no such figures."""
        for node in self.nodes:

            def seen(node: Node = node) -> dict[str, Any]:
                page = json.loads(get(Settings.dashboard + "/nodes?view=summary"))
                entries: list[dict[str, Any]] = page["data"]["summary"]
                ours = (e for e in entries if e.get("raylet", {}).get("nodeId") == node.id)
                return next(ours, {})

            def end(seen: Any = seen, node: Node = node) -> None:
                def reports() -> bool:
                    entry = seen()
                    return bool(
                        entry.get("ip") == node.address
                        and entry.get("agent", {}).get("pid", 0) > 0
                        and entry.get("mem", [0])[0] > 0
                        and "bootTime" in entry
                    )

                wait_until(reports, "no figures of its agent in /nodes?view=summary")
                first = seen()["now"]
                wait_until(lambda: seen()["now"] > first, "its agent's figures do not move on")

            yield node.address, end

    def list_nodes(self) -> Ends:
        def end() -> None:
            found = json.loads(run([beside("ray"), "list", "nodes", "--format", "json"]))
            states = sorted((entry["node_ip"], entry["state"]) for entry in found)
            expect(states, sorted((n.address, "ALIVE") for n in self.nodes), "nodes and states")

        yield "head", end

    def job_submit(self) -> Ends:
        word = f"word-{uuid.uuid4().hex}"
        program = (
            "import ray; ray.init(address='auto', log_to_driver=False); "
            "f = ray.remote(lambda: 6 * 7); "
            f"print('{word}', ray.get(f.remote()))"
        )

        def end() -> None:
            command = [beside("ray"), "job", "submit", "--address", Settings.dashboard, "--"]
            output = run([*command, sys.executable, "-c", program], factor=2)
            expect(f"{word} 42" in output, True, "the job's line is in " + output[-500:])
            expect("succeeded" in output, True, "'succeeded' is in " + output[-500:])

        yield "head", end

    def ray_client(self) -> Ends:
        def end() -> None:
            wanted = ",".join(n.id for n in self.nodes)
            output = run(
                [sys.executable, __file__, "--as-client", Settings.client, "--ids", wanted],
                factor=2,
            )
            expect(output.splitlines()[-1:], ["the client is content"], "last line")

        yield "head", end

    def runtime_env(self) -> Ends:
        """In a second connection: a working directory belongs to a whole job."""
        secret = uuid.uuid4().hex
        ray.shutdown()
        self.actors.clear()
        with tempfile.TemporaryDirectory() as directory:
            with open(os.path.join(directory, "here.txt"), "w") as file:
                file.write(secret)
            connect({"working_dir": directory})
        for node in self.nodes:
            there = read_file.options(scheduling_strategy=node.here()).remote("here.txt")

            def end(node: Node = node, there: Any = there) -> None:
                expect(fetch(there), (node.id, secret), "node and the file's content")

            yield node.address, end


def act_as_client(address: str, ids: list[str]) -> None:
    """A Ray Client of its own process: small and larger things, on every node."""
    ray.init(f"ray://{address}")
    for node in ids:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        expect(fetch(where.options(scheduling_strategy=there).remote(1)), (node, 2), "node, result")
        data = content(node, 5_000_000)
        expect(
            fetch(digest_of.options(scheduling_strategy=there).remote(data)),
            digest(data),
            "digest",
        )
        back = fetch(make.options(scheduling_strategy=there).remote(node, 5_000_000))
        expect(digest(back), digest(data), "digest of the result")
    print("the client is content", flush=True)


# Small parts


def beside(command: str) -> str:
    return os.path.join(os.path.dirname(sys.executable), command)


def run(argv: Sequence[str], factor: float = 1) -> str:
    """Its standard output. Raises with what it said where it fails or takes too long."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": path},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=factor * Settings.patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise TimeoutError(f"{argv[:4]} did not end; it said {(output + errors)[-800:]}") from None
    if process.returncode != 0:
        said = (output + errors)[-800:]
        raise RuntimeError(f"{argv[:4]} ended with {process.returncode}; it said {said}")
    return output


def get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=Settings.patience) as answer:
        return bytes(answer.read())


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + Settings.patience
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(otherwise)
        time.sleep(0.25)


def own_output() -> str:
    """Everything that this process has written to its standard output so far."""
    sys.stdout.flush()
    with open(OUTPUT.name) as file:
        return file.read()


OUTPUT = tempfile.NamedTemporaryFile("w+", prefix="driver-output-")  # noqa: SIM115  until the end


def divert_output() -> None:
    """Give the results a way of their own, and the driver a standard output that can be read."""
    Settings.results = os.fdopen(os.dup(1), "w")
    os.dup2(OUTPUT.fileno(), 1)


@contextlib.contextmanager
def watchdog(check: str, seconds: float) -> Iterator[None]:
    """Where Ray's own time-outs fail, the check is still named before the process ends."""

    def bark() -> None:
        say(check, "?", False, began, f"no end after {seconds:.0f} s: the driver was given up")
        os._exit(1)

    began = time.monotonic()
    timer = threading.Timer(seconds, bark)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def attempt(check: str, checks: Run) -> bool:
    """Whether all of the check's lines are good."""
    good = True
    begun = time.monotonic()
    try:
        ends = list(getattr(checks, {"actors": "actors_"}.get(check, check))())
    except Exception as exc:
        return say(check, "all", False, begun, f"could not begin: {type(exc).__name__}: {exc}")
    for node, end in ends:
        try:
            end()
        except Exception as exc:
            text = f"{type(exc).__name__}: {exc}".replace("\n", " | ")
            good = say(check, node, False, begun, text[:1500]) and good
        else:
            say(check, node, True, begun)
        begun = time.monotonic()
    return good


def connect(runtime_env: dict[str, Any] | None = None) -> None:
    ray.init(address="auto", runtime_env=runtime_env, logging_level="WARNING")


def alive_nodes(number: int) -> list[Node]:
    """The nodes that are there, once there are as many as there should be."""
    end = time.monotonic() + Settings.patience
    while True:
        nodes = [Node(entry) for entry in ray.nodes() if entry["Alive"]]
        if len(nodes) == number:
            return sorted(nodes, key=lambda node: node.address)
        if time.monotonic() > end:
            raise TimeoutError(f"{len(nodes)} nodes are alive, not {number}")
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", default="all", help="all, essential, or names with commas")
    parser.add_argument("--without", default="", help="names with commas")
    parser.add_argument("--nodes", type=int, default=3, help="how many nodes there must be")
    parser.add_argument("--patience", type=float, default=Settings.patience, metavar="SECONDS")
    parser.add_argument("--large", type=int, default=Settings.large, metavar="BYTES")
    parser.add_argument("--dashboard", default=Settings.dashboard, metavar="URL")
    parser.add_argument("--client", default=Settings.client, metavar="HOST:PORT")
    parser.add_argument("--as-client", metavar="HOST:PORT", help=argparse.SUPPRESS)
    parser.add_argument("--ids", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    Settings.patience = args.patience
    Settings.large = args.large
    Settings.dashboard = args.dashboard
    Settings.client = args.client
    if args.as_client:
        act_as_client(args.as_client, args.ids.split(","))
        return 0
    divert_output()
    names = {"all": ESSENTIAL + FURTHER, "essential": ESSENTIAL}.get(args.checks)
    names = names or tuple(args.checks.split(","))
    skipped = args.without.split(",")
    began = time.monotonic()
    try:
        with watchdog("connect", 2 * args.patience):
            connect()
            checks = Run(alive_nodes(args.nodes))
    except Exception as exc:
        say("connect", "head", False, began, f"{type(exc).__name__}: {exc}")
        return 2
    say("connect", "head", True, began)
    good = True
    for name in names:
        if name not in skipped:
            with watchdog(name, 12 * args.patience):
                good = attempt(name, checks) and good
    with watchdog("disconnect", args.patience):
        ray.shutdown()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
