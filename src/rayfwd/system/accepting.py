"""How a server of asyncio's stops listening without losing whom it has just accepted.

`Server.close` forgets a connection whose transport is not made yet: its socket stays open, for
nobody, until it is collected (`_accept_connection2` in asyncio.selector_events of Python 3.11).
The transport is made a turn of the loop after the connection was accepted.
"""

from __future__ import annotations

import asyncio


def accept_no_more(server: asyncio.Server) -> None:
    """Leave further connections to whoever listens on the socket next."""
    loop = asyncio.get_running_loop()
    for sock in server.sockets:
        loop.remove_reader(sock)


def close_server(server: asyncio.Server) -> None:
    """Close it in the loop's next turn. Its protocols may still meet whom it has accepted."""
    accept_no_more(server)
    asyncio.get_running_loop().call_soon(server.close)
