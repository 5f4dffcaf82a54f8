"""Goes through the checks of a role in order.

Nothing here changes anything: no node joins, no port is held for longer than it takes to see that
it is free (or, with `ray.advertise` and no daemon, that the head reaches it), Ray is not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rayfwd import codes
from rayfwd.config import Config
from rayfwd.doctor.client_checks import ClientExamination
from rayfwd.doctor.common_checks import Emit, Examination
from rayfwd.doctor.head_checks import HeadExamination
from rayfwd.doctor.rows import Row, failed
from rayfwd.doctor.worker_checks import WorkerExamination

_KINDS: Mapping[str, type[Examination]] = {
    "head": HeadExamination,
    "worker": WorkerExamination,
    "client": ClientExamination,
}


async def examine(config: Config, control: Path, env: Mapping[str, str], emit: Emit) -> list[Row]:
    """All rows of this configuration's role; each is told as it is known.

    `control` is where a daemon of this configuration would answer.
    """
    examination = _KINDS[config.role](config, control, env, emit)
    await examination.run()
    return examination.rows


def of_a_mistake(lines: list[str], there: bool = True) -> Row:
    """The one row of a configuration that cannot be used. `there`: it has a file."""
    remedy = "correct the file; `rayfwd check` checks only the file"
    if not there:
        remedy = (
            "set this machine up with `rayfwd init`; or, without a file, start `rayfwd head` or "
            "`rayfwd join USER@HEAD`; or name another file with --config"
        )
    return failed("config", codes.CONFIG_INVALID.problem("; ".join(lines), remedy))
