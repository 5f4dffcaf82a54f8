"""Many workers that start in the same moment, at a real sshd that lets in few at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rayfwd.cluster.identity import Identity
from rayfwd.config import HeadConfig
from rayfwd.session.frames import Frame
from rayfwd.session.handshake import PROOF, Challenge, Hello, Proof, Welcome
from rayfwd.session.messages import Message
from rayfwd.session.session import Limits
from rayfwd.ssh.asyncssh_carrier import SshCarrier
from rayfwd.transport.link import Link
from rayfwd.transport.mux import MuxStream, StreamOwner
from tests.unit.cluster import Cluster, cluster, hello_of
from tests.unit.loops import run, until
from tests.unit.real_sshd import RealSshd

WORKERS = 8
BOUND = "MaxStartups 2:100:2"
"""Of connections that have not logged in: the third is cut, with four logins a worker to come."""


class Starting:
    """A worker, as far as its link asks it."""

    def __init__(self, name: str, head: HeadConfig) -> None:
        self.name = name
        self.identity = Identity.make()
        self.link = Link(self, head, SshCarrier(head), Limits())

    def hello(self) -> Hello:
        return hello_of(self.name, key=self.identity.public, features=frozenset({PROOF}))

    def prove(self, greeting: Frame, challenge: Challenge) -> Proof:
        return self.identity.prove(greeting, challenge)

    def accept_stream(self, stream: MuxStream, target: bytes) -> StreamOwner | None:
        raise AssertionError("nobody opens a stream")

    def welcomed(self, welcome: Welcome) -> None: ...

    def message(self, message: Message) -> None: ...

    def link_changed(self) -> None: ...

    @property
    def up(self) -> bool:
        return self.link.mux is not None and len(self.link.mux.lanes) == 2


async def start(c: Cluster, sshd: RealSshd, directory: Path) -> None:
    (directory / "known_hosts").write_text(sshd.known_hosts_line())
    (directory / "ssh_config").write_text("")
    head = HeadConfig(
        ssh=sshd.target,
        identity=sshd.identity,
        known_hosts=directory / "known_hosts",
        ssh_config=directory / "ssh_config",
        socket=c.hub.socket.path,
    )
    workers = [Starting(f"w{number}", head) for number in range(WORKERS)]
    tasks = [asyncio.create_task(worker.link.run()) for worker in workers]
    try:
        await until(lambda: all(worker.up for worker in workers), 90, lambda: sshd.log[-2000:])
    finally:
        for worker in workers:
            await worker.link.close("the worker stops")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_all_get_in_by_themselves(tmp_path: Path) -> None:
    async def main() -> None:
        sshd = RealSshd(tmp_path / "sshd")
        await sshd.start(BOUND)
        try:
            async with cluster(tmp_path) as c:
                await start(c, sshd, tmp_path)
                assert len(c.hub.nodes) == WORKERS
            assert "MaxStartups" in sshd.log, "none was cut: the test shows nothing"
        finally:
            await sshd.stop()

    run(main, 120)
