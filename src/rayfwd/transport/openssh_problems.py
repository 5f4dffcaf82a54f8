"""What `ssh` said on standard error, as the problem that it is: at which hop, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Problem
from rayfwd.transport import sshproblems
from rayfwd.transport.openssh import OpensshHop

_LOGGED_IN = re.compile(r"^Authenticated to ", re.MULTILINE)
_CONNECT = re.compile(r"connect to (?:host|address) (\S+) port (\d+): (.+)")
_RESOLVE = re.compile(r"Could not resolve hostname \S+: (.+)")
_DENIED = re.compile(r"Permission denied \((.*?)\)")
_TOO_MANY = re.compile(r"Too many authentication failures.*")
_ENDED = re.compile(
    r"(?:Connection (?:closed|reset) by .*|Connection to .* closed.*|.*Broken pipe.*"
    r"|Received disconnect from .*|kex_exchange_identification: .*|Timeout, server .*)"
)
_FORBIDDEN = re.compile(r"open failed: administratively prohibited: (.*)")
_NOT_OPENED = re.compile(r"open failed: (?:connect failed|resource shortage|\S+ \S+): (.*)")
_KEY = re.compile(r'Load key (".*?": .+)|(.*UNPROTECTED PRIVATE KEY FILE.*)')
_REVOKED = re.compile(r"REVOKED HOST KEY|revoked host key|is revoked|marked as revoked")
_HOST_KEY = re.compile(
    r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|host key is known for"
)
_SETTING = re.compile(r".*(?:Bad configuration option|Bad owner or permissions|terminating, ).*")


def hops_passed(hops: Sequence[OpensshHop], said: str) -> int:
    """To how many of the hops it has logged in: each `ssh` says so of its own."""
    needed = [hop for hop in hops if not hop.shared]
    return len(hops) - len(needed) + min(len(_LOGGED_IN.findall(said)), len(needed))


def explain(head: HeadConfig, hops: Sequence[OpensshHop], said: str) -> Problem:
    """The problem behind an `ssh` that ended before it stood."""
    said = "\n".join(line.strip() for line in said.splitlines())
    hop = hops[min(hops_passed(hops, said), len(hops) - 1)]
    for look in (_of_login, _of_jump, _of_connection):
        if (problem := look(head, hop, said)) is not None:
            return problem
    last = next(reversed(said.splitlines()), "") or "`ssh` ended without a message"
    return codes.SSH_FAILED.problem(
        f"{hop.called}: {last}",
        f"run `ssh -v {head.ssh}` on this machine, as the user that runs rayfwd, to see more",
    )


def _of_login(head: HeadConfig, hop: OpensshHop, said: str) -> Problem | None:
    """Where the server has answered, or nothing was dialled."""
    if (found := _SETTING.search(said)) is not None:
        return codes.SSH_CONFIG_INVALID.problem(found[0], "correct the SSH configuration")
    if _REVOKED.search(said):
        return sshproblems.host_key_problem(head, hop, revoked=True)
    if _HOST_KEY.search(said):
        return sshproblems.host_key_problem(head, hop)
    if (found := _TOO_MANY.search(said)) is not None:
        return sshproblems.too_many_keys(found[0], hop)
    if (found := _DENIED.search(said)) is not None:
        if "with partial success" in said:
            return sshproblems.second_factor(hop)
        if (key := _KEY.search(said)) is not None:
            return sshproblems.key_unusable(key[1] or key[2])
        return sshproblems.keys_refused(f"it takes: {found[1]}", hop)
    return None


def _of_jump(_: HeadConfig, hop: OpensshHop, said: str) -> Problem | None:
    """Where a jump host did not lead on to this hop."""
    if hop.first:
        return None
    if (found := _FORBIDDEN.search(said)) is not None:
        return sshproblems.jump_forbids(found[1], hop)
    if (found := _NOT_OPENED.search(said)) is not None:
        return sshproblems.jump_cannot(found[1], hop)
    return None


_OF_CONNECT: tuple[tuple[str, Callable[[OpensshHop, str], Problem]], ...] = (
    ("refused", sshproblems.not_listening),
    ("timed out", sshproblems.no_answer),
)


def _of_connection(_: HeadConfig, hop: OpensshHop, said: str) -> Problem | None:
    """Where no login was tried, or the connection ended under it."""
    if (found := _RESOLVE.search(said)) is not None:
        return sshproblems.unresolved(found[1], hop)
    if tried := list(_CONNECT.finditer(said)):
        dialled = f" (dialled {', '.join(f'{one[1]} port {one[2]}' for one in tried)})"
        why = tried[-1][3]
        for words, made in _OF_CONNECT:
            if words in why:
                return made(hop, dialled)
        return sshproblems.no_way(why, hop, dialled)
    if hop.command and hop.first and (found := _ENDED.search(said)) is not None:
        return _command_ended(hop, said)
    place = f" ({hop.known.host} port {hop.known.port})"
    if "timed out during banner exchange" in said:
        return sshproblems.says_nothing(hop, place)
    if re.search(r"^Connection to .* timed out", said, re.MULTILINE):
        return sshproblems.no_answer(hop, place)
    if (found := _ENDED.search(said)) is not None:
        if "kex_exchange_identification" in said or "banner exchange" in said:
            return sshproblems.turned_away(" ".join(said.splitlines()), hop, place)
        return sshproblems.ended(found[0], hop)
    return None


def _command_ended(hop: OpensshHop, said: str) -> Problem:
    """`ssh` knows no address then, and nobody else what the command was to do."""
    its = [line for line in said.splitlines() if line and not _ENDED.search(line)]
    return codes.SSH_UNREACHABLE.problem(
        f"the ProxyCommand of {hop.called} led to no SSH server: "
        f"{' '.join(its) or 'it ended without a message'}",
        "check that the command works when the user that runs rayfwd runs it, and that it leads "
        "to an SSH server",
    )


def why_lost(said: str) -> str:
    """What `ssh` said at the end of a connection that stood; nothing where it did not."""
    found = [line.strip() for line in said.splitlines() if _ENDED.search(line)]
    return found[-1] if found else ""


def socket_refused(path: str, said: str) -> str:
    """Why no channel to that socket was opened, as `rayfwd attach` would say it."""
    found = _FORBIDDEN.search(said)
    if found is not None:
        return (
            f"rayfwd attach: {codes.CHANNEL_REFUSED}: its sshd refuses this kind of channel: "
            f'{found[1]}; set via = "exec" in [head]; or allow it there: '
            "AllowStreamLocalForwarding, AllowTcpForwarding and PermitOpen in sshd_config "
            "(without DisableForwarding), and no `restrict` or `no-port-forwarding` in "
            "authorized_keys"
        )
    return (
        f"rayfwd attach: {codes.HUB_UNREACHABLE}: its sshd could not open {path}; check that "
        "rayfwd runs on the head, that this is its hub's socket, that this user may open it "
        "(hub.users), and that sshd allows it (AllowStreamLocalForwarding, AllowTcpForwarding, "
        'PermitOpen); or set via = "exec" in [head]'
    )
