"""Keys that somebody else holds: an agent whose key is a FIDO authenticator's (PROTOCOL.u2f,
draft-miller-ssh-agent), and a PKCS#11 token by SoftHSM.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.need import need, tool

# -- an authenticator --------------------------------------------------------------------------

KIND = b"sk-ssh-ed25519@openssh.com"
APPLICATION = b"ssh:"
TOUCHED = 0x01
FAILURE, IDENTITIES, ANSWER, SIGN, SIGNATURE = 5, 11, 12, 13, 14

Person = Literal["touches", "is slow", "is away", "refuses", "need not touch"]


def string(data: bytes) -> bytes:
    """As SSH writes one (RFC 4251)."""
    return struct.pack(">I", len(data)) + data


class Authenticator:
    """Signs as FIDO's do: with a counter, and whether it was touched."""

    def __init__(self, person: Person = "touches") -> None:
        self.person: Person = person
        self.asked = 0
        """Signatures that were wanted."""
        self._key = Ed25519PrivateKey.generate()
        self._counter = 0
        self.public_bytes = self._key.public_key().public_bytes_raw()
        self.blob = string(KIND) + string(self.public_bytes) + string(APPLICATION)

    @property
    def public_key(self) -> str:
        """A line for authorized_keys."""
        return f"{KIND.decode()} {base64.b64encode(self.blob).decode()}"

    def sign(self, message: bytes) -> bytes:
        self._counter += 1
        flags = 0 if self.person == "need not touch" else TOUCHED
        beside = struct.pack(">BI", flags, self._counter)
        digest = hashlib.sha256(message).digest()
        signed = self._key.sign(hashlib.sha256(APPLICATION).digest() + beside + digest)
        return string(KIND) + string(signed) + beside

    @asynccontextmanager
    async def agent(self, path: Path) -> AsyncIterator[None]:
        """An agent at that socket that has the key."""
        self._over = asyncio.Event()
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield
        finally:
            self._over.set()
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (length,) = struct.unpack(">I", await reader.readexactly(4))
                writer.write(string(await self._answer(await reader.readexactly(length))))
        except (EOFError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, asked: bytes) -> bytes:
        if asked[0] == IDENTITIES:
            return struct.pack(">BI", ANSWER, 1) + string(self.blob) + string(b"my-key")
        if asked[0] != SIGN or self.person == "refuses":
            return bytes([FAILURE])
        self.asked += 1
        if self.person == "is away":
            await self._over.wait()
            return bytes([FAILURE])
        if self.person == "is slow":
            await asyncio.sleep(1.5)
        at = 1 + 4 + len(self.blob)
        (length,) = struct.unpack_from(">I", asked, at)
        return bytes([SIGNATURE]) + string(self.sign(asked[at + 4 : at + 4 + length]))


# -- a token -----------------------------------------------------------------------------------

PIN = "1234"
WITHOUT_PIN = r"""
/* Another PKCS#11 module, that logs in at its token by itself, and says that nobody has to. */
#include <dlfcn.h>
#include <string.h>
typedef unsigned long U;
typedef U (*F)();
static struct list { unsigned char version[2]; F function[68]; } own;
static F token_info, open_session, login;
static U info(U slot, unsigned char *info) {
    U failed = token_info(slot, info);
    if (!failed) *(U *)(info + 96) &= ~4UL; /* flags: CKF_LOGIN_REQUIRED */
    return failed;
}
static U open_it(U slot, U flags, void *a, void *b, U *session) {
    U failed = open_session(slot, flags, a, b, session);
    if (!failed) login(*session, 1UL, PIN, strlen(PIN)); /* CKU_USER */
    return failed;
}
U C_GetFunctionList(struct list **list) {
    struct list *theirs;
    void *module = dlopen(MODULE, RTLD_NOW);
    if (!module) return 5;
    ((U (*)(struct list **))dlsym(module, "C_GetFunctionList"))(&theirs);
    own = *theirs;
    token_info = own.function[6], open_session = own.function[12], login = own.function[18];
    own.function[6] = (F)info, own.function[12] = (F)open_it;
    *list = &own;
    return 0;
}
"""
MODULES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so")


class Token:
    """Has one RSA key, and wants its PIN for it."""

    def __init__(self, directory: Path) -> None:
        util = tool("softhsm2-util")
        need(None if os.path.isabs(util) else "there is no softhsm2-util (Debian package softhsm2)")
        (module,) = [path for path in MODULES if Path(path).exists()]
        self.module = module
        (directory / "tokens").mkdir(parents=True)
        config = directory / "softhsm2.conf"
        config.write_text(f"directories.tokendir = {directory}/tokens\nlog.level = ERROR\n")
        self.env = {"SOFTHSM2_CONF": str(config)}
        key = rsa.generate_private_key(65537, 2048)
        pem = directory / "key.pem"
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        self.public_key = key.public_key().public_bytes(*form).decode()
        pins = ["--so-pin", PIN, "--pin", PIN]
        self._run([util, "--init-token", "--free", "--label", "the-token", *pins])
        named = ["--token", "the-token", "--label", "the-key", "--id", "01"]
        self._run([util, "--import", str(pem), *named, "--pin", PIN])
        pem.unlink()

    def _run(self, words: list[str], **env: str) -> None:
        every = {**os.environ, **self.env, **env}
        subprocess.run(words, env=every, check=True, capture_output=True, timeout=30)

    def without_pin(self, directory: Path) -> Path:
        """A module by which the same token wants no PIN."""
        need(None if os.path.isabs(tool("cc")) else "there is no C compiler (Debian package gcc)")
        source, made = directory / "module.c", directory / "module.so"
        source.write_text(WITHOUT_PIN)
        named = [f'-DMODULE="{self.module}"', f'-DPIN="{PIN}"']
        words = ["-std=gnu11", "-w", "-shared", "-fPIC", *named, "-o", str(made), str(source)]
        self._run([tool("cc"), *words, "-ldl"])
        return made

    @contextmanager
    def agent(self, directory: Path) -> Iterator[Path]:
        """The socket of an agent that has been told the PIN (`ssh-add -s`)."""
        path, ask = directory / "agent", directory / "ask"
        ask.write_text(f"#!/bin/sh\necho {PIN}\n")
        ask.chmod(0o700)
        words = [tool("ssh-agent"), "-s", "-a", str(path), "-P", f"{Path(self.module).resolve()}"]
        env = {**os.environ, **self.env}
        said = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
        try:
            asks = {"SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}
            self._run([tool("ssh-add"), "-s", self.module], SSH_AUTH_SOCK=str(path), **asks)
            yield path
        finally:
            os.kill(int(said.partition("SSH_AGENT_PID=")[2].partition(";")[0]), signal.SIGTERM)
