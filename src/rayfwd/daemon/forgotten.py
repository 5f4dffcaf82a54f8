"""What came of `rayfwd forget`, as the daemon or the files tell it and the command says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayfwd.system import setting
from rayfwd.wire import fields_from_wire, fields_to_wire

TURNED = "turned"
KEPT = "kept"
NAMED = "named"
OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """A node that is in the roster no more, and Ray's token, which it knew."""

    node: str
    token: str = KEPT
    """`turned`: there is a new one; `kept`; `named`: by a variable, so that it is not ours to
    change; `off`: Ray asks for none."""
    variable: str | None = None
    """Which one names the token."""
    restarted: tuple[str, ...] = ()
    """Nodes whose Ray is restarted now."""
    away: tuple[str, ...] = ()
    """Nodes that get the token, and whose Ray is restarted, when they are back."""
    by_hand: tuple[str, ...] = ()
    """Nodes whose Ray was started by hand, so that it has to be restarted so."""
    daemon: bool = True
    """The daemon did it; else only the files were changed."""

    def to_wire(self) -> dict[str, Any]:
        return fields_to_wire(self)

    @classmethod
    def from_wire(cls, data: Any) -> Forgotten:
        """Raises ValueError."""
        return fields_from_wire(cls, data, "forgotten")

    def lines(self) -> list[str]:
        """In words."""
        lines = [f"{self.node} is forgotten; it gets a new address if it joins again"]
        match self.token:
            case "turned":
                return lines + self._turned()
            case "named":
                return [
                    *lines,
                    f"Ray's token is set by {self.variable}, and {self.node} knows it: set "
                    "another token there, then run `systemctl restart rayfwd`",
                ]
            case "off":
                return [
                    *lines,
                    "Ray asks for no token, so anybody who reaches its ports can use it; "
                    f"{setting.value('ray.auth', 'token')} changes that",
                ]
        return [*lines, f"Ray keeps its token, and {self.node} knows it"]

    def _turned(self) -> list[str]:
        lines = [
            f"Ray has a new token; the old one, which {self.node} knows, is refused from now on"
        ]
        if self.restarted:
            lines.append(f"  restarted now: Ray on {', '.join(self.restarted)}")
            lines.append("  lost with it: every job, task, actor and object of the cluster")
        if not self.daemon:
            lines = ["Ray gets a new token when rayfwd is started here:"]
            lines.append("  Ray is then restarted, here and on every worker")
            lines.append("  lost with it: every job, task, actor and object of the cluster")
        if self.away:
            lines.append(
                f"  away: {', '.join(self.away)}; when its link is back, the node gets the new "
                "token and its Ray is restarted"
            )
        if self.by_hand:
            lines.append(
                f"  started by hand: Ray on {', '.join(self.by_hand)}; it accepts the old token "
                "until you restart it with the command that `rayfwd plan` shows there"
            )
        lines.append(
            "  drivers find the new token where they found the old one (~/.ray/auth_token, "
            "`rayfwd exec`, `rayfwd connect`); copies made by hand hold the old one"
        )
        return lines
