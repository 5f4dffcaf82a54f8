"""The hub: where the workers' lanes end on the head, and where workers reach each other.

It listens on a Unix socket, which workers reach through the head's sshd. Who connects is known by
the socket's peer credentials, which node it is by the key that the node shows. Clients, which are
no nodes, come the same way: they reach some ports of the head, and nobody reaches them.
"""

from rayfwd.hub.hub import Hub
from rayfwd.hub.offer import HubOffer, HubOwner
from rayfwd.hub.peers import HubClient, HubNode

__all__ = ["Hub", "HubClient", "HubNode", "HubOffer", "HubOwner"]
