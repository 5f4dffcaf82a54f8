"""Whole daemons of a head and of workers in one process: real roles, hub, sessions and listeners.

There is no SSH (a lane is a connection to the hub's socket), no Ray (`FakeRay`), and no signals.
As all the machines are this one, a node's listeners for others' ports listen beside those.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from rayfwd import codes
from rayfwd.cluster.plan import NodePlan
from rayfwd.config import HeadConfig, load
from rayfwd.daemon import handover
from rayfwd.daemon.head import HeadRole
from rayfwd.daemon.lifetime import Front
from rayfwd.daemon.main import role_of
from rayfwd.daemon.node import Makers
from rayfwd.daemon.resources import claimed
from rayfwd.daemon.role import Role
from rayfwd.daemon.runtime import Runtime
from rayfwd.daemon.worker import WorkerRole
from rayfwd.problems import Problem
from rayfwd.ray.install import Versions
from rayfwd.ray.supervisor import RaySupervisor
from rayfwd.ray.token import RayAuth
from rayfwd.session.frames import Chunk
from rayfwd.session.snapshot import Tree
from rayfwd.session.target import Target
from rayfwd.ssh.carriers import carrier_for
from rayfwd.status import Worker
from rayfwd.system import fdpass
from rayfwd.system.control import ask
from rayfwd.system.fdpass import Packed
from rayfwd.system.notify import Notifier
from rayfwd.system.sockdiag import ListeningSocket
from rayfwd.system.steps import Begin, no_step
from rayfwd.transport.carrier import Carrier, PipeOwner
from rayfwd.transport.listeners import Listeners
from rayfwd.transport.writev import write
from tests.unit.cluster import NETWORK, free_place
from tests.unit.loops import until
from tests.unit.ports import free_port

STOP_SECONDS = 0.1
"""As a real one does, it takes a while: what was said before it has arrived by then."""
VERSIONS = Versions("2.60.0", "3.11.7")


class FakeRay(RaySupervisor):
    """Is up as soon as it may be, and starts nothing."""

    planned = False
    may_start = True
    broken = False
    ended = ""
    by_hand = False
    starts = 1
    auth: RayAuth | None = None
    """What Ray was last to be started with."""

    def set_plan(
        self,
        own: NodePlan,
        head: NodePlan,
        head_versions: Versions | None,
        ride_through: float,
        network: str | None = None,
        auth: RayAuth | None = None,
        interface: str | None = None,
    ) -> None:
        self.planned, self.auth = True, auth
        self._wake.set()

    def set_link_up(self, up: bool) -> None:
        self.may_start = up
        self._wake.set()

    async def run(self) -> None:
        while True:
            if self.planned and self.may_start and self.now.state == "waiting":
                self.become("up", versions=VERSIONS)
            self._wake.clear()
            await self._wake.wait()
            if self.broken:
                raise ValueError("a fault of Ray's supervisor")

    @property
    def own_start(self) -> str:
        return str(self.starts)

    @property
    def head_start(self) -> str | None:
        """Which start of the head's Ray it was told of last."""
        return self._head_start

    def become(self, state: Any, **fields: Any) -> None:
        self.now = replace(self.now, state=state, **fields)
        self._on_change()

    async def stop(self, begin: Begin = no_step) -> None:
        begin("ray_tasks")
        await asyncio.sleep(STOP_SECONDS)
        self.ended = "stopped"

    async def leave(self) -> None:
        self.ended = "left running"


def beside(index: int) -> type[Listeners]:
    """The listeners of the node with this number, at other addresses than the nodes' own."""

    class Beside(Listeners):
        def set_wanted(
            self,
            listeners: Mapping[Target, Target],
            passing: Mapping[Target, Target] = MappingProxyType({}),
        ) -> None:
            super().set_wanted(
                {_moved(at, index): to for at, to in listeners.items()},
                {_moved(at, index): to for at, to in passing.items()},
            )

        def place_of(self, target: Target) -> Target:
            return _moved(target, index)

    return Beside


def _moved(at: Target, index: int) -> Target:
    network, _, last = at.address.rpartition(".")
    if f"{network}.0/24" != NETWORK or int(last) > 20:
        return at
    return Target(f"{network}.{20 * (index + 1) + int(last)}", at.port)


class NoClaim:
    """All machines of a test are this one, and so have one network."""

    problem: Problem | None = None

    def take(self, network: str) -> bool:
        return True

    def close(self) -> None: ...


class SocketPipe(asyncio.Protocol):
    """A byte stream to the hub's socket, on the same machine."""

    def __init__(self, owner: PipeOwner) -> None:
        self.paused = False
        self.swallows = False
        """What is sent, either way, is lost in silence."""
        self.transport: asyncio.Transport | None = None
        self._owner = owner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self.swallows:
            self._owner.pipe_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.pipe_lost(str(exc or "closed by the head"))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._owner.pipe_writable()

    def write(self, chunks: Sequence[Chunk]) -> None:
        assert self.transport is not None
        if not self.swallows:
            write(self.transport, chunks)

    def carry(
        self, deliver: Callable[[Sequence[bytes | memoryview]], None], resume: Callable[[], None]
    ) -> None: ...

    def close(self) -> None:
        assert self.transport is not None
        self.transport.close()

    def abort(self) -> None:
        assert self.transport is not None
        self.transport.abort()


class DirectCarrier:
    """Connects to another worker's socket itself, unless it is barred."""

    def __init__(self, way: HeadConfig) -> None:
        self.connections: list[SocketConnection] = []
        self.barred = False
        self._path = way.socket

    def close(self, parked: bool = False) -> None:
        """Its connections share nothing."""

    async def dial(self, urgent: asyncio.Event) -> SocketConnection:
        if self.barred:
            raise codes.SSH_UNREACHABLE.error("no answer", "see that it is up")
        self.connections.append(SocketConnection(self._path))
        return self.connections[-1]

    def cut(self) -> None:
        """The way is gone: every lane dies at once, and none can be made."""
        self.barred = True
        for connection in self.connections:
            connection.abort()
        self.connections.clear()

    def swallow(self) -> None:
        """The same, and nobody says so."""
        self.barred = True
        for connection in self.connections:
            if connection.pipe is not None:
                connection.pipe.swallows = True


class SocketConnection:
    """Holds one pipe at the most."""

    def __init__(self, path: Path) -> None:
        self.pipe: SocketPipe | None = None
        self._path = path

    async def open(self, owner: PipeOwner) -> SocketPipe:
        loop = asyncio.get_running_loop()
        try:
            _, self.pipe = await loop.create_unix_connection(
                lambda: SocketPipe(owner), str(self._path)
            )
        except OSError as exc:
            raise codes.HUB_ABSENT.error(str(exc), "start it") from exc
        return self.pipe

    async def tune(self) -> None: ...

    def keep_alive(self) -> None: ...

    @property
    def takes_another(self) -> bool:
        return False

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if self.pipe is not None:
            self.pipe.abort()


class SocketCarrier:
    """Connects to the hub's socket itself."""

    def __init__(self, head: HeadConfig) -> None:
        self.connections: list[SocketConnection] = []
        self._path = head.socket

    def close(self, parked: bool = False) -> None:
        """Its connections share nothing."""

    async def dial(self, urgent: asyncio.Event) -> SocketConnection:
        self.connections.append(SocketConnection(self._path))
        return self.connections[-1]

    def cut(self) -> None:
        """Every lane dies at once."""
        for connection in self.connections:
            connection.abort()
        self.connections.clear()


class Daemon:
    """One node: its file, and the runtime and the role that run now, if they do."""

    def __init__(self, site: Site, name: str, index: int) -> None:
        self.name = self.directory_name = name
        self.expose = free_port()
        self.forwards: dict[Target, str] = {}
        self.worker_ports = 8
        self.more = ""
        """What its file has besides, before the sections."""
        self.place = ""
        """A head: what its [hub] has besides."""
        self.dialled = False
        """A worker: the head dials it, and it dials nobody."""
        self.dials_in_vain = False
        """It dials as well, where nobody answers."""
        self.listening: list[ListeningSocket] = []
        """What programs listen on, as it seems: the machine's own sockets are no node's."""
        self.carrier: SocketCarrier | None = None
        self.directs: list[str] = []
        """A worker: the others that its file has a [[direct]] for."""
        self.direct: Literal["told", "off"] = "told"
        self.direct_ssh = ""
        """The keys by which these are dialled with real SSH; empty: by their sockets."""
        self.front: Front | None = None
        self.direct_carriers: dict[str, DirectCarrier] = {}
        self._site = site
        self._index = index
        self._runtime: Runtime | None = None
        self._role: Role | None = None
        self._task: asyncio.Task[None] | None = None

    def listens_for(self, target: Target) -> Target:
        """Where its listener for a port of another node is."""
        return _moved(target, self._index)

    @property
    def directory(self) -> Path:
        return self._site.directory / self.directory_name

    @property
    def file(self) -> Path:
        return self._site.directory / f"{self.directory_name}.toml"

    @property
    def runtime(self) -> Runtime:
        assert self._runtime is not None, "it was started"
        return self._runtime

    @property
    def role(self) -> Role:
        assert self._role is not None, "it was started"
        return self._role

    @property
    def worker(self) -> WorkerRole:
        assert isinstance(self.role, WorkerRole)
        return self.role

    @property
    def head(self) -> HeadRole:
        assert isinstance(self.role, HeadRole)
        return self.role

    @property
    def ray(self) -> FakeRay:
        assert isinstance(self.role.node.ray, FakeRay)
        return self.role.node.ray

    def write(self) -> None:
        """The file, as it is to be from now on."""
        head = self._site.head
        rows = [
            f'name = "{self.name}"',
            f'role = "{"head" if self is head else "worker"}"',
            f'state_dir = "{self.directory}/state"',
            f'runtime_dir = "{self.directory}/run"',
            f"ride_through = {self._site.ride_through}",
            f"expose = [{self.expose}]",
            self.more,
            *([] if self.forwards else ["forward = []"]),
            f'[hub]\nnetwork = "{NETWORK}"\n{self.place}\n{self._dials()}'
            if self is head
            else "[head]\ndialled = true\n"
            + 'ssh = "nobody"\nsocket = "/nowhere"' * self.dials_in_vain
            if self.dialled
            else f'[head]\nssh = "head"\nsocket = "{head.directory}/run/hub.sock"',
            f'[ray]\ncommand = "{self.directory}/no-ray"\nworker_ports = {self.worker_ports}',
            "[canary]\nenabled = false",
            f'[network]\nlevel = "listeners"\ndirect = "{self.direct}"',
        ]
        for name in self.directs:
            place = self._site.node(name).directory / "run/peers.sock"
            way = self.direct_ssh or f'ssh = "{name}"\nsocket = "{place}"'
            rows.append(f'[[direct]]\nnode = "{name}"\n{way}')
        for at, to in self.forwards.items():
            rows.append(f'[[forward]]\nlisten = "{at}"\nto = "{to}"')
        self.file.write_text("\n".join(rows) + "\n")

    def _dials(self) -> str:
        """Of a head: the workers that it dials."""
        dialled = [worker for worker in self._site.workers.values() if worker.dialled]
        return "".join(
            f'[[hub.dial]]\nssh = "{each.name}"\nsocket = "{each.directory}/run/link.sock"\n'
            for each in dialled
        )

    async def start(
        self, left: Packed | None = None, damage: Callable[[Tree], None] | None = None
    ) -> None:
        """Begin, with what an earlier process of it has left."""
        self.write()
        config = load(self.file)
        config.state_dir.parent.mkdir(exist_ok=True)
        arrival = None
        if left is not None:
            with left.bundle, left.other_end:
                unpacked = fdpass.unpack(left.bundle)
            assert unpacked is not None
            arrival = handover.opened(*unpacked, config.role, config.name)
            if damage is not None:
                damage(arrival.tree)
        with ExitStack() as stack:
            stack.enter_context(claimed(config))
            if arrival is not None:
                stack.callback(arrival.close)
            self._role = role_of(config, self._makers())
            self._runtime = Runtime(self._role, Notifier(), arrival, front=self.front)
            running = self._run(self._runtime, stack.pop_all())
        self._task = asyncio.create_task(running, name=f"daemon {self.name}")
        await until(lambda: config.control_socket.exists() or self.over)

    @property
    def over(self) -> bool:
        """It was not started, or has ended."""
        return self._task is None or self._task.done()

    async def _run(self, runtime: Runtime, stack: ExitStack) -> None:
        with stack:
            await runtime.run()

    def _makers(self) -> Makers:
        return Makers(
            FakeRay, beside(self._index), self._make_carrier, NoClaim, lambda _: self.listening
        )

    def _make_carrier(self, head: HeadConfig) -> Carrier:
        if head.identity is not None:
            return carrier_for(head)
        if head.socket.name == "peers.sock":
            self.direct_carriers[head.ssh] = made = DirectCarrier(head)
            return made
        self.carrier = SocketCarrier(head)
        return self.carrier

    def cut(self) -> None:
        assert self.carrier is not None
        self.carrier.cut()

    async def ready(self) -> None:
        """It says so, and its forwards are open."""
        listeners = self.role.node.listeners
        await until(lambda: self.runtime.health.state() == "ready", 10, self._why_not)
        await until(lambda: all(map(listeners.is_open, self.forwards)))

    def _why_not(self) -> str:
        return f"{self.name}: {self.runtime.health.summary()}"

    async def restart(self, damage: Callable[[Tree], None] | None = None) -> None:
        """As SIGUSR2: the next process takes the place of this one. `damage` what it is left."""
        self.runtime.restart()
        await self.ended()
        await self.start(self.runtime.left, damage)

    async def stop(self) -> None:
        """As SIGTERM."""
        self.runtime.stop("SIGTERM")
        await self.ended()

    async def ended(self) -> None:
        """It has ended. Raises what ended it."""
        task, self._task = self._task, None
        if task is not None:
            await task

    async def ask(self, verb: str, **args: Any) -> Any:
        """What the control socket answers."""
        path = self.role.node.config.control_socket
        return await asyncio.to_thread(ask, path, verb, args)

    def peer(self, name: str) -> Worker:
        """A worker's row in this head's status."""
        (row,) = (r for r in self.runtime.health.now().workers or () if r.name == name)
        return row

    def ray_of(self, name: str) -> str | None:
        """How a worker's Ray is, as this head has it; None where it has not said."""
        told = [
            r.ray.state for r in self.runtime.health.now().workers or () if r.name == name and r.ray
        ]
        return told[0] if told else None


class Site:
    """A head, and workers that have joined it."""

    def __init__(self, directory: Path, ride_through: float) -> None:
        self.directory = directory
        self.ride_through = ride_through
        self.head = Daemon(self, "head", 0)
        self.workers: dict[str, Daemon] = {}

    def node(self, name: str) -> Daemon:
        return self.head if name == "head" else self.workers[name]

    def worker(self, name: str) -> Daemon:
        """A further one, not started."""
        self.workers[name] = made = Daemon(self, name, len(self.workers) + 1)
        return made

    def path(self, near: str, far: str) -> Target:
        """A listener of `near` that leads to what `far` exposes; from the next start or reload."""
        at = free_place()
        self.node(near).forwards[at] = f"{far}:{self.node(far).expose}"
        return at

    async def start(self) -> None:
        for daemon in (self.head, *self.workers.values()):
            await daemon.start()
        await self.ready()

    async def ready(self) -> None:
        """Every daemon is, with its links up."""
        for daemon in (self.head, *self.workers.values()):
            await daemon.ready()

    async def stop(self) -> None:
        for daemon in (*self.workers.values(), self.head):
            if not daemon.over:
                await daemon.stop()


@asynccontextmanager
async def site(directory: Path, *workers: str, ride_through: float = 60.0) -> AsyncIterator[Site]:
    """Ended in order when it is left. Nothing is started yet."""
    made = Site(directory, ride_through)
    for name in workers:
        made.worker(name)
    try:
        yield made
    finally:
        await made.stop()


@asynccontextmanager
async def started(directory: Path, *workers: str) -> AsyncIterator[Site]:
    """A site whose daemons run, and have joined."""
    async with site(directory, *workers) as made:
        await made.start()
        yield made


def exposed(daemon: Daemon) -> Target:
    """Where what a node exposes listens."""
    return Target("127.0.0.1", daemon.expose)
