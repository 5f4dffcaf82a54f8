"""What `ssh` said on standard error, as the problem that it is: at which hop, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rayfwd import codes
from rayfwd.config import HeadConfig
from rayfwd.problems import Problem
from rayfwd.ssh import channel_problems, credentials, hop_problems, socket_check
from rayfwd.ssh.openssh import OpensshHop
from rayfwd.ssh.openssh_words import LOGGED_IN, Reached, reached, spoken
from rayfwd.transport.hubanswer import password_expired

_CONNECT = re.compile(r"connect to (?:host|address) (\S+) port (\d+): (.+)")
_RESOLVE = re.compile(r"Could not resolve hostname \S+: (.+)")
_DENIED = re.compile(r"^\S+: Permission denied \(([\w,@.-]+)\)\.$", re.MULTILINE)
_TOO_MANY = re.compile(r"^Received disconnect .*(Too many authentication failures.*)", re.MULTILINE)
_NEGOTIATE = re.compile(
    r"^Unable to negotiate with .*: no matching (.+) found\. Their offer: (\S+)", re.MULTILINE
)
_CERTIFICATE = re.compile(r"^Certificate invalid: (.+)", re.MULTILINE)
_ENDED = re.compile(
    r"(?:Connection (?:closed|reset) by .*|Connection to .* closed.*|.*Broken pipe.*"
    r"|Received disconnect from .*|kex_exchange_identification: .*|Timeout, server .*)"
)
_FORBIDDEN = re.compile(r"open failed: administratively prohibited: (.*)")
_NOT_OPENED = re.compile(r"open failed: (?:connect failed|resource shortage|\S+ \S+): (.*)")
_SIGN = re.compile(r"^sign_and_send_pubkey: signing failed for (.+): (.+)$", re.MULTILINE)
_PIN = re.compile(r"^(?:pin required|need pin entry.*)$", re.MULTILINE)
_PROVIDER = re.compile(
    r"^(dlopen \S+ failed: .+|provider \S+ is not a PKCS11 library)$", re.MULTILINE
)
_KEY = re.compile(r'^Load key (".*?": .+)', re.MULTILINE)
_CHATTER = re.compile(
    r"^(?:debug1: |Authenticated to |Transferred: |Bytes per second: |Connection to .* closed"
    r"|channel \d+: |kex_exchange_identification: |Connection (?:closed|reset) by |Killed by "
    rf"|{socket_check.MARK}).*"
)
"""What `ssh` itself says of how a connection goes."""
_REVOKED = re.compile(
    r"REVOKED HOST KEY|revoked host key|is revoked|marked as revoked| revoked by file (?P<file>\S+)"
)
_NOT_STARTED = re.compile(
    r"^((?:exec|shell|subsystem) request failed on channel \d+)", re.MULTILINE
)
_HOST_KEY = re.compile(
    r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|host key is known for"
)
NOT_ASKED = (
    "the SSH configuration here",
    "set `GSSAPIAuthentication yes` for that host in the SSH configuration, and get a ticket with "
    "`kinit` as the user that runs rayfwd",
)
"""Who does not show tickets, and what is to be done."""
_SETTING = re.compile(r".*(?:Bad configuration option|Bad owner or permissions|terminating, ).*")


def hops_passed(hops: Sequence[OpensshHop], said: str) -> int:
    """To how many of the hops it has logged in: each `ssh` says so of its own."""
    needed = [hop for hop in hops if not hop.shared]
    return len(hops) - len(needed) + min(len(LOGGED_IN.findall(said)), len(needed))


def explain(head: HeadConfig, hops: Sequence[OpensshHop], said: str) -> Problem:
    """The problem behind an `ssh` that ended before it stood."""
    said = "\n".join(line.strip() for line in said.splitlines())
    hop = hops[min(hops_passed(hops, said), len(hops) - 1)]
    for look in (_of_login, _of_jump, _of_connection):
        if (problem := look(head, hop, said)) is not None:
            return problem
    last = next(reversed(spoken(said).splitlines()), "") or "`ssh` ended without a message"
    return codes.SSH_FAILED.problem(
        f"{hop.called}: {last}",
        f"run `ssh -v {head.ssh}` on this machine, as the user that runs rayfwd, to see more",
    )


def _of_login(head: HeadConfig, hop: OpensshHop, said: str) -> Problem | None:
    """Where the server has answered, or nothing was dialled."""
    if (found := _SETTING.search(said)) is not None:
        return codes.SSH_CONFIG_INVALID.problem(found[0], "correct the SSH configuration")
    at = reached(said)
    dialled = f" (dialled {at.dialled[-1] if at.dialled else _place(hop)})"
    if hop.command and hop.first:
        dialled = ""  # where that led is not known
    # A banner may say anything; what ends a login stands last, but for the `ssh` that it was for.
    lines = filter(None, said.splitlines())
    own = [line for line in lines if not _ENDED.fullmatch(line) and not _CHATTER.match(line)]
    last = next(reversed(own), "")
    if (found := _DENIED.search(last)) is not None:
        if "with partial success" in said:
            return hop_problems.second_factor(hop, dialled)
        if (sign := _SIGN.search(said)) is not None:
            return credentials.not_signed(sign[1], sign[2], hop, dialled)
        if _PIN.search(said):
            return credentials.pin_wanted(hop, dialled)
        if (library := _PROVIDER.search(said)) is not None:
            return credentials.provider_unusable(library[1], hop, dialled)
        if (ticket := _of_ticket(hop, dialled, found[1].split(","), at)) is not None:
            return ticket
        if at.signed:
            return credentials.signature_refused(at.signed, hop, dialled)
        if (key := _KEY.search(said)) is not None:
            return hop_problems.key_unusable(key[1], hop.to)
        return hop_problems.keys_refused(f"it takes {found[1]}", hop, dialled)
    if (found := _NEGOTIATE.search(said)) is not None:
        return hop_problems.nothing_in_common(found[1], found[2].split(","), hop, dialled)
    if (found := _CERTIFICATE.search(said)) is not None:
        return hop_problems.certificate_invalid(found[1], hop, dialled)
    if (revoked := _REVOKED.search(said)) is not None:
        return hop_problems.host_key_problem(head, hop, revoked["file"] or True, dialled)
    if _HOST_KEY.search(said):
        return hop_problems.host_key_problem(head, hop, dialled=dialled)
    if (found := _TOO_MANY.search(said)) is not None:
        return hop_problems.too_many_keys(found[1], hop, dialled)
    return None


def _of_ticket(
    hop: OpensshHop, dialled: str, accepted: Sequence[str], at: Reached
) -> Problem | None:
    """Where a ticket would have done. A machine whose keys were refused as well, and that never had
    one, is told of its keys."""
    if credentials.TICKETS not in accepted:
        return None
    by_key = credentials.KEYS in accepted and hop_problems.has_key(hop)
    if credentials.TICKETS not in at.methods:
        return None if by_key else credentials.tickets_not_tried(hop, dialled, *NOT_ASKED)
    if not at.of_ticket:
        return credentials.ticket_not_taken(hop, dialled)
    if by_key and credentials.no_ticket(at.of_ticket):
        return None
    return credentials.ticket_unusable(at.of_ticket, hop, dialled)


def _of_jump(_: HeadConfig, hop: OpensshHop, said: str) -> Problem | None:
    """Where a jump host did not lead on to this hop."""
    if hop.first:
        return None
    if hop.meet is not None and _ENDED.search(said) and (last := _last_of_command(said)):
        return hop_problems.nobody_waits(last, hop, by_command=True)
    if (found := _FORBIDDEN.search(said)) is not None:
        return hop_problems.jump_forbids(found[1], hop)
    if (found := _NOT_OPENED.search(said)) is not None:
        return hop_problems.jump_cannot(found[1], hop)
    return None


def _last_of_command(said: str) -> str:
    """What the command at a meeting place said last, where it said anything."""
    return next(reversed(beside(said).splitlines()), "")


_OF_CONNECT: tuple[tuple[str, Callable[[OpensshHop, str], Problem]], ...] = (
    ("refused", hop_problems.not_listening),
    ("timed out", hop_problems.no_answer),
)


def _of_connection(_: HeadConfig, hop: OpensshHop, said: str) -> Problem | None:
    """Where no login was tried, or the connection ended under it."""
    if (found := _RESOLVE.search(said)) is not None:
        return hop_problems.unresolved(found[1], hop)
    at = reached(said)
    if tried := list(_CONNECT.finditer(said)):
        addresses = at.dialled or [f"{one[1]} port {one[2]}" for one in tried]
        dialled = f" (dialled {', '.join(addresses)})"
        why = tried[-1][3]
        for words, made in _OF_CONNECT:
            if words in why:
                return made(hop, dialled)
        return hop_problems.no_way(why, hop, dialled)
    by_command = hop.command and hop.first and not at.is_ssh
    if by_command and (found := _ENDED.search(said)) is not None:
        its = [line for line in spoken(said).splitlines() if not _ENDED.search(line)]
        return hop_problems.command_ended(hop, " ".join(its) or "it ended without a word")
    place = _where(hop, at)
    if "timed out during banner exchange" in said:
        return _silent(hop, at)
    if re.search(r"^Connection to .* timed out", said, re.MULTILINE):
        return hop_problems.no_answer(hop, place)
    if (found := _ENDED.search(said)) is not None:
        if "invalid characters" in said or "invalid format" in said:
            return hop_problems.no_ssh(at.words or "bytes that are no text", hop, place)
        if "kex_exchange_identification" in said or "banner exchange" in said:
            return hop_problems.turned_away(at.words, hop, place)
        return hop_problems.ended(found[0], hop, place, in_login=at.has_keys)
    return None


def not_in_time(hop: OpensshHop, said: str, seconds: float) -> Problem:
    """What it was at when its time was over; `hop`: the one that has not let it in."""
    at = reached(said)
    if at.signing:
        return credentials.signature_awaited(at.signing, seconds, hop, _where(hop, at))
    if at.methods[-1:] == (credentials.TICKETS,):
        return credentials.kdc_silent(seconds, hop, _where(hop, at))
    if at.has_keys:
        return hop_problems.login_slow(seconds, hop, _where(hop, at))
    if at.is_ssh:
        return hop_problems.no_key_exchange(seconds, hop, _where(hop, at))
    if hop.direct and not at.dialled:
        return hop_problems.resolver_silent(seconds, hop)
    if hop.direct and not at.connected:
        return hop_problems.no_answer(hop, _where(hop, at))
    return _silent(hop, at)


def _silent(hop: OpensshHop, at: Reached) -> Problem:
    """Whatever was to lead there does, as far as it says, and nothing comes that is SSH."""
    if hop.command and hop.first:
        return hop_problems.command_ended(hop, "none in time")
    if not hop.first:
        return hop_problems.jump_silent(hop)
    if at.words:
        return hop_problems.no_ssh(at.words, hop, _where(hop, at))
    return hop_problems.says_nothing(hop, _where(hop, at))


def _place(hop: OpensshHop) -> str:
    return f"{hop.known.host} port {hop.known.port}"


def _where(hop: OpensshHop, at: Reached) -> str:
    """Where it went, in brackets."""
    return f" (dialled {', '.join(at.dialled)})" if at.dialled else f" ({_place(hop)})"


def beside(said: str) -> str:
    """What came on standard error once it had logged in, without what `ssh` says of itself."""
    _, *after = LOGGED_IN.split(said)
    lines = (line.strip() for line in (after[-1] if after else said).splitlines())
    return "\n".join(line for line in lines if line and not _CHATTER.match(line))


def why_lost(said: str) -> str:
    """What `ssh` said at the end of a connection that stood; nothing where it did not."""
    found = [line.strip() for line in said.splitlines() if _ENDED.search(line)]
    return found[-1] if found else ""


def not_opened(head: HeadConfig, said: str) -> str:
    """Why no channel to the hub was opened, as `rayfwd attach` would say it; nothing where that is
    not known."""
    to = head.destination
    if password_expired(said, to) is not None:
        return ""  # it was said, and is understood
    found = _FORBIDDEN.search(said)
    if head.via == "exec":
        found = found or _NOT_OPENED.search(said)
        if found is None and (ended := _NOT_STARTED.search(said)) is not None:
            why = channel_problems.not_started(ended[1], to)
            return f"rayfwd attach: {why.code}: {why.cause}; {why.remedy}"
        if found is None:
            return ""
        return (
            f"rayfwd attach: {codes.CHANNEL_REFUSED}: its sshd refuses this kind of channel: "
            f"{found[1].strip()}; {channel_problems.sessions_allowed(to)}"
        )
    if found is not None:
        allow = channel_problems.forwarding_allowed(to)
        return (
            f"rayfwd attach: {codes.CHANNEL_REFUSED}: its sshd refuses this kind of channel: "
            f"{found[1].strip()}; set {to.set_to('via', 'exec')}, or {allow}"
        )
    if said and "open failed" not in said:
        return ""  # it was opened, and closed by who answers there
    why = channel_problems.of_look(socket_check.look(said, head.socket), head.socket, to)
    return f"rayfwd attach: {why.code}: {why.cause}; {why.remedy}"
