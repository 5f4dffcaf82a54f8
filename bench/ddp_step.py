"""One rank of a training of two by torch's DDP over gloo, whose gradients are 100 MB.

Usage: python ddp_step.py RANK ADDRESS PORT STEPS: rank 0's store is at ADDRESS:PORT. Rank 0 prints
the median and the longest of its steps as JSON, in milliseconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

WIDE = 5000
"""Of one layer: 25 million parameters of 4 bytes."""
WARM = 2
"""Steps that do not count: DDP settles its buckets in them."""


def main(rank: int, address: str, port: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://{address}:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(WIDE, WIDE, bias=False))
    batch = torch.randn(1, WIDE)
    took = []
    for _ in range(WARM + steps):
        began = time.perf_counter()
        model(batch).square().mean().backward()
        dist.barrier()
        took.append(1000 * (time.perf_counter() - began))
    counted = took[WARM:]
    found = {"a step": statistics.median(counted), "the longest step": max(counted)}
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
