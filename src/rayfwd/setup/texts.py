"""The texts that are set up: the configuration, the units, the line for authorized_keys (pure)."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from rayfwd.config import OWN_SSH, HeadConfig
from rayfwd.setup.request import Layout, SetupRequest

_SHIPPED_COMMAND = "/opt/rayfwd/bin/rayfwd"
_SHIPPED_PYTHON = "/opt/rayfwd/bin/python"
_SHIPPED_USER = "ray"

OVERLAY_SERVICE = "rayfwd-net.service"
OVERLAY_VARIABLE = "RAYFWD_OVERLAY"

# What a user's service manager does not have, may not do, or has elsewhere. What is left of the
# hardening is what a process may ask for itself (seccomp).
_NOT_FOR_USERS = re.compile(
    r"(?:User|SocketUser|WantedBy|CapabilityBoundingSet|Private\w+|Protect\w+|StateDirectory\w*"
    r"|RemoveIPC)="
)


def config_text(request: SetupRequest, layout: Layout) -> str:
    """The configuration, with what is known and nothing else."""
    config: dict[str, Any] = {
        "role": request.role,
        "name": request.name,
        "state_dir": str(layout.state),
        "runtime_dir": str(layout.runtime),
    }
    if request.role == "worker" and request.head is None:
        config["head"] = {"dialled": True}
    elif request.role == "worker":
        identity = request.identity or layout.identity
        config["head"] = {"ssh": request.head, "identity": str(identity)}
        if request.meet is not None:
            config["head"]["meet"] = request.meet
        if request.host_key is not None:
            config["head"]["known_hosts"] = str(layout.known_hosts)
        attach = attach_command(request.head_command)
        config["head"] |= {"via": "exec", "attach_command": attach}
    else:
        hub: dict[str, Any] = {"users": list(request.logins)} if request.logins else {}
        if request.meet is not None:
            meet = {"ssh": request.meet}
            if request.meet_identity is not None:
                meet["identity"] = str(request.meet_identity)
            if request.own_ssh:
                meet["sshd"] = OWN_SSH
            hub["meet"] = [meet]
        config |= {"hub": hub} if hub else {}
    if request.direct:
        config["direct"] = direct_sections(request, layout)
    config["ray"] = {"command": request.ray}
    if request.auth is not None:
        config["ray"]["auth"] = request.auth
    for key, value in request.more.items():
        both = isinstance(value, Mapping) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if both else value
    first = f"{made_by(request.made_by)} `rayfwd check` says what it amounts to.\n"
    return first + tomli_w.dumps(config)


def made_by(command: str) -> str:
    """How the configuration begins that this command has made."""
    return f"# Made by `{command}`."


def direct_sections(request: SetupRequest, layout: Layout) -> list[dict[str, str]]:
    """What the file of a worker says of others that it can log in to."""
    identity = request.identity or layout.identity
    attach = attach_command(layout.command, peer=True)
    same = {"identity": str(identity), "attach_command": attach}
    return [{"node": node, "ssh": ssh, **same} for node, ssh in request.direct]


def direct_text(request: SetupRequest, layout: Layout) -> str:
    """The same, as it is to be put at the end of a file."""
    sections = []
    for section in direct_sections(request, layout):
        lines = [f"{key} = {json.dumps(value)}" for key, value in section.items()]
        sections.append("\n".join(["[[direct]]", *lines]))
    return "\n\n".join(sections)


def attach_command(rayfwd: str, peer: bool = False) -> str:
    """What a worker's key runs on the head, as a shell takes it; of a `peer`, on another worker."""
    return f"{shlex.quote(rayfwd)} attach" + " --peer" * peer


def authorized_line(rayfwd: str, public_key: str, peer: bool = False) -> str:
    """The line for the head's authorized_keys (sshd(8)): this key reaches the hub, nothing else. Of
    a `peer`: for another worker's, and what waits there for workers."""
    command = attach_command(rayfwd, peer).replace("\\", "\\\\").replace('"', '\\"')
    return f'restrict,command="{command}" {public_key.strip()}'


def dial_section(request: SetupRequest, layout: Layout, host: str) -> str:
    """For the file of a head that dials this worker."""
    dial = {"name": request.name, "ssh": f"{request.user}@{host}", "via": "exec"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in dial.items()]
    attach = attach_command(layout.command)
    return "\n".join(["[[hub.dial]]", *lines, f"attach_command = {json.dumps(attach)}"])


def forwarding_line(public_key: str) -> str:
    """The line for a meeting place's authorized_keys: this key makes and finds sockets there."""
    return f"restrict,port-forwarding {public_key.strip()}"


def to_open(request: SetupRequest, dialled_by_peers: bool) -> list[str]:
    """What firewalls are to let in, a line a machine. Nothing else is."""
    who = ["the workers"] if request.role == "head" and request.meet is None else []
    who += ["the head"] if request.role == "worker" and request.head is None else []
    who += ["the worker that dials it"] if dialled_by_peers else []
    port = f"the port of its sshd, for {' and '.join(who)}" if who else "nothing"
    lines = [f"this machine: {port}"]
    head = request.head if request.meet is None else request.meet
    way = head if request.role == "worker" else request.meet
    for ssh in (way, *(ssh for _, ssh in request.direct)):
        if ssh:
            _, host, number = HeadConfig(ssh=ssh).ssh_target()
            lines.append(f"{host}: port {number or 22}, for this machine")
    return lines


def known_hosts_line(host: str, port: int, public_key: str) -> str:
    """A line of known_hosts (sshd(8)) for what ssh calls `host` and `port`."""
    kind, key = public_key.split()[:2]
    name = host if port == 22 else f"[{host}]:{port}"
    return f"{name} {kind} {key}\n"


def unit_text(name: str, shipped: str, user: str, layout: Layout) -> str:
    """A unit as shipped, for this user and these layout. Raises ValueError where it has changed.

    `shipped` expects the user `ray` and rayfwd in /opt/rayfwd.
    """
    body = shipped[re.search(r"(?m)^\[", shipped).start() :]  # type: ignore[union-attr]
    run = f"{_exec_word(layout.command)} run"
    if not layout.system or str(layout.config) != "/etc/rayfwd.toml":
        run = f"{_exec_word(layout.command)} --config {_exec_word(str(layout.config))} run"
    out: list[str] = []
    for line in body.splitlines():
        if not layout.system and _NOT_FOR_USERS.match(line):
            if line.startswith("WantedBy="):
                out.append("WantedBy=default.target")
            continue
        key, equals, value = line.partition("=")
        if equals and key in {"User", "SocketUser"}:
            if value != _SHIPPED_USER:
                raise ValueError(f"{name}: {line}")
            value = user
        elif not layout.overlay and value.startswith(f"{OVERLAY_VARIABLE}="):
            continue
        elif equals and key.startswith("Exec"):
            if _SHIPPED_COMMAND not in value and _SHIPPED_PYTHON not in value:
                raise ValueError(f"{name}: {line}")
            value = value.replace(f"--user {_SHIPPED_USER} ", f"--user {_exec_word(user)} ")
            value = value.replace(f"{_SHIPPED_COMMAND} run", run)
            value = value.replace(_SHIPPED_COMMAND, run.removesuffix(" run"))
            value = value.replace(_SHIPPED_PYTHON, _exec_word(layout.python))
        elif equals and not layout.system and "/run/rayfwd" in value:
            value = value.replace("/run/rayfwd", "%t/rayfwd")
        elif equals and not layout.system and key in {"After", "Wants"}:
            kept = [w for w in value.split() if w.startswith("rayfwd") or w == "basic.target"]
            if not kept:
                continue
            value = " ".join(kept)
        if equals and not layout.overlay and key in {"After", "Wants"}:
            value = " ".join(w for w in value.split() if w != OVERLAY_SERVICE)
        out.append(f"{key}={value}" if equals else line)
    manager = "systemctl edit" if layout.system else "systemctl --user edit"
    first = (
        f"# Made by `rayfwd init`; `rayfwd uninstall` removes it.\n# To change it: `{manager} "
        f"{name}`.\n\n"
    )
    return first + "\n".join(out) + "\n"


def _exec_word(word: str) -> str:
    """A word of an Exec line (systemd.service(5))."""
    escaped = word.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w./%$+@:-]+", escaped):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'


def next_command(layout: Layout) -> str:
    """What is to be said next on this machine."""
    manager = "systemctl" if layout.system else "systemctl --user"
    return f"{manager} enable --now --no-block rayfwd"


def restart_command(layout: Layout, overlay: bool) -> str:
    """The same where the service runs already; `overlay`: and so did that of the overlay."""
    manager = "systemctl" if layout.system else "systemctl --user"
    return f"{manager} restart {'rayfwd-net ' * overlay}rayfwd"


def worker_command(
    request: SetupRequest, layout: Layout, host: str, fingerprints: Sequence[str]
) -> str:
    """Of a head: what to say on each worker."""
    login = request.logins[0] if request.logins else request.user
    words = ["rayfwd", "init", "worker", "--head", f"{login}@{host}"]
    words += ["--head-rayfwd", layout.command]
    words += ["--meet", request.meet] if request.meet is not None else []
    if fingerprints and request.meet is None:
        words += ["--fingerprint", fingerprints[0]]
    return shlex.join([*words, "--ray", request.ray])
