"""The control socket: answers, refusals, limits, and what is left on disk."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rayfwd import codes
from rayfwd.problems import ProblemError
from rayfwd.system import unixsocket
from rayfwd.system.control import REQUEST_LIMIT, ControlServer, ask
from tests.unit.loops import until


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main(), debug=True)


async def echo(args: dict[str, Any]) -> dict[str, Any]:
    return {"args": args}


async def broken(_args: dict[str, Any]) -> dict[str, Any]:
    raise KeyError("inside")


async def refusing(_args: dict[str, Any]) -> dict[str, Any]:
    raise codes.NAME_TAKEN.error("no node x", "see the plan")


async def endless(_args: dict[str, Any]) -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


VERBS = {"echo": echo, "broken": broken, "refusing": refusing, "endless": endless}


@asynccontextmanager
async def server(path: Path, **limits: Any) -> AsyncIterator[ControlServer]:
    made = ControlServer(path, VERBS, **limits)
    await made.start()
    try:
        yield made
    finally:
        await made.close()
        assert not [t for t in asyncio.all_tasks() if t.get_name() == "control-connection"]


async def code(path: Path, verb: str, timeout: float = 10.0) -> str:
    try:
        await asyncio.to_thread(ask, path, verb, {}, timeout)
    except ProblemError as exc:
        return exc.problem.code.name
    return "ok"


async def raw(path: Path, data: bytes) -> Any:
    """The answer to bytes that `ask` would not send."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(data)
        await writer.drain()
        line = await reader.readline()
    finally:
        writer.close()
    return json.loads(line)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.sock"


def test_an_answer(path: Path) -> None:
    async def main() -> None:
        async with server(path):
            args = {"name": "ü\n", "n": [1, None]}
            assert await asyncio.to_thread(ask, path, "echo", args) == {"args": args}
            large = {"x": "y" * 60000}
            assert await asyncio.to_thread(ask, path, "echo", large) == {"args": large}
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert list(path.parent.iterdir()) == [], "no file is left"

    run(main)


def test_problems_reach_who_asked_and_the_server_goes_on(path: Path) -> None:
    async def main() -> None:
        async with server(path):
            with pytest.raises(ProblemError) as caught:
                await asyncio.to_thread(ask, path, "refusing")
            assert caught.value.problem == codes.NAME_TAKEN.problem("no node x", "see the plan")
            assert await code(path, "broken") == "control_fault"
            assert await code(path, "no such verb") == "control_bad_request"
            assert await code(path, "echo") == "ok"

    run(main)


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"hello\n",
        b"\xff\xfe\n",
        b"[]\n",
        b"{}\n",
        b'{"verb": 5}\n',
        b'{"verb": ["echo"]}\n',
        b'{"verb": "echo", "args": []}\n',
        b"[" * 50000 + b"\n",
        b"x" * (REQUEST_LIMIT + 10) + b"\n",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_a_bad_request_is_answered_and_disturbs_nothing(path: Path, data: bytes) -> None:
    async def main() -> None:
        async with server(path):
            answer = await raw(path, data)
            assert set(answer) == {"error"}
            assert answer["error"]["code"] == "control_bad_request"
            assert await code(path, "echo") == "ok"

    run(main)


def test_who_sends_nothing_is_sent_away(path: Path) -> None:
    async def main() -> None:
        async with server(path, request_seconds=0.05):
            answer = await raw(path, b'{"verb": "echo"')
            assert "no whole line came within 0.05 s" in answer["error"]["cause"]

    run(main)


def test_a_verb_that_takes_too_long_is_ended(path: Path) -> None:
    async def main() -> None:
        async with server(path, verb_seconds=0.05):
            assert await code(path, "endless") == "control_slow"

    run(main)


def test_who_hangs_up_disturbs_nothing(path: Path) -> None:
    async def main() -> None:
        async with server(path):
            for data in (b"", b'{"verb"', b'{"verb": "echo"}\n'):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(path))
                    sock.sendall(data)
            assert await code(path, "echo") == "ok"

    run(main)


def test_closing_ends_what_is_being_answered(path: Path) -> None:
    async def main() -> None:
        made = ControlServer(path, VERBS)
        await made.start()
        asking = asyncio.create_task(code(path, "endless"))
        await until(
            lambda: [t for t in asyncio.all_tasks() if t.get_name() == "control-connection"]
        )
        await made.close()
        assert await asking == "daemon_not_answering"
        assert not path.exists()

    run(main)


@pytest.mark.parametrize("turns", range(6))
def test_closing_ends_who_has_just_come(path: Path, turns: int) -> None:
    """After each of the loop's turns that it takes to begin with a connection."""

    async def main() -> None:
        made = ControlServer(path, VERBS)
        await made.start()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            sock.connect(str(path))
            for _ in range(turns):
                await asyncio.sleep(0)
            await made.close()
            await ended(sock)

    run(main)


async def ended(sock: socket.socket) -> None:
    """See that the other side closes."""
    async with asyncio.timeout(5):
        try:
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
        except ConnectionResetError:
            pass  # it was never accepted


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    async def main() -> None:
        assert await code(path, "echo") == "daemon_not_running"
        async with server(path):
            assert await code(path, "echo") == "ok"

    run(main)


def test_a_second_daemon_is_refused_and_takes_nothing_away(path: Path) -> None:
    async def main() -> None:
        async with server(path):
            with pytest.raises(ProblemError) as caught:
                await ControlServer(path, VERBS).start()
            assert caught.value.problem.code == codes.SOCKET_IN_USE
            assert await code(path, "echo") == "ok"

    run(main)


def test_closing_leaves_another_daemons_socket_alone(path: Path) -> None:
    async def main() -> None:
        first = ControlServer(path, VERBS)
        await first.start()
        path.unlink()
        async with server(path):
            await first.close()
            assert await code(path, "echo") == "ok"

    run(main)


def test_a_file_in_the_way_is_left_alone(path: Path) -> None:
    path.write_text("mine")

    async def main() -> None:
        with pytest.raises(ProblemError) as caught:
            await ControlServer(path, VERBS).start()
        assert caught.value.problem.cause == f"{path} exists and is not a socket"

    run(main)
    assert path.read_text() == "mine"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ProblemError) as caught:
            await ControlServer(tmp_path / "none" / "c.sock", VERBS).start()
        assert caught.value.problem.code == codes.SOCKET_NOT_POSSIBLE
        assert "No such file or directory" in caught.value.problem.cause

    run(main)


def test_the_kernels_limit_of_a_path(tmp_path: Path) -> None:
    room = unixsocket.PATH_LIMIT - len(os.fsencode(tmp_path)) - 1
    longest, too_long = tmp_path / ("s" * room), tmp_path / ("s" * (room + 1))

    async def main() -> None:
        async with server(longest):
            assert await code(longest, "echo") == "ok"
        with pytest.raises(ProblemError) as caught:
            await ControlServer(too_long, VERBS).start()
        assert caught.value.problem.code == codes.SOCKET_PATH_TOO_LONG
        assert "has 108 bytes; Linux allows 107" in caught.value.problem.cause
        assert await code(too_long, "echo") == "socket_path_too_long"

    run(main)


def test_no_daemon(tmp_path: Path) -> None:
    for missing in (tmp_path / "c.sock", tmp_path / "none" / "c.sock"):
        with pytest.raises(ProblemError) as caught:
            ask(missing, "status")
        assert caught.value.problem.code == codes.DAEMON_NOT_RUNNING
        assert str(missing) in caught.value.problem.cause


@pytest.mark.parametrize("answer", [b"", b"hello\n", b"[]\n", b'{"half": '])
def test_what_is_no_answer(path: Path, answer: bytes) -> None:
    async def main() -> None:
        async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(answer)
            await writer.drain()
            writer.close()

        other = await asyncio.start_unix_server(reply, path)
        assert await code(path, "echo") == "daemon_not_answering"
        other.close()

    run(main)


def test_a_daemon_that_hangs(path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as mute:
            mute.bind(str(path))
            mute.listen(1)
            assert await code(path, "echo", timeout=0.05) == "daemon_not_answering"

    run(main)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_refused(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    path = tmp_path / "c.sock"

    def as_another_user() -> str:
        """The code that user id 12345 gets, asked from a process of its own."""
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setresuid(12345, 12345, 12345)
                try:
                    ask(path, "echo")
                    os.write(send, b"ok")
                except ProblemError as exc:
                    os.write(send, exc.problem.code.name.encode())
            finally:
                os._exit(0)
        os.close(send)
        os.waitpid(pid, 0)
        with os.fdopen(receive, "rb") as file:
            return file.read().decode().strip()

    async def main() -> None:
        async with server(path):
            # The way to tmp_path may be closed to others: open it for the check, as /run would be.
            closed = [p for p in (tmp_path, *tmp_path.parents) if not p.stat().st_mode & 0o001]
            modes = {p: stat.S_IMODE(p.stat().st_mode) for p in closed}
            try:
                for p in closed:
                    os.chmod(p, modes[p] | 0o001)
                assert await asyncio.to_thread(as_another_user) == "daemon_not_permitted"
                os.chmod(path, 0o666)
                assert await asyncio.to_thread(as_another_user) == "daemon_not_permitted"
            finally:
                for p in closed:
                    os.chmod(p, modes[p])

    run(main)
