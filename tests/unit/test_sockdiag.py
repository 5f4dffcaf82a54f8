"""The kernel's word on sockets: real ones, of several users where the tests run as root."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from rayfwd.network.open_ports import KernelPorts
from rayfwd.session.target import Target
from rayfwd.system import sockdiag
from rayfwd.system.sockdiag import ListeningSocket, SockDiag, SocketOwner
from tests.unit.cluster import free_place
from tests.unit.other_user import NOBODY, OTHER, UIDS, child, needs_root

DIAL = """
how, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
if how == "mapped":  # as gRPC does
    sock = socket.socket(socket.AF_INET6)
    host = "::ffff:" + host
else:
    sock = socket.socket()
sock.connect((host, port))
sock.sendall(b"hello")
if how == "closed":
    sock.close()
if how == "half":
    sock.shutdown(socket.SHUT_WR)
print(0 if how == "closed" else os.fstat(sock.fileno()).st_ino, flush=True)
sys.stdin.read()
"""

LISTEN = """
sock = socket.socket()
sock.bind((sys.argv[1], int(sys.argv[2])))
sock.listen()
print(os.fstat(sock.fileno()).st_ino, flush=True)
sys.stdin.read()
"""


@contextmanager
def dialled(how: str, uid: int | None = None) -> Iterator[tuple[socket.socket, int]]:
    """Our end of a connection that another process has made, and the inode of its end."""
    place = free_place()
    with socket.socket() as listener:
        listener.bind(place)
        listener.listen()
        with child(DIAL, how, *place, uid=uid) as dialler, listener.accept()[0] as near:
            yield near, int(dialler.says())


@pytest.fixture
def diag() -> Iterator[SockDiag]:
    diag = sockdiag.opened()
    yield diag
    diag.close()


def owner(diag: SockDiag, near: socket.socket) -> SocketOwner | None:
    return diag.owner_of_peer(near.getsockname(), near.getpeername())


class TestWhoseAConnectionIs:
    @pytest.mark.parametrize("uid", UIDS)
    def test_the_user_who_dialled(self, diag: SockDiag, uid: int) -> None:
        with dialled("open", uid) as (near, inode):
            assert owner(diag, near) == SocketOwner(uid, inode)

    def test_this_user(self, diag: SockDiag) -> None:
        with dialled("open") as (near, inode):
            assert owner(diag, near) == SocketOwner(os.geteuid(), inode)

    @pytest.mark.parametrize("how", ["mapped", "half"])
    def test_one_that_was_made_by_ipv6_or_is_half_closed(self, diag: SockDiag, how: str) -> None:
        with dialled(how) as (near, inode):
            assert owner(diag, near) == SocketOwner(os.geteuid(), inode)

    @pytest.mark.parametrize("uid", [None, pytest.param(NOBODY, marks=needs_root)])
    def test_nobodys_once_it_is_closed_though_its_bytes_are_there(
        self, diag: SockDiag, uid: int | None
    ) -> None:
        with dialled("closed", uid) as (near, _):
            assert owner(diag, near) is None
            assert near.recv(10) == b"hello"

    def test_nobodys_where_it_was_reset(self, diag: SockDiag) -> None:
        place = free_place()
        with socket.socket() as listener, socket.socket() as dialler:
            listener.bind(place)
            listener.listen()
            dialler.connect(place)
            peer = dialler.getsockname()
            dialler.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            dialler.close()
            assert diag.owner_of_peer(place, peer) is None

    def test_nobodys_where_somebody_listens_at_that_address(self, diag: SockDiag) -> None:
        """The kernel would name the listener where there is no connection."""
        place = free_place()
        with socket.socket() as listener:
            listener.bind(place)
            listener.listen()
            assert diag.owner_of_peer(("127.0.0.1", 9), place) is None

    @needs_root
    def test_an_ordinary_user_may_ask(self) -> None:
        with dialled("open", NOBODY) as (near, inode):
            asked = """
print(sockdiag.opened().owner_of_peer(*eval(sys.argv[1])))
"""
            # Before the user changes: others may not read this checkout, nor Python's own files.
            early = "from rayfwd.system import sockdiag; sockdiag.opened().close()"
            ends = (near.getsockname(), near.getpeername())
            with child(asked, repr(ends), uid=OTHER, first=early) as asker:
                assert asker.says() == repr(SocketOwner(NOBODY, inode))

    def test_it_takes_no_time(self, diag: SockDiag) -> None:
        """18 us were measured; the bound leaves room for a machine that is busy with other work,
        and none for a question that waits."""
        with dialled("open") as (near, _):
            ends = near.getsockname(), near.getpeername()
            begin = time.process_time()
            for _ in range(1000):
                assert diag.owner_of_peer(*ends) is not None
            assert time.process_time() - begin < 0.5


class TestWhoListens:
    @pytest.mark.parametrize("uid", [None, *UIDS])
    def test_user_address_port_and_inode(self, diag: SockDiag, uid: int | None) -> None:
        place = free_place()
        with child(LISTEN, *place, uid=uid) as listener:
            inode = int(listener.says())
            found = [s for s in diag.listening() if s.takes(place)]
            program = sockdiag.programs([inode, 0])
        by = os.geteuid() if uid is None else uid
        assert found == [ListeningSocket(*place, by, inode)]
        assert program[inode].pid == listener.pid
        assert program[inode].name.startswith("python")

    def test_many_and_of_both_kinds(self, diag: SockDiag) -> None:
        """More than one message of the kernel's has room for."""
        places = [free_place() for _ in range(600)]
        listening = []
        with socket.socket(socket.AF_INET6) as six:
            six.bind(("::1", 0))
            six.listen()
            try:
                for place in places:
                    listening.append(sock := socket.socket())
                    sock.bind(place)
                    sock.listen()
                found = {(s.address, s.port): s for s in diag.listening()}
                port = six.getsockname()[1]
                assert found["::1", port].inode == os.fstat(six.fileno()).st_ino
                for place, sock in zip(places, listening, strict=True):
                    assert found[place].inode == os.fstat(sock.fileno()).st_ino
            finally:
                for sock in listening:
                    sock.close()

    @pytest.mark.parametrize(
        ("address", "takes"),
        [
            ("0.0.0.0", True),
            ("::", True),
            ("127.77.0.1", True),
            ("::ffff:127.77.0.1", True),
            ("127.77.0.2", False),
            ("::1", False),
        ],
    )
    def test_what_keeps_others_from_listening(self, address: str, takes: bool) -> None:
        sock = ListeningSocket(address, 8265, 0, 1)
        assert sock.takes(("127.77.0.1", 8265)) is takes
        assert not sock.takes(("127.77.0.1", 8266))

    @pytest.mark.parametrize("only", [False, True])
    def test_one_for_ipv6_only_takes_nothing_of_ipv4(self, diag: SockDiag, only: bool) -> None:
        """As asyncio's servers on `::` are, beside which others listen."""
        at = free_place()
        with socket.socket(socket.AF_INET6) as listener:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            listener.bind(("::", at[1]))
            listener.listen()
            (found,) = [s for s in diag.listening(at[0]) if s.port == at[1]]
            assert (found.address, found.ipv6_only, found.takes(at)) == ("::", only, not only)
            assert KernelPorts(os.geteuid(), ()).has(Target(*at)) is not only


class TestWhereItCannotBeAsked:
    def test_a_system_without_netlink(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(socket, "AF_NETLINK")
        with pytest.raises(OSError, match="no netlink"):
            sockdiag.opened()

    def test_a_kernel_without_the_module_knows_no_socket(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SockDiag, "owner_of_peer", lambda *_: None)
        with pytest.raises(OSError, match="does not know"):
            sockdiag.opened()

    def test_an_error_of_the_kernels_is_one(self, diag: SockDiag) -> None:
        diag._sock.close()
        with pytest.raises(OSError):
            diag.listening()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_is_open_where_a_program_of_the_user_takes_the_connection(
    family: socket.AddressFamily,
) -> None:
    at = Target(*free_place())
    ports = KernelPorts(os.geteuid(), ())
    with socket.socket(family) as listener:
        assert not ports.has(at)
        listener.bind(("", at.port))  # all addresses; of IPv6 as gRPC does
        assert not ports.has(at), "it does not listen yet"
        listener.listen()
        assert ports.has(at)
        assert not KernelPorts(os.geteuid(), [at.port]).has(at)
        assert not KernelPorts(OTHER, ()).has(at)


@pytest.mark.parametrize("by", ["lo", "another"])
def test_a_port_is_open_by_the_interface_that_its_program_has_chosen(by: str) -> None:
    """As connections to 127/8 come by the loopback interface (SO_BINDTODEVICE)."""
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    name = "lo" if by == "lo" else others[0] if others else pytest.skip("there is no other")
    at = Target(*free_place())
    loopback = socket.if_nametoindex("lo")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
        listener.bind(("", at.port))
        listener.listen()
        with closing(SockDiag()) as diag:
            (found,) = [sock for sock in diag.listening() if sock.port == at.port]
        assert found.interface == socket.if_nametoindex(name)
        assert KernelPorts(os.geteuid(), (), lambda: loopback).has(at) is (by == "lo")
        with socket.socket() as dialling:
            taken = dialling.connect_ex(at) == 0
        assert taken is (by == "lo"), "as the kernel does"


@needs_root
def test_a_port_is_not_open_where_another_user_would_take_the_connection() -> None:
    """Who listens on the address itself comes before who listens on all."""
    at = Target(*free_place())
    with child(LISTEN, *at, uid=NOBODY) as other:
        other.says()
        assert not KernelPorts(os.geteuid(), ()).has(at)
