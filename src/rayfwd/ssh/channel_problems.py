"""What is wrong where a login succeeds and no channel to the hub opens, whichever SSH asks for one.

sshd itself does not say why. Whoever calls these has looked at the socket, if that is possible.
"""

from __future__ import annotations

from pathlib import Path

from rayfwd import codes
from rayfwd.config import HEAD, Destination
from rayfwd.problems import Problem
from rayfwd.ssh.socket_check import Look
from rayfwd.system import setting
from rayfwd.transport.hubanswer import start_or_name_socket


def hub_absent(path: Path, to: Destination) -> Problem:
    """Nobody listens there."""
    cause = f"nothing answers at {path} on {to.name}"
    return codes.HUB_ABSENT.problem(cause, start_or_name_socket(to))


def attach_forced(to: Destination) -> Problem:
    """The line of authorized_keys decides what runs, and lets nothing else be done."""
    return codes.CHANNEL_REFUSED.problem(
        f"this machine's key may run `rayfwd attach` on {to.name} and nothing else (a forced "
        "command in authorized_keys, or rayfwd's own SSH there), so no socket is opened for it",
        f"set {to.set_to('via', 'exec')}",
    )


def forwarding_allowed(to: Destination) -> str:
    """What may shut the way to a socket, and is to let it be."""
    return (
        f"allow it on {to.name}: AllowStreamLocalForwarding, AllowTcpForwarding and PermitOpen in "
        "sshd_config (any PermitOpen other than `any` blocks sockets too; no DisableForwarding), "
        "and no `restrict` or `no-port-forwarding` in authorized_keys"
    )


def not_started(why: str, to: Destination) -> Problem:
    """There is a session, and the command in it could not be begun."""
    return codes.CHANNEL_REFUSED.problem(
        f"{to.name}'s sshd could not start a command for this user: {why}",
        f"check this account's limits on {to.name} (nproc in /etc/security/limits.conf, TasksMax "
        "of its systemd slice), the memory there, and its sshd log",
    )


def sessions_allowed(to: Destination) -> str:
    """What may shut the way by a command."""
    return f"allow sessions for this key on {to.name} (MaxSessions, authorized_keys)"


def socket_unreachable(path: Path, reason: str, to: Destination) -> Problem:
    """Nobody says what keeps sshd from it."""
    who = (
        f"the hub's, and open to this user ({setting.theirs('hub.users')})"
        if to == HEAD
        else "where its daemon waits"
    )
    return codes.HUB_UNREACHABLE.problem(
        f"{to.name}'s sshd could not open {path}: {reason}",
        f"check that rayfwd runs on {to.name}, that this socket is {who}, and that sshd allows it "
        "(AllowStreamLocalForwarding, AllowTcpForwarding, PermitOpen); or set "
        f"{to.set_to('via', 'exec')}, where the key is restricted in authorized_keys (`restrict`, "
        "as in the line that `rayfwd init` prints)",
    )


def not_permitted(path: Path, why: str, to: Destination) -> Problem:
    """The socket is there, and is not this user's to open."""
    remedy = "log in as the user that runs rayfwd"
    if to == HEAD:
        add = f"add the user to {setting.theirs('hub.users')} and restart rayfwd there"
        remedy = f"{add}, or {remedy}"
    return codes.HUB_NOT_PERMITTED.problem(
        f"this SSH user may not open {path} on {to.name}: {why}", remedy
    )


def of_look(look: Look | None, path: Path, to: Destination) -> Problem:
    """Why the socket was not opened, by what a command saw there, as that machine would word it."""
    if look is None:
        remedy = socket_unreachable(path, "", to).remedy
        return codes.HUB_UNREACHABLE.problem(f"its sshd could not open {path}", remedy)
    match look.seen:
        case "absent" | "silent":
            absent = hub_absent(path, to)
            return absent.code.problem(f"nothing answers at {path}", absent.remedy)
        case "shut":
            return not_permitted(path, "this user may not enter its directory", to)
        case "owned":
            whose = f"it belongs to uid {look.uid} with mode {look.mode:04o}"
            return not_permitted(path, whose, to)
        case "listens":
            return codes.CHANNEL_REFUSED.problem(
                f"its sshd refuses this kind of channel, while rayfwd listens at {path}",
                f"set {to.set_to('via', 'exec')}, or {forwarding_allowed(to)}",
            )
