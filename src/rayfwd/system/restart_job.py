"""What the service manager is doing with this process: whether SIGTERM means a stop or a restart.

systemd sends the same signal for both; the job that it has for our unit tells them apart. (A unit
that is stopped along with ours, by PropagatesStopTo=, would tell too, but systemd takes that one
down also when ours only fails, and Ray with it: tried with 252.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rayfwd.system import children
from rayfwd.system.logs import get_logger

ASK_SECONDS = 5.0
"""For the service manager's answer."""

_log = get_logger(__name__)


def own_unit(env: Mapping[str, str], cgroup: str) -> tuple[str, bool] | None:
    """The service that this process is the main one of, and whether it is a user's own.

    `cgroup` is the text of /proc/self/cgroup. None: no service manager started us.
    """
    if not env.get("NOTIFY_SOCKET"):
        return None
    for line in cgroup.splitlines():
        path = line.partition("::")[2]
        name = path.rpartition("/")[2]
        if name.endswith(".service"):
            return name, "/user@" in path
    return None


def job_of(unit: str, listed: str) -> str:
    """The type of the unit's job in the output of `systemctl list-jobs`; empty: it has none."""
    for line in listed.splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] == unit:
            return words[2]
    return ""


def _cgroup() -> str:
    return Path("/proc/self/cgroup").read_text()


async def being_restarted(env: Mapping[str, str]) -> bool:
    """Whether we are to end in order to be started again. Takes at most `ASK_SECONDS`.

    False where it cannot be known: then it counts as a stop.
    """
    try:
        unit = own_unit(env, _cgroup())
        if unit is None:
            return False
        name, by_user = unit
        argv = ["systemctl", *(["--user"] if by_user else []), "--no-legend", "--plain"]
        ran = await children.run(
            *(*argv, "list-jobs", name), seconds=ASK_SECONDS, env={**env, "LC_ALL": "C"}
        )
        if ran.code != 0:
            raise OSError(ran.err.decode(errors="replace").strip() or f"code {ran.code}")
    except OSError as exc:
        _log.warning(
            "stop_or_restart_unknown",
            cause=f"systemctl list-jobs: {str(exc) or 'no answer'}",
            remedy="install dbus, so that rayfwd can ask systemd; a restart counts as a stop now",
        )
        return False
    return job_of(name, ran.out.decode(errors="replace")) == "restart"
