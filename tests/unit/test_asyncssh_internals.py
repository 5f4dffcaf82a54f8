"""An AsyncSSH that is laid out otherwise: it goes its own way, and all works as before."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asyncssh import encryption
from asyncssh.config import SSHClientConfig
from asyncssh.crypto.cipher import GCMCipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import ProblemError
from rayfwd.ssh import asyncssh_internals as internals
from rayfwd.ssh import fastpath, hops, passed_over
from rayfwd.ssh.fastpath import FastPath
from rayfwd.ssh.login_watch import LoginWatch
from rayfwd.ssh.ssh_connector import SshConnector
from tests.unit.loops import log_events, run
from tests.unit.ssh_server import Sshd
from tests.unit.test_fastpath import Made, connected

MEGABYTE = 1 << 20

TABLES = {
    "connection": internals.CONNECTION,
    "channel": internals.CHANNEL,
    "encryption": internals.ENCRYPTION,
    "cipher": internals.CIPHER,
}
ATTRIBUTES = [(table, name) for table, rows in TABLES.items() for name, _ in rows]


class Seen:
    """A thing of AsyncSSH's as it is seen from outside, with one attribute gone or of another type.

    AsyncSSH itself goes on with the thing as it is. Private names that are not in a table cannot
    be had at all.
    """

    def __init__(self, real: Any, known: internals.Table, changed: dict[str, Any]) -> None:
        vars(self).update(_real=real, _known={name for name, _ in known}, _changed=changed)

    def __getattr__(self, name: str) -> Any:
        if name in self._changed:
            value = self._changed[name]
            if value is GONE:
                raise AttributeError(name)
            return value
        if name.startswith("_") and name not in self._known:
            raise AttributeError(f"{name} is in no table")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


GONE = object()


class GCMEncryption(Seen):
    """The fast path knows the cipher by the name of this class."""


def seen(made: Made, table: str, name: str, value: Any) -> tuple[Any, Any]:
    """Connection and channel, with `name` of a thing of that table changed to `value`."""
    changed: dict[str, dict[str, Any]] = {each: {} for each in TABLES}
    changed[table][name] = value
    for way in ("_recv_encryption", "_send_encryption"):
        real: Any = getattr(made[0], way)
        if table == "cipher":
            changed["encryption"]["_cipher"] = Seen(real._cipher, internals.CIPHER, {name: value})
        if table in {"encryption", "cipher"}:
            lookalike = GCMEncryption(real, internals.ENCRYPTION, changed["encryption"])
            changed["connection"][way] = lookalike
    return (
        Seen(made[0], internals.CONNECTION, changed["connection"]),
        Seen(made[1], internals.CHANNEL, changed["channel"]),
    )


async def carry(made: Made, path: FastPath | None) -> None:
    """1 MB to the server and back, by the fast path or without."""
    data = random.Random(7).randbytes(MEGABYTE)
    for start in range(0, MEGABYTE, 50_000):
        piece = data[start : start + 50_000]
        if path is None:
            made[1].write(piece)
        else:
            while path.paused:
                await asyncio.sleep(0.001)
            path.write([piece])
        await asyncio.sleep(0)
    await made[2].has(MEGABYTE)
    assert made[2].came == data


@pytest.fixture(autouse=True)
def said_anew() -> Iterator[None]:
    fastpath.say_absent.cache_clear()
    yield
    fastpath.say_absent.cache_clear()


@pytest.mark.parametrize(("table", "name"), ATTRIBUTES)
def test_an_attribute_that_is_not_as_known_is_found_before_anything_is_touched(
    table: str, name: str
) -> None:
    """Whether it is gone or of another type."""

    async def main() -> None:
        async with connected() as made:
            real: Any = made[0]
            before = real._transport.get_protocol()
            for other in (GONE, object()):
                fastpath.say_absent.cache_clear()
                connection, channel = seen(made, table, name, other)
                with log_events() as logs:
                    path = FastPath.install(connection, channel, made[2].take, lambda: None)
                    again = FastPath.install(connection, channel, made[2].take, lambda: None)
                assert path is None
                assert again is None
                assert real._transport.get_protocol() is before
                (said,) = logs
                assert said["event"] == "fast_path_absent"
                assert name in said["cause"]
            await carry(made, None)

    run(main)


def test_the_tables_name_all_that_is_used() -> None:
    """Also after an exchange of keys, with a window that is full, and packets of AsyncSSH's own."""

    async def main() -> None:
        limits: dict[str, Any] = {"window": 100_000, "rekey_bytes": 300_000}
        async with connected(server=limits, rekey_bytes=400_000) as made:
            connection = Seen(made[0], internals.CONNECTION, {})
            channel = Seen(made[1], internals.CHANNEL, {})
            path = FastPath.install(connection, channel, made[2].take, lambda: None)
            assert path is not None
            await carry(made, path)

    run(main)


class _Cipher(GCMCipher):
    """Seals and opens as AsyncSSH's does, with nonces from elsewhere."""

    def _nonce(self) -> bytes:
        raise NotImplementedError

    def encrypt_and_sign(self, header: bytes, data: bytes) -> tuple[bytes, bytes]:
        sealed = AESGCM(self._key).encrypt(self._nonce(), data, header)
        return header + sealed[:-16], sealed[-16:]

    def verify_and_decrypt(self, header: bytes, data: bytes, mac: bytes) -> bytes | None:
        return AESGCM(self._key).decrypt(self._nonce(), data + mac, header)


class CounterBeside(_Cipher):
    """`_iv` stays as it was given; an int beside it counts."""

    _count = 0

    def _nonce(self) -> bytes:
        count = int.from_bytes(self._iv[4:], "big") + self._count
        self._count += 1
        return self._iv[:4] + count.to_bytes(8, "big")


class CounterInStep(_Cipher):
    """`_iv` moves as ever, but what is sealed with has a counter of its own."""

    _own: bytes | None = None

    def _nonce(self) -> bytes:
        nonce = self._iv if self._own is None else self._own
        self._own = nonce[:4] + (int.from_bytes(nonce[4:], "big") + 1).to_bytes(8, "big")
        self._update_iv()
        return nonce


class SharedCounter(CounterBeside):
    """A counter that a copy shares: trying the copy would move the original's."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedCounter:
        raise TypeError("cannot be copied")


@pytest.mark.parametrize("later", [CounterBeside, CounterInStep, SharedCounter])
def test_a_counter_that_is_not_the_known_one_is_refused(
    later: type[_Cipher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every name and type is as known; two packets with one nonce would give the key away."""
    monkeypatch.setattr(encryption, "GCMCipher", later)

    async def main() -> None:
        async with connected() as made:
            with log_events() as logs:
                path = FastPath.install(made[0], made[1], made[2].take, lambda: None)
            assert path is None
            assert [entry["event"] for entry in logs] == ["fast_path_absent"]
            await carry(made, path)

    run(main)


def test_a_key_that_comes_to_be_otherwise_in_the_middle_is_left_to_asyncssh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each new key is tried, not the first alone."""

    async def main() -> None:
        async with connected(rekey_bytes=200_000) as made:
            path = FastPath.install(made[0], made[1], made[2].take, lambda: None)
            assert path is not None
            monkeypatch.setattr(encryption, "GCMCipher", CounterBeside)
            await carry(made, path)
            assert made[2].slow > 0

    run(main)


@pytest.mark.parametrize("name", ["aes128-ctr", "chacha20-poly1305@openssh.com"])
def test_another_cipher_is_nothing_unexpected(name: str) -> None:
    async def main() -> None:
        async with connected(name) as made:
            with log_events() as logs:
                path = FastPath.install(made[0], made[1], made[2].take, lambda: None)
            assert path is None
            assert logs == []
            await carry(made, path)

    run(main)


# -- a login -------------------------------------------------------------------------------------


def watched(monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> list[LoginWatch]:
    """The watches of logins to come, to which AsyncSSH looks so."""
    watches: list[LoginWatch] = []
    follow = LoginWatch.follow

    def following(self: LoginWatch, connection: Any) -> None:
        watches.append(self)
        follow(self, Seen(connection, internals.LOGIN, changed))

    monkeypatch.setattr(LoginWatch, "follow", following)
    return watches


async def log_in_and_be_refused(directory: Path) -> None:
    """Once with the key that the server takes, and once with another."""
    sshd = Sshd(directory)
    await sshd.start()
    head = HeadConfig(
        ssh=f"ray@{sshd.address}:{sshd.port}",
        identity=sshd.identity,
        known_hosts=sshd.known_hosts,
        ssh_config=Path("/dev/null"),
    )
    (await SshConnector(head).connect()).abort()
    (directory / "other").mkdir()
    other = Sshd(directory / "other").identity
    with pytest.raises(ProblemError) as caught:
        await SshConnector(head.model_copy(update={"identity": other})).connect()
    assert caught.value.problem.code is codes.SSH_AUTH_REFUSED
    await sshd.stop()


def test_a_login_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names of the table alone."""
    watches = watched(monkeypatch, {})
    run(lambda: log_in_and_be_refused(tmp_path))
    taken, refused = watches
    assert taken.signed.endswith("(ssh-ed25519)")
    assert refused.signed == ""
    assert "publickey" in refused.accepted
    assert taken.offered[0] == refused.offered[0] == 20, "SSH_MSG_KEXINIT"


@pytest.mark.parametrize("name", [name for name, _ in internals.LOGIN])
@pytest.mark.parametrize("other", [GONE, object()])
def test_a_login_that_cannot_be_watched_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, other: object
) -> None:
    watches = watched(monkeypatch, {name: other})
    run(lambda: log_in_and_be_refused(tmp_path))
    assert [(watch.signed, watch.accepted, watch.offered) for watch in watches] == [
        ("", set(), b""),
        ("", set(), b""),
    ]


# -- a configuration -----------------------------------------------------------------------------


def configured(directory: Path) -> hops.Hop:
    """The way by a file with an include, and an option that AsyncSSH has no use for."""
    (directory / "more").write_text("Port 2222\n")
    file = directory / "config"
    file.write_text(
        f"Host head\n  HostName 192.0.2.1\n  ProxyUseFdpass yes\nInclude {directory}/more\n"
    )
    (hop,) = hops.find_way(HeadConfig(ssh="ray@head", ssh_config=file))
    return hop


def test_a_configuration_says_which_option_has_no_effect(tmp_path: Path) -> None:
    assert configured(tmp_path).passed_over == ("ProxyUseFdpass",)


@pytest.mark.parametrize("name", [name for name, _ in internals.CONFIG])
@pytest.mark.parametrize("other", [GONE, object()])
def test_a_configuration_of_another_layout_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, other: object
) -> None:
    def check(thing: Any, expected: internals.Table) -> None:
        changed = {name: other} if expected is internals.CONFIG else {}
        internals.check(Seen(thing, expected, changed), expected)

    monkeypatch.setattr(passed_over, "check", check)
    hop = configured(tmp_path)
    assert (hop.known.host, hop.known.port) == ("192.0.2.1", 2222)
    assert hop.passed_over == ()


@pytest.mark.parametrize("handlers", [None, {"include": print}, {"include": (print,)}, []])
def test_a_parser_of_another_layout_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, handlers: object
) -> None:
    monkeypatch.setattr(SSHClientConfig, "_handlers", handlers)
    make_known: Callable[[], None] = passed_over.make_known.__wrapped__
    before = repr(handlers)
    make_known()
    assert repr(SSHClientConfig._handlers) == before
