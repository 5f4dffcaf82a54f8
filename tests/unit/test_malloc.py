"""What a read took is there for the next one."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from rayfwd.system.malloc import keep_freed

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


GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc is told to give back what is freed, whatever its own choice and this environment's are."""


def faults(setup: str) -> int:
    script = FAULTS.format(setup=setup)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    return int(
        subprocess.check_output(
            [sys.executable, "-c", script], env={**clean, **GIVES_BACK}, text=True, timeout=60
        )
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_comes_and_goes_is_not_asked_of_the_kernel_again() -> None:
    pages = 20 * (40 << 18) // 4096
    assert faults("") > pages // 2, "nothing is given back, and so nothing is measured"
    assert faults("from rayfwd.system.malloc import keep_freed; keep_freed()") < pages // 100


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        """Has no mallopt, nor anything else that is asked for."""

    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Musl())
    keep_freed()
