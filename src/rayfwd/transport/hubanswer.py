"""What comes in place of the hub's welcome, and means, for a lane and for a doctor's probe.

Which SSH carries the lane makes no difference.
"""

from __future__ import annotations

from rayfwd import codes
from rayfwd.config import HEAD, Destination
from rayfwd.problems import Problem
from rayfwd.session.frames import Frame, ProtocolError
from rayfwd.session.handshake import Refusal
from rayfwd.system import setting
from rayfwd.transport.carrier import BY_COMMAND


def refusal_in(frame: Frame, to: Destination = HEAD) -> Problem:
    """Why the hub, or another worker, refuses, by its REFUSE."""
    try:
        return Refusal.decode(frame).problem
    except ProtocolError as exc:
        return not_the_hubs(exc, to)


def not_the_hubs(exc: ProtocolError, to: Destination = HEAD) -> Problem:
    """Whatever answers there is no hub, and no other worker."""
    return exc.code.problem(
        f"the program at {to.socket_called} is not rayfwd: {exc}",
        f"check that {to.key('socket')} is {to.socket_called}, and run the same version of rayfwd "
        "on both sides",
    )


def why_no_answer(stderr: str, why: str, to: Destination = HEAD) -> Problem:
    """Why a channel to the hub ended before the hub had answered.

    `stderr` is what `rayfwd attach` wrote on standard error, `why` what is known otherwise.
    """
    for line in stderr.splitlines():
        prefix, _, rest = line.partition("rayfwd attach: ")
        code, colon, text = rest.partition(": ")
        if not prefix and colon and code.isidentifier():
            cause, _, remedy = text.partition("; ")
            return codes.named(code).problem(
                f"on {to.name}: {cause}", remedy or f"read rayfwd's log on {to.name}"
            )
    if (expired := password_expired(stderr, to)) is not None:
        return expired
    ended = "the hub closed the lane before it answered"
    if to != HEAD:
        ended = "the connection ended before it began"
    if BY_COMMAND in stderr:  # neither way leads there
        remedy = (
            f"{start_or_name_socket(to)}; or set {to.key('attach_command')} to how "
            "`rayfwd attach` is run there, with the path of `rayfwd`"
        )
        return codes.HUB_CLOSED.problem(f"{ended}: {stderr}", remedy)
    return codes.HUB_CLOSED.problem(
        f"{ended}: {stderr or why}",
        f"read rayfwd's log on {to.name}; with {to.set_to('via', 'exec')}, check that `rayfwd` is "
        "found there and that this user has a login shell",
    )


def start_or_name_socket(to: Destination) -> str:
    """What to do where nobody listens, as far as is known."""
    if to != HEAD:
        return (
            f"start rayfwd on {to.name}; if it runs there, set {to.key('socket')} to the path of "
            "its socket, which `rayfwd check` prints there"
        )
    option = " or `--socket`" if setting.in_a_file() else ""
    return (
        f"start rayfwd on {to.name}; if it runs there, give the path of its hub's socket, which "
        f"`rayfwd head` and `rayfwd check` print there, as {to.key('socket')}{option}"
    )


def password_expired(said: str, to: Destination) -> Problem | None:
    """Until it has been changed sshd opens nothing, though the key was taken."""
    if "assword change required" not in said:
        return None
    return codes.CHANNEL_REFUSED.problem(
        f"the password of this account on {to.name} has expired, and its sshd opens no channel "
        "until it is changed",
        "change it there (`ssh` by hand asks for it), or let it never expire: on "
        f"{to.name}, `chage -M -1 USER`",
    )


def limited(cause: str, where: str = "there") -> Problem:
    """Something counts new connections there."""
    return codes.SSH_LIMITED.problem(
        cause,
        f"allow more new connections from this machine's address {where}, if something limits "
        "them (`ufw limit`, MaxStartups, PerSourcePenalties, fail2ban); or do nothing: rayfwd "
        "tries again in less than a minute, as some limits count refused attempts too",
    )
