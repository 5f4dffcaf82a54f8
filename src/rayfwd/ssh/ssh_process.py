"""An `ssh`, or a command of the SSH configuration that dials in its place (ProxyCommand): a process
whose words on standard error are kept, and that is ended with what it has started.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from rayfwd.ssh.openssh_words import Words

ASKS_NOBODY = ("SSH_ASKPASS", "DISPLAY", "WAYLAND_DISPLAY")
"""What would have ssh ask on a screen."""
REAPED_WITHIN = 1.0
"""Seconds for a process that was killed."""
LAST_WORDS = 1 << 16
"""Bytes of a read; a pipe holds no more."""
SHELL: Final = "/bin/sh"
"""Runs a ProxyCommand where the user has none."""


def environment() -> dict[str, str]:
    """What `ssh` is to have of ours: an agent, a ticket, no way to ask."""
    kept = {name: value for name, value in os.environ.items() if name not in ASKS_NOBODY}
    # bash takes a socket for rshd's, and reads ~/.bashrc if no shell is above it (bash(1)).
    if kept.get("SHLVL", "0") == "0":
        kept["SHLVL"] = "1"
    return kept | {"SSH_ASKPASS_REQUIRE": "never", "LC_ALL": "C"}


class SshProcess(asyncio.Protocol):
    """An `ssh`. It has no terminal, and is ended with what it has started (ProxyCommand)."""

    def __init__(self, words: Sequence[str], stdin: int, stdout: int):
        """Raises OSError."""
        self._words = Words()
        self.news = asyncio.Event()
        """Something came, or it is over."""
        self.on_news: Callable[[], None] = lambda: None
        """Something came."""
        self.over = asyncio.get_running_loop().create_future()
        self._popen = subprocess.Popen(
            words,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment(),
        )
        self._transport: asyncio.BaseTransport | None = None
        self._pidfd: int | None = None

    @property
    def said(self) -> str:
        """What is kept of what came on standard error."""
        return self._words.text

    async def listen(self) -> None:
        """Read what it says, and note when it is over."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.connect_read_pipe(lambda: self, self._popen.stderr)
        self._watch(loop)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """What it has started may live on, and keep standard error open: the `ssh` of a ProxyJump
        waits until the jump host has reached its target or not. So its own end counts, where the
        kernel tells of that (Linux 5.3 and newer, and not every container)."""
        if hasattr(os, "pidfd_open"):
            with suppress(OSError):
                self._pidfd = os.pidfd_open(self._popen.pid)
                loop.add_reader(self._pidfd, self._exited)

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            self.over.get_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _exited(self) -> None:
        """The process is over; what it said last may not be read yet."""
        self._unwatch()
        if self._popen.stderr is not None and not self.over.done():
            with suppress(OSError):  # it is empty
                while data := os.read(self._popen.stderr.fileno(), LAST_WORDS):
                    self._words.feed(data)
        self.end()

    def ask(self, data: bytes) -> None:
        """What runs on the head for its sake hears this."""
        if self._popen.stdin is not None:
            with suppress(OSError, ValueError):  # it has ended, or was closed
                self._popen.stdin.write(data)
                self._popen.stdin.flush()

    def close_stdin(self) -> None:
        """What runs on the head for its sake may end."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()

    def data_received(self, data: bytes) -> None:
        self._words.feed(data)
        self.news.set()
        self.on_news()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.end()

    def end(self) -> None:
        """At once; nothing comes of it any more."""
        if self.over.done():
            return
        self._unwatch()
        self._words.close()
        self.over.set_result(None)
        self.news.set()
        self.close_stdin()
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(REAPED_WITHIN)  # a process that was killed is gone at once
        if self._transport is not None:
            self._transport.close()
        elif self._popen.stderr is not None:
            self._popen.stderr.close()


class ProxyCommand(SshProcess):
    """Its standard input and output lead to a server. Unlike `ssh`, it may be mute."""

    def __init__(self, command: str, end: int) -> None:
        """By the user's shell, as `ssh` runs it; `end`: a socket. Raises OSError."""
        shell = os.environ.get("SHELL") or SHELL
        super().__init__([shell, "-c", f"exec {command}"], end, end)
        self.silent = asyncio.Event()
        """Nothing more comes on standard error."""

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.silent.set()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """What it has started may be what carries the bytes."""
