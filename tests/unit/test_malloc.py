"""What a read took is there for the next one."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource
{setup}

def swell():
    kept = [bytes(bytearray(1 << 18)) for _ in range(40)]

for _ in range(3):
    swell()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    swell()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""10 MB that come and go, 20 times: page faults."""


def faults(setup: str) -> int:
    script = FAULTS.format(setup=setup)
    return int(subprocess.check_output([sys.executable, "-c", script], text=True, timeout=60))


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_what_comes_and_goes_is_not_asked_of_the_kernel_again() -> None:
    pages = 20 * (40 << 18) // 4096
    assert faults("") > pages // 2
    assert faults("from rayfwd.system.malloc import keep_freed; keep_freed()") < pages // 100
