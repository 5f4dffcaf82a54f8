"""Faults of whatever SSH connections a way has: of each leg, which is who dials whom.

Several legs may make one way: a worker dials a jump host, which dials the head. A fault is done to
one of them, as `faults.py` does it to a worker's link.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tests.lab.faults import Cut, Faults, provoke, schedule
from tests.lab.machines import Lab

MOVES = "change_address"


class Leg:
    """One machine dials another's sshd."""

    def __init__(self, lab: Lab, dials: str, server: str) -> None:
        self.name = f"{dials}>{server}"
        self.dials = dials
        self.faults = Faults(lab, server=server)

    def provoke(self, cut: Cut, chance: random.Random) -> None:
        provoke(self.faults, replace(cut, worker=self.dials), chance)


def legs_of(lab: Lab, *names: str) -> list[Leg]:
    """Each `dials>server`."""
    pairs = (name.partition(">") for name in names)
    return [Leg(lab, dials, server) for dials, _, server in pairs]


def mixed(
    legs: Sequence[Leg], seed: int, cuts: int, longest: float, pause: float, moving: str = ""
) -> Iterator[Cut]:
    """So many faults, of all kinds and legs, one after another; each as it is over. `moving` is the
    machine that may get another address: nobody dials it."""
    chance = random.Random(seed)
    by_name = {leg.name: leg for leg in legs}
    for drawn in schedule(seed, cuts, list(by_name), longest):
        leg = by_name[drawn.worker]
        stays = drawn.name == MOVES and leg.dials != moving
        cut = replace(drawn, name="kill_sshd") if stays else drawn
        leg.provoke(cut, chance)
        yield cut
        time.sleep(pause)
