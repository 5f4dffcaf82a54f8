"""The servers of the stream tests on every machine, and calls to them through rayfwd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.lab.conversation import PARTS
from tests.lab.machines import Lab, Machine
from tests.lab.process import HOME, Process, until

BASE = 15000
"""First port of a machine's servers."""
LISTENER = {"head": 16000, "w1": 16100, "w2": 16200}
"""First of the ports on other machines that stand for them."""
TALK = Path(__file__).with_name("conversation.py")


class Talk:
    """The servers of all machines."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        assert lab.rayfwd is not None
        self.python = str(lab.rayfwd.with_name("python"))
        self.script = f"{HOME}/conversation.py"
        self.servers: dict[str, Process] = {}
        for machine in lab.machines:
            machine.write(self.script, TALK.read_text())
            server = machine.popen([self.python, self.script, "serve", str(BASE)])
            self.servers[machine.name] = server
        for server in self.servers.values():
            until(lambda log=server.log: "listening" in log.read_text(), 20, lambda: "servers")  # type: ignore[misc]

    def call(self, client: Machine, port: int, part: str) -> list[list[Any]]:
        """The client's transcript."""
        argv = [self.python, self.script, "call", "127.0.0.1", str(port), part]
        found: list[list[Any]] = json.loads(client.run(argv, timeout=150).stdout)
        return found

    def served(self, machine: str) -> list[str]:
        return self.servers[machine].log.read_text().splitlines()

    def both(
        self, client: Machine, server: str, port: int, part: str, connections: int
    ) -> tuple[list[list[Any]], list[str]]:
        """The transcripts of the client and of that many connections of the server."""
        before = len(self.served(server))
        script = self.call(client, port, part)
        until(
            lambda: len(self.served(server)) >= before + connections,
            30,
            lambda: f"the server's end of {part}; it wrote {self.served(server)[before:][-5:]}",
        )
        return script, sorted(self.served(server)[before:])


def forwards(name: str) -> list[dict[str, str]]:
    """On each machine, listeners to every part of every other."""
    return [
        {"listen": f"127.0.0.1:{LISTENER[other] + i}", "to": f"{other}:{BASE + i}"}
        for other in LISTENER
        if other != name
        for i in range(len(PARTS))
    ]
