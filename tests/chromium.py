"""A Chromium without a window, spoken to over a pipe (the DevTools protocol).

It reaches nothing but loopback: every name and every proxy is closed to it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.need import need, tool

COMMAND_SECONDS = 30.0
"""A busy machine takes its time to start a browser."""
MESSAGE_LIMIT = 1 << 26


def need_chromium() -> None:
    """Skip or fail the running test where there is none."""
    there = os.path.isabs(tool("chromium"))
    need(None if there else "the page's look needs chromium (Debian package chromium)")


class Browser:
    """One tab of it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.complaints: list[str] = []
        """Errors of the page, of its policy, and of its requests."""
        self.requests: list[str] = []
        """The URL of everything that was asked for."""
        self._writer = writer
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result."""
        number = len(self._answers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(COMMAND_SECONDS):
            said = await answer
        assert "error" not in said, f"{method}: {said['error']}"
        return dict(said["result"])

    async def attach(self) -> None:
        """Open the tab and listen to what it complains of."""
        made = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            await self.call(f"{domain}.enable")

    async def hear(self, reader: asyncio.StreamReader) -> None:
        """Until it is gone."""
        with suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await reader.readuntil(b"\0"))[:-1])
                if "id" in message:
                    self._answers[message["id"]].set_result(message)
                else:
                    self._event(message["method"], message["params"])

    def _event(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(f"{params['entry']['level']}: {params['entry']['text']}")

    # -- what a test says ------------------------------------------------------------------------

    async def value(self, script: str) -> Any:
        """What an expression of JavaScript is, in the page."""
        said = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def until(self, script: str, seconds: float = 30.0) -> Any:
        """Wait for an expression to be true."""
        try:
            async with asyncio.timeout(seconds):
                while not (found := await self.value(script)):
                    await asyncio.sleep(0.05)
                return found
        except TimeoutError:
            text = await self.value("document.body.innerText")
            raise AssertionError(f"never true: {script}\n{text}\n{self.complaints}") from None

    async def media(self, **features: str) -> None:
        """As `media(prefers_color_scheme="dark")`."""
        rows = [{"name": key.replace("_", "-"), "value": v} for key, v in features.items()]
        await self.call("Emulation.setEmulatedMedia", features=rows)

    async def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    async def window(self, width: int) -> None:
        """Make it so many pixels wide."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def picture(self, path: Path, width: int) -> None:
        """The whole page, as PNG."""
        await self.window(width)
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        shot = await self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
        )
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """Ended when it is left, with all its processes."""
    with tempfile.TemporaryDirectory(prefix="chromium-") as home:
        commands, answers = os.pipe(), os.pipe()
        process = await asyncio.create_subprocess_exec(
            tool("chromium"),
            "--headless",
            "--no-sandbox",  # a root's Chromium has none, and it sees our page only
            "--remote-debugging-pipe",
            f"--user-data-dir={home}",
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-proxy-server",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, MAP evil.test 127.0.0.1",
            "--lang=en",
            env={**os.environ, "HOME": home, "TMPDIR": home, "TZ": "UTC", "LC_ALL": "C.UTF-8"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_at_3_and_4(commands[0], answers[1]),
            close_fds=False,
        )
        os.close(commands[0])
        os.close(answers[1])
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MESSAGE_LIMIT)
        reading, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(answers[0], "rb")
        )
        transport, protocol = await loop.connect_write_pipe(
            asyncio.streams.FlowControlMixin, os.fdopen(commands[1], "wb")
        )
        made = Browser(asyncio.StreamWriter(transport, protocol, None, loop))
        hearing = asyncio.create_task(made.hear(reader), name="chromium")
        try:
            await made.attach()
            yield made
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            transport.close()
            reading.close()
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)


def _at_3_and_4(read: int, write: int) -> Callable[[], None]:
    """Where --remote-debugging-pipe has its pipes."""

    def move() -> None:
        above = os.dup2(read, 100), os.dup2(write, 101)  # either may be at 3 or 4 now
        for place, descriptor in zip((3, 4), above, strict=True):
            os.dup2(descriptor, place)
            os.close(descriptor)

    return move
