"""Holds so many actors on the node that has a resource, until it is ended: `fd_hog.py NAME COUNT`.

They take no CPU, but a worker process each, and so a port each. Some may wait for ever.
"""

from __future__ import annotations

import sys
import time

import ray


@ray.remote(num_cpus=0)
class Idle:
    def there(self) -> bool:
        return True


if __name__ == "__main__":
    name, count = sys.argv[1], int(sys.argv[2])
    ray.init(address="auto", logging_level="ERROR")
    actors = [Idle.options(resources={name: 0.001}).remote() for _ in range(count)]  # type: ignore[attr-defined]
    answers = [actor.there.remote() for actor in actors]
    time.sleep(3600)
