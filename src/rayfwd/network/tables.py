"""A way to make tables of nftables that no other program removes.

A table with an owner (Linux 5.12) belongs to a netlink socket: `nft flush ruleset` and firewalls
that are loaded anew pass it over, and it is gone when the socket is closed, however that happens.
The command `nft` closes its own at its end, so that this is libnftables itself.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_uint32, c_void_p

_LIBRARY = "libnftables.so.1"


class OwnTables:
    """A context of libnftables: what it makes with `flags owner` goes with this process."""

    def __init__(self) -> None:
        """Raises OSError where the library is not there, or no context can be had."""
        lib = ctypes.CDLL(_LIBRARY)
        lib.nft_ctx_new.argtypes, lib.nft_ctx_new.restype = (c_uint32,), c_void_p
        for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
            function = getattr(lib, name)
            function.argtypes, function.restype = (c_void_p,), c_int
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            function = getattr(lib, name)
            function.argtypes, function.restype = (c_void_p,), c_char_p
        lib.nft_run_cmd_from_buffer.argtypes = c_void_p, c_char_p
        lib.nft_run_cmd_from_buffer.restype = c_int
        self._lib = lib
        self._context = lib.nft_ctx_new(0)
        if not self._context:
            raise OSError(f"{_LIBRARY} gives no context")
        lib.nft_ctx_buffer_output(self._context)
        lib.nft_ctx_buffer_error(self._context)

    def run(self, text: str) -> None:
        """As `nft -f`, one transaction. Raises OSError with what it said."""
        failed = self._lib.nft_run_cmd_from_buffer(self._context, text.encode())
        self._lib.nft_ctx_get_output_buffer(self._context)  # which empties it
        said = (self._lib.nft_ctx_get_error_buffer(self._context) or b"").decode(errors="replace")
        if failed:
            raise OSError(f"nft: {said.strip().splitlines()[0] if said.strip() else 'failed'}")
