"""Every code, once: the name of a fault, and all that any part of rayfwd knows of it.

Used as objects: `codes.HUB_ABSENT.problem(cause, remedy)`, `raise codes.HUB_ABSENT.error(…)`. A new
code is a line here, the place that finds it, and its section in docs/conditions.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rayfwd.problems import Code, Group, Problem

_LINK = (Group.LINK_FAULT, Group.LINK_GONE)
_NODE = (*_LINK, Group.RAY)
"""What explains that a node is no part of the cluster."""

# -- the link ----------------------------------------------------------------

SSH_UNREACHABLE = Code("ssh_unreachable", group=Group.LINK_FAULT, stage="ssh")
SSH_TURNED_AWAY = Code("ssh_turned_away", group=Group.LINK_FAULT, stage="ssh")
SSH_LOGIN_TIMEOUT = Code("ssh_login_timeout", group=Group.LINK_FAULT, stage="auth")
JUMP_REFUSED = Code("jump_refused", group=Group.LINK_FAULT, stage="ssh", lasting=True)
MEETING_REFUSED = Code("meeting_refused", group=Group.LINK_FAULT, lasting=True)
SSH_SECOND_FACTOR = Code("ssh_second_factor", group=Group.LINK_FAULT, stage="auth", lasting=True)
SSH_AUTH_REFUSED = Code("ssh_auth_refused", group=Group.LINK_FAULT, stage="auth", lasting=True)
SSH_KEY_UNUSABLE = Code(
    "ssh_key_unusable", group=Group.LINK_FAULT, stage="auth", before_dialling=True, lasting=True
)
SSH_SIGNING_FAILED = Code("ssh_signing_failed", group=Group.LINK_FAULT, stage="auth", lasting=True)
SSH_TICKET_UNUSABLE = Code(
    "ssh_ticket_unusable", group=Group.LINK_FAULT, stage="auth", lasting=True
)
SSH_FILE_UNREADABLE = Code(
    "ssh_file_unreadable", group=Group.LINK_FAULT, stage="ssh", before_dialling=True, lasting=True
)
SSH_CONFIG_INVALID = Code(
    "ssh_config_invalid", group=Group.LINK_FAULT, stage="ssh", before_dialling=True, lasting=True
)
SSH_ALGORITHMS = Code("ssh_algorithms", group=Group.LINK_FAULT, stage="ssh", lasting=True)
SSH_LIMITED = Code("ssh_limited", "warning", stage="ssh")
OPENSSH_ABSENT = Code(
    "openssh_absent", group=Group.LINK_FAULT, stage="ssh", before_dialling=True, lasting=True
)
SSH_FAILED = Code("ssh_failed", group=Group.LINK_FAULT, stage="ssh")
SSH_LOST = Code(
    "ssh_lost", "warning", Group.LINK_FAULT, for_seconds=3.0, stage="ssh", both_ends=True
)
HOST_KEY_UNKNOWN = Code("host_key_unknown", group=Group.LINK_FAULT, stage="host_key", lasting=True)
HOST_KEY_MISMATCH = Code(
    "host_key_mismatch", group=Group.LINK_FAULT, stage="host_key", lasting=True
)
HOST_KEY_REVOKED = Code("host_key_revoked", group=Group.LINK_FAULT, stage="host_key", lasting=True)
HOST_CERTIFICATE_INVALID = Code(
    "host_certificate_invalid", group=Group.LINK_FAULT, stage="host_key", lasting=True
)
CHANNEL_REFUSED = Code(
    "channel_refused", group=Group.LINK_FAULT, stage="channel", lasting=True, another_way=True
)
HUB_ABSENT = Code("hub_absent", group=Group.LINK_FAULT, another_way=True)
HUB_NOT_PERMITTED = Code(
    "hub_not_permitted", group=Group.LINK_FAULT, lasting=True, another_way=True
)
HUB_UNREACHABLE = Code("hub_unreachable", group=Group.LINK_FAULT, another_way=True)
HUB_SILENT = Code("hub_silent", group=Group.LINK_FAULT)
HUB_CLOSED = Code("hub_closed", group=Group.LINK_FAULT)
USER_NOT_ALLOWED = Code("user_not_allowed", group=Group.LINK_FAULT, lasting=True)
NAME_TAKEN = Code("name_taken", group=Group.LINK_FAULT)
NAME_IN_USE = Code("name_in_use", group=Group.LINK_FAULT)
ADDRESS_TAKEN = Code("address_taken", group=Group.LINK_FAULT)
PLAN_NEARLY_FULL = Code("plan_nearly_full", "warning")
PLAN_FULL = Code("plan_full", group=Group.LINK_FAULT)
LISTENERS_FULL = Code("listeners_full", group=Group.LINK_FAULT)
JOIN_BAD = Code("join_bad", group=Group.LINK_FAULT, lasting=True)
PROOF_WRONG = Code("proof_wrong", group=Group.LINK_FAULT)
CLIENT_ONLY = Code("client_only", group=Group.LINK_FAULT)
KEY_OF_ANOTHER = Code("key_of_another", group=Group.LINK_FAULT, lasting=True)
VOUCH_WRONG = Code("vouch_wrong", group=Group.LINK_FAULT)
PROTOCOL_VERSION = Code("protocol_version", group=Group.LINK_FAULT, lasting=True, breach=True)
HANDSHAKE_EXPECTED = Code("handshake_expected", group=Group.LINK_FAULT, breach=True)
HELLO_MALFORMED = Code("hello_malformed", group=Group.LINK_FAULT, breach=True)
WELCOME_MALFORMED = Code("welcome_malformed", group=Group.LINK_FAULT, breach=True)
REFUSAL_MALFORMED = Code("refusal_malformed", group=Group.LINK_FAULT, breach=True)
FRAME_UNKNOWN = Code("frame_unknown", group=Group.LINK_FAULT, breach=True)
FRAME_TOO_LONG = Code("frame_too_long", group=Group.LINK_FAULT, breach=True)
CLIENTS_FULL = Code("clients_full", "warning")
LANES_FULL = Code("lanes_full", "warning", passing=True)
PLAN_CHANGES = Code("plan_changes", "warning", passing=True)
ROSTER_UNWRITABLE = Code("roster_unwritable", group=Group.LINK_FAULT)
LINK_AWAITED = Code("link_awaited", group=Group.LINK_FAULT, stage="ssh")
LANE_LOST = Code("lane_lost", "warning", Group.LINK_FAULT, for_seconds=3.0, both_ends=True)
LINK_PARKED = Code(
    "link_parked", "note", Group.LINK_GONE, caused_by=(Group.LINK_FAULT,), both_ends=True
)
LINK_DOWN = Code("link_down", group=Group.LINK_GONE, both_ends=True)
LANE_FLAPPING = Code("lane_flapping", "warning", caused_by=_LINK, both_ends=True)
LINK_SLOW = Code("link_slow", "warning", caused_by=_LINK, both_ends=True)
LINK_THROUGHPUT_LOW = Code("link_throughput_low", "warning", caused_by=(*_LINK, LINK_SLOW))
DIRECT_ABSENT = Code("direct_absent", "warning", for_seconds=10.0, caused_by=_LINK)
HUB_STARTING = Code("hub_starting", "note", caused_by=_LINK, untold=True)
LINK_STARTING = Code("link_starting", "note", caused_by=_LINK, untold=True)

# -- this machine ------------------------------------------------------------

LISTENER_BLOCKED = Code("listener_blocked")
DESCRIPTORS_LOW = Code("descriptors_low", "warning")
DESCRIPTORS_EXHAUSTED = Code("descriptors_exhausted", caused_by=(DESCRIPTORS_LOW,))
OPEN_PORT_TAKEN = Code("open_port_taken", "note")
PEER_CHECK_ABSENT = Code("peer_check_absent", "warning")
DISK_NEARLY_FULL = Code("disk_nearly_full", "warning")
SHARED_MEMORY_SMALL = Code("shared_memory_small", "warning")
METRICS_BLOCKED = Code("metrics_blocked")
PAGE_BLOCKED = Code("page_blocked", "warning")
FORWARD_TARGET_UNKNOWN = Code("forward_target_unknown", "note")

# -- the overlay -------------------------------------------------------------

OVERLAY_IMPOSSIBLE = Code("overlay_impossible", "warning")
OVERLAY_FAILED = Code("overlay_failed")
OVERLAY_REFUSED = Code("overlay_refused")
OVERLAY_KEEPER_ABSENT = Code("overlay_keeper_absent")
NETWORK_NEEDS_OVERLAY = Code("network_needs_overlay")
OVERLAY_GONE = Code("overlay_gone", "warning")
OVERLAY_BLOCKED = Code("overlay_blocked")
USERS_LEFT_OUT = Code("users_left_out", "warning")

# -- Ray on a node -----------------------------------------------------------

RAY_NOT_FOUND = Code("ray_not_found", group=Group.RAY)
RAY_NOT_USABLE = Code("ray_not_usable", group=Group.RAY)
RAY_VERSION_UNSUPPORTED = Code("ray_version_unsupported", group=Group.RAY)
RAY_VERSION_DIFFERS = Code("ray_version_differs", group=Group.RAY)
PYTHON_VERSION_DIFFERS = Code("python_version_differs", group=Group.RAY)
NETWORK_IN_USE = Code("network_in_use", group=Group.RAY)
RAY_OF_ANOTHER = Code("ray_of_another", group=Group.RAY)
PORT_IN_USE = Code("port_in_use", group=Group.RAY)
ADVERTISE_DROPPED = Code("advertise_dropped", group=Group.RAY, check="advertise")
ADVERTISE_REFUSED = Code("advertise_refused", group=Group.RAY, check="advertise")
ADVERTISE_UNROUTABLE = Code("advertise_unroutable", group=Group.RAY, check="advertise")
ADVERTISE_WRONG_MACHINE = Code("advertise_wrong_machine", group=Group.RAY, check="advertise")
ADVERTISE_SELF_UNREACHABLE = Code(
    "advertise_self_unreachable", group=Group.RAY, check="advertise_self"
)
ADVERTISE_UNCHECKED = Code("advertise_unchecked", caused_by=_LINK, check="advertise")
RAY_AUTH_DIFFERS = Code("ray_auth_differs", group=Group.RAY)
RAY_AUTH_UNSUPPORTED = Code("ray_auth_unsupported", group=Group.RAY)
RAY_AUTH_UNWRITABLE = Code("ray_auth_unwritable", group=Group.RAY)
RAY_TOKEN_MISSING = Code("ray_token_missing", group=Group.RAY)
RAY_TOKEN_WRONG = Code("ray_token_wrong", group=Group.RAY)
RAY_TOKEN_FILE_DIFFERS = Code("ray_token_file_differs", "warning")
RAY_TOKEN_FILE_UNWRITABLE = Code("ray_token_file_unwritable", "warning")
KEEPER_ABSENT = Code("keeper_absent", group=Group.RAY)
KEEPER_SILENT = Code("keeper_silent", group=Group.RAY)
RAY_DIED = Code("ray_died", group=Group.RAY, caused_by=_LINK, heads_explains=True)
RAY_START_FAILED = Code(
    "ray_start_failed", group=Group.RAY, caused_by=(*_LINK, RAY_DIED, DISK_NEARLY_FULL)
)
RAY_STARTING = Code("ray_starting", "note", caused_by=_LINK, untold=True)
RAY_WORKER_PORTS_EXHAUSTED = Code("ray_worker_ports_exhausted", group=Group.PORTS)

# -- the cluster -------------------------------------------------------------

RAY_DASHBOARD_ABSENT = Code("ray_dashboard_absent", min_samples=2, caused_by=_NODE)
RAY_NODES_FAILED = Code(
    "ray_nodes_failed", "warning", min_samples=2, caused_by=(*_NODE, RAY_DASHBOARD_ABSENT)
)
RAY_STATUS_FAILED = Code(
    "ray_status_failed", "warning", min_samples=2, caused_by=(*_NODE, RAY_DASHBOARD_ABSENT)
)
RAY_TOTALS_STALE = Code("ray_totals_stale", min_samples=2, caused_by=(Group.RAY,))
RAY_ADDRESS_TWICE = Code("ray_address_twice", min_samples=2, caused_by=_NODE)
RAY_NOT_LISTED = Code(
    "ray_not_listed", for_seconds=15.0, min_samples=2, caused_by=(*_NODE, RAY_ADDRESS_TWICE)
)
RAY_RESOURCES_FEWER = Code("ray_resources_fewer", min_samples=2, caused_by=_NODE)
RAY_RESOURCES_NONE = Code("ray_resources_none", min_samples=2, caused_by=_NODE)
RAY_NODE_WITHOUT_RESOURCES = Code(
    "ray_node_without_resources",
    for_seconds=10.0,
    min_samples=2,
    caused_by=(*_NODE, RAY_TOTALS_STALE, RAY_RESOURCES_FEWER, RAY_RESOURCES_NONE),
)
RAY_NODE_FLAPPING = Code("ray_node_flapping", caused_by=(*_NODE, Group.PORTS))
RAY_PORT_UNREACHABLE = Code("ray_port_unreachable", group=Group.PORTS, caused_by=_NODE)
CANARY_NO_TASK = Code("canary_no_task", caused_by=(*_NODE, Group.PORTS))
CANARY_NO_OBJECTS = Code("canary_no_objects", caused_by=(*_NODE, Group.PORTS))
CANARY_FAILED = Code("canary_failed", "warning", caused_by=(*_NODE, Group.PORTS))

# -- what ends a daemon, or answers a command or another node ----------------

ALREADY_RUNNING = Code("already_running", counted=False)
DIRECTORY_UNUSABLE = Code("directory_unusable", counted=False)
SOCKET_IN_USE = Code("socket_in_use", counted=False)
SOCKET_NOT_POSSIBLE = Code("socket_not_possible", counted=False)
SOCKET_PATH_TOO_LONG = Code("socket_path_too_long", counted=False)
NODE_KEY_UNUSABLE = Code("node_key_unusable", counted=False)
USER_UNKNOWN = Code("user_unknown", counted=False)
ROSTER_NEWER = Code("roster_newer", counted=False)
ROSTER_UNREADABLE = Code("roster_unreadable", counted=False)
DAEMON_NOT_RUNNING = Code("daemon_not_running", counted=False, daemon_away=True)
DAEMON_NOT_ANSWERING = Code("daemon_not_answering", counted=False, daemon_away=True)
DAEMON_NOT_PERMITTED = Code("daemon_not_permitted", counted=False)
CONTROL_BAD_REQUEST = Code("control_bad_request", counted=False)
CONTROL_BUSY = Code("control_busy", counted=False)
CONTROL_SLOW = Code("control_slow", counted=False)
CONTROL_FAULT = Code("control_fault", counted=False)
NOT_A_HEAD = Code("not_a_head", counted=False)
RAY_NOT_UP = Code("ray_not_up", counted=False)
CANARY_LOST = Code("canary_lost", counted=False)
STATUS_UNREADABLE = Code("status_unreadable", counted=False)
CONDITION_UNKNOWN = Code("condition_unknown", counted=False)
HELLO_MISSING = Code("hello_missing", counted=False, passing=True)

# What the hub tells of a session that is past.
SESSION_STALE = Code("session_stale", "note", counted=False, passing=True, new_session=True)
SESSION_UNKNOWN = Code("session_unknown", "note", counted=False, passing=True, new_session=True)

# Of a direct way between two workers.
DIRECT_AWAY = Code("direct_away", "note", counted=False, passing=True)
DIRECT_UNKNOWN = Code("direct_unknown", counted=False, passing=True)
DIRECT_WRONG = Code("direct_wrong", counted=False, lasting=True)

# After these a session is at an end.
ACK_AHEAD = Code("ack_ahead", counted=False, breach=True)
ACK_MALFORMED = Code("ack_malformed", counted=False, breach=True)
CONTROL_ENDED = Code("control_ended", counted=False, breach=True)
CREDIT_EXCEEDED = Code("credit_exceeded", counted=False, breach=True)
DATA_AFTER_END = Code("data_after_end", counted=False, breach=True)
END_MOVED = Code("end_moved", counted=False, breach=True)
HANDSHAKE_LATE = Code("handshake_late", counted=False, breach=True)
MESSAGE_TOO_LONG = Code("message_too_long", counted=False, breach=True)
STREAM_NUMBER = Code("stream_number", counted=False, breach=True)
STREAM_UNKNOWN = Code("stream_unknown", counted=False, breach=True)

# Of `rayfwd connect`.
HUB_TOO_OLD = Code("hub_too_old", counted=False, lasting=True)
LISTEN_TAKEN = Code("listen_taken", counted=False)

# Of `rayfwd doctor`.
CHECK_BUSY = Code("check_busy", counted=False, passing=True)
CHECK_LONG = Code("check_long", counted=False, passing=True)
CHECK_MALFORMED = Code("check_malformed", counted=False, passing=True, breach=True)
CLOCK_OFFSET = Code("clock_offset", counted=False)
CONFIG_DOUBTFUL = Code("config_doubtful", counted=False)
CONFIG_INVALID = Code("config_invalid", counted=False)
HUB_OLDER = Code("hub_older", counted=False)
LINK_POOR = Code("link_poor", counted=False)
LOGIN_SLOW = Code("login_slow", counted=False)
NAMES_SLOW = Code("names_slow", counted=False)
PLAN_MALFORMED = Code("plan_malformed", counted=False)
PROCESSES_LOW = Code("processes_low", counted=False)
PROXY_CATCHES = Code("proxy_catches", counted=False)
RAYFWD_VERSION_DIFFERS = Code("rayfwd_version_differs", counted=False)
REPORT_UNWRITABLE = Code("report_unwritable", counted=False)
SSHD_ABSENT = Code("sshd_absent", counted=False)
SSHD_FORBIDS = Code("sshd_forbids", counted=False)

# Of `rayfwd init`, `rayfwd uninstall` and `rayfwd demo`.
MACHINE_FAILED = Code("machine_failed", counted=False)
MANIFEST_UNUSABLE = Code("manifest_unusable", counted=False)
NAMESPACES_FORBIDDEN = Code("namespaces_forbidden", counted=False)
RAYFWD_NOT_EXECUTABLE = Code("rayfwd_not_executable", counted=False)
SETUP_BLOCKED = Code("setup_blocked", counted=False)
SETUP_COMMAND_FAILED = Code("setup_command_failed", counted=False)
SETUP_FAILED = Code("setup_failed", counted=False)
UNINSTALL_FAILED = Code("uninstall_failed", counted=False)

# Of `rayfwd add` and `rayfwd remove`.
ADD_BLOCKED = Code("add_blocked", counted=False)
ADD_FAILED = Code("add_failed", counted=False)
ADD_NO_PACKAGES = Code("add_no_packages", counted=False)
ADD_NO_PYTHON = Code("add_no_python", counted=False)
ADD_NO_WAY = Code("add_no_way", counted=False)
ADD_NOT_READY = Code("add_not_ready", counted=False)

ALL: Mapping[str, Code] = {
    code.name: code for code in list(globals().values()) if isinstance(code, Code)
}
"""Every code by its name."""


def named(name: str) -> Code:
    """The code of this name; of one that is not known here, a `Code` that is an error."""
    return ALL.get(name) or _of_another_version(name)


@lru_cache(maxsize=1024)
def _of_another_version(name: str) -> Code:
    return Code(name, known=False)


def problem_from(wire: Mapping[str, Any]) -> Problem:
    """A problem as `Problem.to_wire` has it. Raises KeyError and TypeError where it is none."""
    texts = [wire[key] for key in ("code", "cause", "remedy")]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("code, cause and remedy must be text")
    return Problem(named(texts[0]), texts[1], texts[2])
