"""What libraries on top of Ray must be told, so that they use the node's address (pure).

Each asks the machine for "its" address in a way of its own: by the host's name, by a socket towards
the internet, by the first interface that is up. None of these is the plan's. Each has a variable
that names an interface or an address instead; a value that the user has set stays.
"""

from __future__ import annotations

from collections.abc import Mapping

INTERFACE_VARIABLES = (
    "GLOO_SOCKET_IFNAME",  # torch.distributed (ProcessGroupGloo.cpp)
    "TP_SOCKET_IFNAME",  # torch.distributed.rpc (TensorPipe's uv transport)
    "NCCL_SOCKET_IFNAME",  # NCCL and RCCL (misc/socket.cc)
    "HCCL_SOCKET_IFNAME",  # Ascend's HCCL
    "CCL_KVS_IFACE",  # oneCCL's key-value store
    "FI_TCP_IFACE",  # libfabric's tcp provider, below oneCCL and MPICH
    "HOROVOD_GLOO_IFACE",  # Horovod (gloo_controller.cc)
    "OMPI_MCA_btl_tcp_if_include",  # Open MPI, data
    "OMPI_MCA_oob_tcp_if_include",  # Open MPI, start-up
    "UCX_NET_DEVICES",  # UCX: MPI, Dask, NIXL
)
ADDRESS_VARIABLES = (
    "VLLM_HOST_IP",  # vLLM (utils/network_utils.py); also what it asks Ray's resources for
    "SGLANG_HOST_IP",  # SGLang
)
FIXED_VARIABLES = {
    # Two machines may both have InfiniBand and share no fabric; NCCL would choose it and hang.
    "NCCL_IB_DISABLE": "1",
}


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
    return {name: value for name, value in wanted.items() if name not in given}
