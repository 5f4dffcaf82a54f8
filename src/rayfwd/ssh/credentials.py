"""Where this machine's side of a login is not proved: by a Kerberos ticket (RFC 4462), or by a key
that a token, an authenticator or an agent holds and does not sign with.

The server is not to blame for either, and a daemon can neither type a PIN nor touch a key.
"""

from __future__ import annotations

import re
from typing import Protocol

from rayfwd import codes
from rayfwd.config import Destination
from rayfwd.problems import Problem

TICKETS = "gssapi-with-mic"
"""The method by which a server takes tickets."""
KEYS = "publickey"
BY_HAND = "log in once by hand as a ControlMaster, whose connection is used (docs/ways.md)"
RENEWED = (
    "as the user that runs rayfwd, get a ticket with `kinit`, in a cache that the daemon reads "
    "(KRB5CCNAME in its environment); or give it a keytab of its own (docs/ways.md)"
)
_NONE = re.compile(
    r"No Kerberos credentials available|No credentials cache|Credentials cache .*not found"
    r"|Matching credential not found|No credentials were supplied",
    re.IGNORECASE,
)
_EXPIRED = re.compile(r"Ticket expired|credentials? .*expired", re.IGNORECASE)
_SKEW = re.compile(r"Clock skew too great|Ticket not yet valid", re.IGNORECASE)
_UNKNOWN_SERVER = re.compile(r"Server .*not found in Kerberos database|UNKNOWN_SERVER")
_NO_KDC = re.compile(
    r"Cannot (?:contact any|find|resolve .*) KDC|Cannot determine realm"
    r"|does not specify default realm|No default realm",
    re.IGNORECASE,
)


class Proves(Protocol):
    """A server whose login takes proofs of this machine."""

    @property
    def called(self) -> str: ...
    @property
    def user(self) -> str: ...
    @property
    def to(self) -> Destination: ...


def no_ticket(why: str) -> bool:
    """It was never got, as far as what was said of it tells."""
    return not why or _NONE.search(why) is not None


def ticket_unusable(why: str, hop: Proves, dialled: str) -> Problem:
    """The server takes tickets, and this machine had none that will do. `why`: what was said of
    it."""
    seen = f"{hop.called} accepts Kerberos tickets{dialled}"
    if _EXPIRED.search(why):
        return _unusable(f"{seen}, but this machine's ticket has expired: {why}", RENEWED)
    if _SKEW.search(why):
        return _unusable(
            f"{seen}, but the clocks of this machine and the Kerberos server differ too much: "
            f"{why}",
            "set this machine's clock (`timedatectl` says whether it is synchronised), and that of "
            f"{hop.called}; Kerberos allows five minutes",
        )
    if _UNKNOWN_SERVER.search(why):
        return _unusable(
            f"{seen}, but Kerberos does not know it under the name that was used: {why}",
            "use the full name that is in that machine's keytab (HostName in the SSH "
            "configuration; `klist -k` there shows the keytab)",
        )
    if _NO_KDC.search(why):
        return _unusable(
            f"{seen}, but this machine's Kerberos server is not reached: {why}",
            "check /etc/krb5.conf here, and that this machine reaches the KDC (port 88)",
        )
    if no_ticket(why):
        return _unusable(f"{seen}, but this machine has no ticket: {why or 'none'}", RENEWED)
    return _unusable(
        f"{seen}, but not this machine's: {why}",
        "compare `klist` here with `klist -k` on that machine, and get a new ticket with `kinit`",
    )


def _unusable(cause: str, remedy: str) -> Problem:
    return codes.SSH_TICKET_UNUSABLE.problem(cause, remedy)


def ticket_not_taken(hop: Proves, dialled: str) -> Problem:
    """It was shown, and the server said no more than no."""
    return _unusable(
        f"{hop.called} accepts Kerberos tickets{dialled}, and refused this machine's",
        f"check that the principal in `klist` may log in as {hop.user} there (`~/.k5login`), and "
        "what its sshd log says (a keytab that is missing or old)",
    )


def tickets_not_tried(hop: Proves, dialled: str, by: str, remedy: str) -> Problem:
    """The server takes tickets, and none was offered. `by`: who did not."""
    return _unusable(
        f"{hop.called} accepts Kerberos tickets{dialled}, and {by} offers none", remedy
    )


def kdc_silent(seconds: float, hop: Proves, dialled: str) -> Problem:
    """The time was over in the middle of it."""
    return _unusable(
        f"{hop.called} accepts Kerberos tickets{dialled}, but nothing came of it within "
        f"{seconds:.0f} s",
        "check that this machine reaches its Kerberos server (port 88); or set "
        "`GSSAPIAuthentication no` for that host in the SSH configuration, if a key lets you in",
    )


def not_signed(key: str, why: str, hop: Proves, dialled: str) -> Problem:
    """The server would take that key, and whoever holds it does not sign."""
    return codes.SSH_SIGNING_FAILED.problem(
        f"{hop.called} accepts the key {key}{dialled}, but nothing here signs with it: {why}",
        _another_key(hop),
    )


def signature_awaited(key: str, seconds: float, hop: Proves, dialled: str) -> Problem:
    """The same, where nothing comes: somebody is waited for."""
    return codes.SSH_SIGNING_FAILED.problem(
        f"{hop.called} accepts the key {key}{dialled}, but within {seconds:.0f} s nothing here has "
        "signed with it: it waits for a touch, a PIN or a confirmation",
        _another_key(hop),
    )


def pin_wanted(hop: Proves, dialled: str) -> Problem:
    """A token shows no key before that, so none was offered."""
    return codes.SSH_SIGNING_FAILED.problem(
        f"{hop.called} accepts no key of this machine{dialled}, and the token here "
        "(PKCS11Provider) shows none of its own without its PIN",
        "give the PIN to an agent once, with `ssh-add -s PROVIDER`, whose SSH_AUTH_SOCK the daemon "
        f"has, and leave PKCS11Provider out; or set {hop.to.key('identity')} to a key in a file",
    )


def provider_unusable(why: str, hop: Proves, dialled: str) -> Problem:
    """The library that PKCS11Provider names."""
    return codes.SSH_SIGNING_FAILED.problem(
        f"{hop.called} accepts no key of this machine{dialled}, and the library of the token here "
        f"cannot be loaded: {why}",
        "correct PKCS11Provider in the SSH configuration, or install that library",
    )


def signature_refused(key: str, hop: Proves, dialled: str) -> Problem:
    """The server would take that key, and not what it was signed with."""
    return codes.SSH_AUTH_REFUSED.problem(
        f"{hop.called} accepts the key {key}{dialled}, and refuses its signature",
        "if it is a security key that was not touched, put `no-touch-required` before it in "
        f"authorized_keys of {hop.user} there (and remove `verify-required`); otherwise the sshd "
        "log there says what is wrong",
    )


def _another_key(hop: Proves) -> str:
    another = (
        f"set {hop.to.key('identity')} to a key that signs by itself: a security key made with "
        "`ssh-keygen -t ed25519-sk -O no-touch-required` (and `no-touch-required` before it in "
        "authorized_keys), a token's key in an agent that has its PIN (`ssh-add -s PROVIDER`), or "
        "a key in a file"
    )
    if not hop.to.takes_transport:
        return another
    return f"{another}; or set {hop.to.set_to('transport', 'openssh')} and {BY_HAND}"
