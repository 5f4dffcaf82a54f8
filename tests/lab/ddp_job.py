"""A training job over three nodes: torch DDP by gloo, one rank a node; prints a JSON object.

Usage: python ddp_job.py STEPS. Each rank says its host, its address and the sum of its parameters.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

import ray


class Rank:
    """One rank, on the node that it was placed on."""

    def place(self) -> tuple[str, int]:
        """An address and a port for the store of rank 0."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def train(self, rank: int, size: int, address: str, port: int, steps: int) -> dict[str, Any]:
        """Whole steps of DDP; parameters are the same on all ranks afterwards."""
        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        dist.init_process_group("gloo", f"tcp://{address}:{port}", rank=rank, world_size=size)
        torch.manual_seed(rank)  # DDP makes rank 0's parameters everybody's
        model = DistributedDataParallel(torch.nn.Linear(512, 512))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        longest, done = 0.0, 0
        for step in range(steps):
            began = time.monotonic()
            torch.manual_seed(1000 * step + rank)
            loss = model(torch.randn(32, 512)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            longest = max(longest, time.monotonic() - began)
        total = sum(float(p.detach().double().sum()) for p in model.parameters())
        dist.destroy_process_group()
        return {
            "host": socket.gethostname(),
            "address": ray.util.get_node_ip_address(),
            "steps": done,
            "longest": longest,
            "parameters": total,
        }


def main(steps: int) -> int:
    ray.init(address="auto", log_to_driver=False)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    remote: Any = ray.remote(num_cpus=0.1)(Rank)
    ranks = [
        remote.options(resources={f"node:{node['NodeManagerAddress']}": 0.01}).remote()
        for node in nodes
    ]
    address, port = ray.get(ranks[0].place.remote(), timeout=120)
    work = [r.train.remote(i, len(ranks), address, port, steps) for i, r in enumerate(ranks)]
    print(json.dumps({"ranks": ray.get(work, timeout=240)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
