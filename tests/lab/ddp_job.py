"""A training job over all nodes: torch DDP by gloo, one rank a node, for so many seconds.

Usage: python ddp_job.py SECONDS [REST]. Run by Ray's own Python on a machine of the lab; SIGTERM
ends it in order before that. REST: seconds between two steps, 0 by default. Nothing is tried again:
an actor that dies and a collective that fails end the job (`max_failures=0`).

Prints JSON lines: `{"training": N}` once all N ranks have done a step together, `{"steps": [...]}`
every second, and `{"ranks": [...]}` at the end, where each rank says its host, its address, how
many steps it did and how many of them after the longest, the loss over all ranks, and the digest of
its parameters.
"""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import sys
import threading
import time
from typing import Any

import ray

BEGIN = 120.0
"""Seconds in which the ranks have to meet."""
PATIENCE = 240.0
"""Seconds in which the last step is done."""


class Rank:
    """One rank, on the node that it was placed on."""

    def place(self) -> tuple[str, int]:
        """An address and a port for the store of rank 0."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def begin(self, rank: int, size: int, address: str, port: int) -> None:
        """Meet the others and do the first step with them."""
        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"tcp://{address}:{port}", rank=rank, world_size=size)
        torch.manual_seed(rank)  # DDP makes rank 0's parameters everybody's
        self.rank, self.steps = rank, 0
        self.model = DistributedDataParallel(torch.nn.Linear(512, 512))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.step(last=False)

    def step(self, last: bool) -> tuple[float, bool]:
        """The loss over all ranks, and whether rank 0 said that this step is the `last`."""
        import torch
        import torch.distributed as dist

        torch.manual_seed(1000 * self.steps + self.rank)
        loss = self.model(torch.randn(32, 512)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        said = torch.tensor([float(loss.detach()), float(last and self.rank == 0)])
        dist.all_reduce(said)
        return float(said[0]), bool(said[1])

    def done(self) -> int:
        """Steps so far."""
        return self.steps

    def enough(self) -> None:
        """Said to rank 0: end with the next step."""
        self.end = 0.0

    def train(self, seconds: float, rest: float) -> dict[str, Any]:
        """Steps until rank 0's clock says that it is enough; all ranks do the same number. After
        each they `rest`."""
        import torch.distributed as dist

        self.end = time.monotonic() + seconds
        over, longest, at, loss = False, 0.0, 0, 0.0
        while not over:
            began = time.monotonic()
            loss, over = self.step(last=began > self.end)
            took = time.monotonic() - began
            if took > longest:
                longest, at = took, self.steps
            time.sleep(rest)
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        dist.destroy_process_group()
        return {
            "host": socket.gethostname(),
            "address": ray.util.get_node_ip_address(),
            "steps": self.steps,
            "longest": longest,
            "after": self.steps - at,
            "loss": loss,
            "parameters": digest.hexdigest(),
        }


def main(seconds: float, rest: float = 0.0) -> int:
    ray.init(address="auto", log_to_driver=False)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # Ray has put its own there
    nodes = [node for node in ray.nodes() if node["Alive"]]
    once: Any = {"max_restarts": 0, "max_task_retries": 0}
    remote: Any = ray.remote(num_cpus=0, max_concurrency=3, **once)(Rank)
    ranks = [
        remote.options(resources={f"node:{node['NodeManagerAddress']}": 0.01}).remote()
        for node in nodes
    ]
    address, port = ray.get(ranks[0].place.remote(), timeout=BEGIN)
    begun = [r.begin.remote(i, len(ranks), address, port) for i, r in enumerate(ranks)]
    ray.get(begun, timeout=BEGIN)
    print(json.dumps({"training": len(ranks)}), flush=True)
    work = [rank.train.remote(seconds, rest) for rank in ranks]
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop.is_set():
        if ray.wait(work, timeout=1)[0]:
            break  # it has failed, or its clock was faster than ours
        steps = ray.get([rank.done.remote() for rank in ranks], timeout=PATIENCE)
        print(json.dumps({"steps": steps}), flush=True)
    if stop.is_set():
        ray.get(ranks[0].enough.remote(), timeout=PATIENCE)
    print(json.dumps({"ranks": ray.get(work, timeout=PATIENCE)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:])))
