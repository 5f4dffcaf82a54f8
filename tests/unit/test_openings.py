"""What a node opens for the ports of others, by the view, its file and what they have announced."""

from __future__ import annotations

from typing import Any

from rayfwd.cluster.plan import NodePlan, allocate, head_plan
from rayfwd.config import parse
from rayfwd.daemon.openings import EVERY_PORT, Openings
from rayfwd.network.announced import Announced
from rayfwd.network.ruleset import port_ranges
from rayfwd.session.messages import OpenPorts
from rayfwd.session.target import Target
from rayfwd.transport.listeners import REDIRECTED, listeners_for
from rayfwd.watch.cluster_view import ClusterView

NETWORK = "127.77.0.0/16"
SERVICES = {"gcs": 6379, "dashboard": 8265, "client": 10001}
HEAD = head_plan("h", NETWORK, 20000, 40, SERVICES)
W1 = allocate([HEAD], "w1", NETWORK, 20000, 40, None)
W2 = allocate([HEAD, W1], "w2", NETWORK, 20000, 40, None)
DIRECT = allocate([HEAD, W1, W2], "direct", NETWORK, 20000, 40, "203.0.113.7")


def openings(
    own: NodePlan | None,
    *nodes: NodePlan,
    announced: Announced | None = None,
    away: str = "",
    **keys: Any,
) -> Openings:
    config = parse({"role": "worker", "name": "w1", "head": {"ssh": "ray@head"}, **keys})
    view = ClusterView(NETWORK, 60.0, own, (HEAD, *nodes))
    return Openings(view, config, announced or Announced(), lambda name: name != away)


def test_every_port_of_another_nodes_plan_has_a_listener() -> None:
    wanted, passing = openings(W1, W1, W2, DIRECT, forward=[]).listeners(None)
    ports = listeners_for(HEAD.address, HEAD.ports) | listeners_for(W2.address, W2.ports)
    assert (wanted, passing) == (ports, {})


def test_a_workers_further_listener_leads_to_the_heads_dashboard() -> None:
    wanted, _ = openings(W1, W1).listeners(None)
    assert next(iter(wanted.items())) == (Target("127.0.0.1", 8265), Target(HEAD.address, 8265))
    assert Target("127.0.0.1", 8265) not in openings(W1, W1, forward=[]).listeners(None)[0]


def test_with_the_overlay_one_listener_is_for_all() -> None:
    wanted, passing = openings(W1, W1, W2, forward=[]).listeners(4000)
    assert (wanted, passing) == ({Target("127.0.0.1", 4000): REDIRECTED}, {})


def test_what_others_have_open_is_open_here_but_for_our_own_rays_ports() -> None:
    announced = Announced()
    announced.hear("w2", OpenPorts(True, (29500, W1.base), ()))
    _, passing = openings(W1, W1, W2, announced=announced).listeners(None)
    assert passing == listeners_for(W2.address, [29500])


def test_the_overlay_lets_through_what_is_open_there_and_everything_to_who_is_away() -> None:
    announced = Announced()
    announced.hear("w2", OpenPorts(True, (29500,), ()))
    wanted = openings(W1, W1, W2, announced=announced, away="h").overlay(frozenset({8000}))
    assert wanted is not None
    assert (wanted.network, wanted.own) == (NETWORK, W1.address)
    assert wanted.open_ports == {
        HEAD.address: EVERY_PORT,
        W2.address: port_ranges({*W2.ports, 29500}),
    }
    assert wanted.guarded == port_ranges({*W1.ports, 8000})
    assert openings(None, W1).overlay(frozenset()) is None


def test_an_advertised_node_is_guarded_where_its_file_says_from_whom() -> None:
    assert not openings(DIRECT, DIRECT, W1).guards
    other = allocate([HEAD, DIRECT], "other", NETWORK, 20000, 40, "203.0.113.8")
    named = openings(DIRECT, DIRECT, other, W1, network={"guard_from": ["198.51.100.0/24"]})
    assert named.guards
    assert named.friends == ("198.51.100.0/24", "203.0.113.8/32")
    assert not openings(W1, W1, network={"guard": False}).guards


def test_ports_are_held_apart_where_anybody_listens() -> None:
    apart = {"apart": ["30000-30003"]}
    held = openings(W1, W1, W2, network=apart).held()
    assert held is not None
    assert held[0] == "127.77.255.255"
    assert held[1] < set(range(30000, 30004))
    assert openings(None, W1, network=apart).held() is None
