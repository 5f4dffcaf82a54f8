"""The overlay's rules as text, what libraries are told, and which level a node takes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from rayfwd import codes
from rayfwd.cluster.environment import library_environment
from rayfwd.config import NetworkConfig
from rayfwd.network import manager
from rayfwd.network.manager import Overlay
from rayfwd.network.overlay_client import KEEPER
from rayfwd.network.ruleset import MOST_RANGES, Rules, port_ranges, removal, ruleset, update

RULES = Rules(
    interface="rayfwd0",
    network="127.77.0.0/16",
    own="127.77.0.1",
    port=19977,
    uids=frozenset({0, 1000}),
    open_ports={"127.77.0.2": ((20000, 20010), (41000, 41000)), "127.77.0.3": ()},
    guarded=((20020, 20040),),
)


def test_over_the_wire_and_back() -> None:
    assert Rules.from_wire(RULES.to_wire()) == RULES


@pytest.mark.parametrize("key", RULES.to_wire())
def test_a_key_that_is_missing(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Rules.from_wire({k: v for k, v in RULES.to_wire().items() if k != key})


def test_a_node_with_no_open_port_is_known_all_the_same() -> None:
    """It refuses, as a machine does on which nothing listens; it is not unreachable."""
    text = ruleset(RULES)
    assert "add element inet rayfwd0 nodes { 127.77.0.2, 127.77.0.3 }" in text
    assert "127.77.0.3 ." not in text


def test_an_update_leaves_chains_alone() -> None:
    text = update(RULES)
    assert "chain" not in text
    assert text.startswith("flush set inet rayfwd0 nodes\n")
    assert "add element inet rayfwd0 open { 127.77.0.2 . 20000-20010, 127.77.0.2 . 41000 }" in text


def test_without_ports() -> None:
    """nft takes no empty list of elements."""
    bare = replace(RULES, open_ports={}, guarded=())
    assert "add element" not in ruleset(bare)
    assert removal("rayfwd0").splitlines()[-1] == "delete table inet rayfwd0"


def test_too_many_ranges() -> None:
    ranges = tuple((port, port) for port in range(1, 20002, 2))
    with pytest.raises(ValueError, match=f"over {MOST_RANGES}"):
        replace(RULES, open_ports={"127.77.0.2": ranges, "127.77.0.3": ranges})


@pytest.mark.parametrize(
    ("ports", "ranges"),
    [([], ()), ([5], ((5, 5),)), ([3, 1, 2, 2], ((1, 3),)), ([9, 7, 8, 1], ((1, 1), (7, 9)))],
)
def test_port_ranges(ports: list[int], ranges: tuple[tuple[int, int], ...]) -> None:
    assert port_ranges(ports) == ranges


def test_libraries_are_told_interface_and_address() -> None:
    told = library_environment("127.77.0.2", "rayfwd0", {"NCCL_SOCKET_IFNAME": "ib0"})
    assert told["GLOO_SOCKET_IFNAME"] == "rayfwd0"
    assert told["VLLM_HOST_IP"] == "127.77.0.2"
    assert "NCCL_SOCKET_IFNAME" not in told, "the user's word stands"


def test_without_an_interface() -> None:
    told = library_environment("127.77.0.2", None, {})
    assert "GLOO_SOCKET_IFNAME" not in told
    assert told["VLLM_HOST_IP"] == "127.77.0.2"


IMPOSSIBLE = codes.OVERLAY_IMPOSSIBLE.problem("there is no right to", "ask for it")


def settled(
    level: Literal["auto", "overlay", "listeners"], directory: Path, env: dict[str, str]
) -> Overlay:
    """An overlay that knows its level."""
    config = NetworkConfig(level=level)
    overlay = Overlay(config, directory, frozenset, lambda: None, env)
    asyncio.run(overlay.settle())
    return overlay


@pytest.mark.parametrize("level", ["auto", "overlay", "listeners"])
def test_a_machine_without_the_right(
    level: Literal["auto", "overlay", "listeners"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` takes the next level and says why; who asks for the overlay is warned."""
    monkeypatch.setattr(manager, "possible", lambda: IMPOSSIBLE)
    overlay = settled(level, tmp_path, {})
    assert (overlay.level, overlay.interface, overlay.port) == ("listeners", None, None)
    assert overlay.problem == (IMPOSSIBLE if level == "overlay" else None)
    asked = 'network.level = "listeners"'
    assert overlay.why == (asked if level == "listeners" else IMPOSSIBLE.cause)


def test_a_service_that_does_not_answer(tmp_path: Path) -> None:
    overlay = settled("auto", tmp_path, {KEEPER: str(tmp_path / "overlay.sock")})
    assert overlay.level == "listeners"
    assert "does not answer" in overlay.why or "is not there" in overlay.why
