"""What the overlay's keeper was asked for last, in a file beside its socket.

A keeper that is started in another's place makes it again at once, and does not wait until the
daemon looks. The service manager keeps the directory over a restart and a crash, and removes it
after a stop.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayfwd.network.ruleset import Rules
from rayfwd.system.files import read_regular, replace_file
from rayfwd.system.ownership import is_ours

_NAME = "rules.json"


class LastRules:
    """The file. Whoever reads it checks what it says, as if the daemon had asked for it."""

    def __init__(self, socket: Path) -> None:
        self.path = socket.with_name(_NAME)

    def keep(self, rules: Rules) -> None:
        """Rather none than old ones: they would be made again."""
        try:
            replace_file(self.path, json.dumps(rules.to_wire()).encode())
        except OSError:
            self.forget()

    def forget(self) -> None:
        """Nothing is to be made again."""
        with suppress(OSError):
            os.unlink(self.path)

    def found(self) -> Any:
        """As `Rules.to_wire` gave them, unless others had a hand in it; None: there are none."""
        try:
            return json.loads(read_regular(self.path)) if is_ours(self.path) else None
        except (OSError, ValueError, RecursionError):
            return None
