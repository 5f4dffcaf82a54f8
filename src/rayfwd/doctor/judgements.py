"""What of what was seen is too little, too slow or in the way (pure).

The bounds are where something begins to hurt that a user would not trace back to its cause.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from rayfwd import codes
from rayfwd.problems import Problem
from rayfwd.system import setting

CLOCK_TOLERANCE = 2.0
"""Seconds that this clock may differ from the head's: their logs are read side by side."""
LOOKUP_SLOW = 1.0
"""Seconds for a name; each of a link's SSH connections asks for it, also when one is lost."""
LOGIN_SLOW = 3.0
"""Seconds for a login; the link waits so long while streams wait (`ssh_connector.py`)."""
ROUND_TRIP_SLOW = 0.25
"""Seconds; a task that is sent out and comes back takes a few of them."""
RATE_SLOW = 1e6
"""Bytes a second, each way: an object of 100 MB then takes a minute and a half."""
THREADS_OF_RAY = 1000
THREADS_OF_A_WORKER = 64
"""Threads of Ray's daemons on a node, and of one worker process, generously: with Ray 2.60 on two
cores an idle head has 300, each worker 24, and more cores make more. The kernel limits threads."""

PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True, slots=True)
class Tick:
    """One question for the head's clock; seconds."""

    asked: float
    """By this machine's clock."""
    told: float
    """By the head's."""
    trip: float


def offset(ticks: Iterable[Tick]) -> tuple[float, float]:
    """How far the head's clock is ahead of ours, and how far that may be wrong, in seconds.

    The quickest answer says it best: the head looked at its clock somewhere within its trip.
    """
    best = min(ticks, key=lambda tick: tick.trip)
    return best.told - (best.asked + best.trip / 2), best.trip / 2


def judge_clock(ahead: float, doubt: float) -> Problem | None:
    """What is wrong with an offset that `offset` gave."""
    if abs(ahead) - doubt <= CLOCK_TOLERANCE:
        return None
    which = "behind" if ahead > 0 else "ahead of"
    return codes.CLOCK_OFFSET.problem(
        f"this machine's clock is {_seconds(abs(ahead))} {which} the head's",
        "let both keep time: `timedatectl set-ntp true`, or chrony; Ray works, but logs and "
        "timelines of the two do not match, and certificates may seem expired",
    )


def judge_link(trip: float, down: float, up: float) -> Problem | None:
    """Seconds of a round trip; bytes a second from the head, and to it."""
    what = []
    if trip > ROUND_TRIP_SLOW:
        what.append(f"a round trip takes {trip * 1000:.0f} ms")
    for rate, way in ((down, "from the head"), (up, "to the head")):
        if rate < RATE_SLOW:
            what.append(f"{shown_rate(rate)} {way}")
    if not what:
        return None
    return codes.LINK_POOR.problem(
        f"the way to the head is slow: {', '.join(what)}",
        "keep data where it is used, and check what is between the two machines (a VPN, a jump "
        "host, Wi-Fi); Ray works, but tasks start late or objects take long",
    )


def shown_rate(rate: float) -> str:
    """Bytes a second, for people."""
    for size, unit in ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s")):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.0f} B/s"


def judge_names(host: str, seconds: float) -> Problem | None:
    """Of a name that was found, but late."""
    if seconds <= LOOKUP_SLOW:
        return None
    return codes.NAMES_SLOW.problem(
        f"looking up {host} took {seconds:.1f} s",
        f"add the head to /etc/hosts, or put its address into {setting.key('head.ssh')} (or as "
        "HostName into the SSH configuration); and check which name server in "
        "/etc/resolv.conf does not answer",
    )


def judge_login(target: str, seconds: float) -> Problem | None:
    """Of a login that went well, but late."""
    if seconds <= LOGIN_SLOW:
        return None
    return codes.LOGIN_SLOW.problem(
        f"logging in at {target} takes {seconds:.1f} s",
        "check what the head's sshd waits for (UseDNS, PAM, load, a jump host): after a cut, the "
        "link is back that much later",
    )


def judge_threads(limit: int | None, running: int, cpus: int) -> Problem | None:
    """`limit` is what this user, or the service, may have; None: no limit."""
    need = THREADS_OF_RAY + THREADS_OF_A_WORKER * cpus
    if limit is None or limit - running >= need:
        return None
    return codes.PROCESSES_LOW.problem(
        f"this user may have {limit} processes and threads and has {running}, but Ray on "
        f"{cpus} CPUs needs {need} more",
        f"raise the limit to at least {running + 2 * need}: TasksMax= and LimitNPROC= of the "
        "service in which Ray runs (`systemctl edit rayfwd-ray`), or `ulimit -u` and "
        "/etc/security/limits.conf",
    )


def caught(env: Mapping[str, str], addresses: Iterable[str]) -> dict[str, str]:
    """Variables that name a proxy which would get what is meant for one of the addresses.

    Variable to the first such address. As Python's clients read them: the small spelling first,
    `NO_PROXY` with names, suffixes, addresses and networks.
    """
    none = env.get("no_proxy", env.get("NO_PROXY", ""))
    spared = [part.strip() for part in none.split(",") if part.strip()]
    open_to = [address for address in addresses if not _is_spared(address, spared)]
    found = {}
    for name in PROXIES:
        variable = name if name in env else name.upper()
        if env.get(variable) and open_to:
            found[variable] = open_to[0]
    return found


def _is_spared(address: str, spared: Collection[str]) -> bool:
    wanted = ipaddress.ip_address(address)
    for part in spared:
        if part in {"*", address} or (part[:1] == "." and address.endswith(part)):
            return True
        try:
            if wanted in ipaddress.ip_network(part, strict=False):
                return True
        except (ValueError, TypeError):
            continue
    return False


def judge_proxies(
    env: Mapping[str, str], ray_env: Mapping[str, str], network: str, addresses: Collection[str]
) -> Problem | None:
    """`env` is a shell's, `ray_env` what the configuration sets for Ray in [ray.env]."""
    spare = f"NO_PROXY=127.0.0.1,localhost,{network}"
    theirs = {name: value for name, value in ray_env.items() if name.lower() == "no_proxy"}
    if theirs and (found := caught({**env, **ray_env}, addresses)):
        return codes.PROXY_CATCHES.problem(
            f"{_first(found)} would catch what Ray's own clients send to the cluster's addresses, "
            f"because NO_PROXY in {setting.key('ray.env')} does not have them",
            f"add {network} and 127.0.0.1 to NO_PROXY in {setting.key('ray.env')}, or remove it "
            "there: rayfwd sets NO_PROXY by itself",
        )
    if found := caught(env, addresses):
        proxy = urlsplit(env[next(iter(found))])
        return codes.PROXY_CATCHES.problem(
            f"{_first(found)} in this shell, and sends job submissions and state queries to the "
            f"proxy {proxy.hostname or 'that it names'}",
            f"export {spare} (and no_proxy) before you run `ray job`, `ray list` or the like; "
            "rayfwd sets it for Ray itself",
        )
    return None


def _first(found: Mapping[str, str]) -> str:
    variable, address = next(iter(found.items()))
    others = f" (and {', '.join(list(found)[1:])})" if len(found) > 1 else ""
    return f"{variable}{others} is set and would catch {address}"


def judge_version(own: str, heads: str) -> Problem | None:
    """Of rayfwd itself."""
    if own == heads:
        return None
    return codes.RAYFWD_VERSION_DIFFERS.problem(
        f"this machine has rayfwd {own}, the head has {heads}",
        "upgrade the head first, then the workers: the two versions work together, but a check or "
        "a feature of the newer one may be missing",
    )


@dataclass(frozen=True, slots=True)
class SshdOptions:
    """Options, in small letters, each with its values."""

    values: Mapping[str, list[str]]
    user: str | None
    """For whom they hold; None: for everybody whom no `Match` block says otherwise."""

    def first_values(self) -> dict[str, str]:
        """The values that hold, of options that count once."""
        return {name: values[0] for name, values in self.values.items()}


def judge_sshd(sshd: SshdOptions, workers: int) -> list[Problem]:
    """What the head's sshd forbids by these options."""
    options = sshd.first_values()
    found = []
    if options.get("allowstreamlocalforwarding", "yes") in {"no", "remote"} or (
        options.get("disableforwarding", "no") == "yes"
    ):
        found.append(
            (
                "AllowStreamLocalForwarding",
                'set it to yes, or set via = "exec" in [head] of the workers',
            )
        )
    # Both are meant for TCP, and shut the way to sockets as well (tried with OpenSSH 9.2).
    if options.get("allowtcpforwarding", "yes") in {"no", "remote"}:
        found.append(
            (
                "AllowTcpForwarding",
                'set it to yes or local, or set via = "exec" in [head] of the workers',
            )
        )
    if options.get("permitopen", "any") != "any":
        found.append(("PermitOpen", 'set it to any, or set via = "exec" in [head] of the workers'))
    forced = options.get("forcecommand", "none")
    if forced != "none" and not re.search(r"rayfwd['\"]? attach\b", forced):
        found.append(
            (
                "ForceCommand",
                (
                    'remove it, or set it to `rayfwd attach` and via = "exec" in [head] of the '
                    "workers"
                ),
            )
        )
    if options.get("pubkeyauthentication", "yes") == "no":
        found.append(("PubkeyAuthentication", "set it to yes: workers log in by key"))
    if options.get("maxsessions") == "0":
        found.append(("MaxSessions", 'set it to 1 or more: workers with via = "exec" need it'))
    begin = options.get("maxstartups", "10").partition(":")[0]
    if begin.isdecimal() and int(begin) < workers:
        found.append(
            ("MaxStartups", f"raise it to at least {workers}: so many workers may log in at once")
        )
    if sshd.user is None:
        whose = ""
        but = "a Match block, which was not checked, may say otherwise for some users"
    else:
        whose = f" for the user {sshd.user}"
        but = "a Match block may say otherwise for some addresses"
    return [
        codes.SSHD_FORBIDS.problem(
            f"{name} {options.get(name.lower(), 'is left out')} in the head's sshd_config{whose}",
            f"{what} ({but})",
        )
        for name, what in found
    ]


def _seconds(value: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s"
