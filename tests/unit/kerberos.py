"""A Kerberos realm of a test's own: a real KDC on loopback, with one user and one server."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.need import need, tool
from tests.unit.ports import free_port

REALM = "TEST.EXAMPLE"
SERVER = "localhost"
"""The name under which the server is known."""
TOOLS = {
    "krb5kdc": "krb5-kdc",
    "kdb5_util": "krb5-kdc",
    "kadmin.local": "krb5-admin-server",
    "kinit": "krb5-user",
}
"""Each with its Debian package."""


class Realm:
    """Principals: this user, `other`, and the server `host/localhost`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.user = getpass.getuser()
        self.ccache = directory / "ccache"
        self.keytab = directory / "server.keytab"
        self.client_keytab = directory / "client.keytab"
        self.port = free_port()
        self._kdc: subprocess.Popen[bytes] | None = None
        self._write_configuration()
        self.env = {
            "KRB5_CONFIG": str(directory / "krb5.conf"),
            "KRB5_KDC_PROFILE": str(directory / "kdc.conf"),
            "KRB5CCNAME": f"FILE:{self.ccache}",
            "KRB5_KTNAME": str(self.keytab),
        }
        self.run("kdb5_util", "create", "-s", "-r", REALM, "-P", "master")
        for principal, keytab in (
            (f"host/{SERVER}", self.keytab),
            (self.user, self.client_keytab),
            ("other", directory / "other.keytab"),
        ):
            self.run("kadmin.local", "addprinc", "-randkey", principal)
            self.run("kadmin.local", "ktadd", "-q", "-k", str(keytab), principal)

    def _write_configuration(self) -> None:
        (self.directory / "krb5.conf").write_text(
            f"""[libdefaults]
 default_realm = {REALM}
 dns_lookup_kdc = false
 dns_lookup_realm = false
 dns_canonicalize_hostname = false
 rdns = false
 udp_preference_limit = 1
 kdc_timesync = 0
 default_rcache_name = none:
[realms]
 {REALM} = {{
  kdc = 127.0.0.1:{self.port}
 }}
[logging]
 kdc = FILE:{self.directory}/kdc.log
"""
        )
        (self.directory / "kdc.conf").write_text(
            f"""[kdcdefaults]
 kdc_listen = 127.0.0.1:{self.port}
 kdc_tcp_listen = 127.0.0.1:{self.port}
[realms]
 {REALM} = {{
  database_name = {self.directory}/principal
  key_stash_file = {self.directory}/stash
 }}
"""
        )

    def run(self, *words: str) -> None:
        subprocess.run(
            [tool(words[0]), *words[1:]],
            env={**os.environ, **self.env},
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        self._kdc = subprocess.Popen(
            [tool("krb5kdc"), "-n"],
            env={**os.environ, **self.env},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 20
        while not self._listens():
            assert self._kdc.poll() is None, (self.directory / "kdc.log").read_text()
            assert time.monotonic() < until, "the KDC does not listen"
            time.sleep(0.02)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    @property
    def runs(self) -> bool:
        return self._kdc is not None

    def stop(self) -> None:
        if self._kdc is not None:
            self._kdc.kill()
            self._kdc.wait()
            self._kdc = None

    def get_ticket(self, principal: str = "", *words: str) -> None:
        """By its keytab, so that nobody types a password."""
        keytab = self.directory / f"{principal}.keytab" if principal else self.client_keytab
        self.run("kinit", "-k", "-t", str(keytab), *words, principal or self.user)

    def has_ticket(self) -> bool:
        """One that has not expired."""
        asked = [tool("klist"), "-s"]
        return subprocess.run(asked, env={**os.environ, **self.env}, check=False).returncode == 0

    def destroy_tickets(self) -> None:
        self.ccache.unlink(missing_ok=True)


@contextmanager
def realm(directory: Path) -> Iterator[Realm]:
    """One whose KDC runs."""
    for name, package in TOOLS.items():
        there = os.path.isabs(tool(name))
        need(None if there else f"there is no {name} (Debian package {package})")
    made = Realm(directory)
    made.start()
    try:
        yield made
    finally:
        made.stop()
