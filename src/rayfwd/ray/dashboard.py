"""One question to the head's dashboard (Ray 2.9 to 2.60)."""

from __future__ import annotations

import http.client

from rayfwd.transport.endpoints import Endpoint

ANSWER_TIMEOUT = 10.0
"""Seconds."""
BODY_LIMIT = 64 * 1024 * 1024
"""Bytes of an answer that are read."""


def get(dashboard: Endpoint, path: str, token: str | None) -> bytes:
    """The body of its answer. Raises OSError, and HTTPException for any status but 200.

    `token` is Ray's own (2.52 and later with RAY_AUTH_MODE=token). No proxy is used.
    """
    # http.client knows no proxies, unlike urllib.
    connection = http.client.HTTPConnection(*dashboard, timeout=ANSWER_TIMEOUT)
    try:
        # Older dashboards answer a request without User-Agent with status 500.
        headers = {"Accept": "application/json", "User-Agent": "rayfwd"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read(BODY_LIMIT)
        if response.status != http.client.OK:
            raise http.client.HTTPException(f"status {response.status}: {body[:200]!r}")
        return body
    finally:
        connection.close()
