"""What libraries on top of Ray must be told, so that they use the node's address (pure).

Each asks the machine for "its" address in a way of its own: by the host's name, by a socket towards
the internet, by the first interface that is up. None of these is the plan's. Each has a variable
that names an interface or an address instead; a value that the user has set stays.

Nothing is needed by those whom Ray itself tells the node's address: torch's TCPStore, XGBoost's
tracker, LightGBM, JAX's coordinator and TensorFlow (TF_CONFIG). JAX's collectives between CPUs are
gloo's without a variable: they ask for the host's own name (make_cpu_client in
jax/_src/xla_bridge.py gives neither a name nor an interface).
"""

from __future__ import annotations

from collections.abc import Mapping

INTERFACE_VARIABLES = (
    "GLOO_SOCKET_IFNAME",  # torch.distributed's gloo (torch/csrc/distributed/c10d/init.cpp)
    "TP_SOCKET_IFNAME",  # torch.distributed.rpc (torch/csrc/distributed/rpc/tensorpipe_agent.cpp)
    "NCCL_SOCKET_IFNAME",  # NCCL (src/misc/socket.cc), RCCL: the beginning of a name
    "HCCL_SOCKET_IFNAME",  # Ascend's HCCL: the beginning of a name
    "CCL_KVS_IFACE",  # oneCCL's key-value store, by which its ranks meet
    "FI_TCP_IFACE",  # libfabric's tcp provider, below oneCCL and MPICH (prov/tcp)
    "HOROVOD_GLOO_IFACE",  # Horovod (horovod/common/utils/env_parser.cc)
    "OMPI_MCA_btl_tcp_if_include",  # Open MPI, data (opal/mca/btl/tcp)
    "OMPI_MCA_oob_tcp_if_include",  # Open MPI to version 4, start (orte/mca/oob/tcp)
    "PRTE_MCA_prte_if_include",  # Open MPI from version 5 on, start: PRRTE
    "UCX_NET_DEVICES",  # UCX: MPI, Dask, NIXL (src/uct/tcp)
)
ADDRESS_VARIABLES = (
    "VLLM_HOST_IP",  # vLLM (vllm/envs.py); it asks Ray for the resource `node:` of this address
    "SGLANG_HOST_IP",  # SGLang (get_ip in python/sglang/srt/utils)
    # torchrun, --local-addr (torch/distributed/run.py): what rank 0's machine tells the others of
    # itself. Without it that is the machine's own name.
    "PET_LOCAL_ADDR",
)
FIXED_VARIABLES = {
    # Two machines may both have InfiniBand and share no fabric; NCCL would choose it and hang
    # (NCCL_PARAM(IbDisable, …) in src/transport/net_ib).
    "NCCL_IB_DISABLE": "1",
}
SHARING_VARIABLES = {
    # Serve's HAProxies all listen on one port, on all addresses. Without it they do not share that
    # with a listener for another node's (enable_so_reuseport in serve/_private/haproxy.py).
    "SERVE_SOCKET_REUSE_PORT_ENABLED": "1",
}
"""What makes programs share their ports with listeners, where it is theirs to choose."""


def library_environment(
    address: str, interface: str | None, given: Mapping[str, str]
) -> dict[str, str]:
    """The variables to add to Ray's environment.

    `interface` has `address`; None: there is none, at the level `listeners`. What is in `given` is
    left alone.
    """
    wanted = dict.fromkeys(ADDRESS_VARIABLES, address) | FIXED_VARIABLES
    if interface is not None:
        wanted |= dict.fromkeys(INTERFACE_VARIABLES, interface)
    else:
        wanted |= SHARING_VARIABLES
    return {name: value for name, value in wanted.items() if name not in given}
