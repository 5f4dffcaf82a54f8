"""What `rayfwd init` says at its end: what is left to do here, on the head and on others."""

from __future__ import annotations

import socket
import textwrap
from dataclasses import replace
from pathlib import Path

import asyncssh

from rayfwd.config import Config, HeadConfig
from rayfwd.setup import texts
from rayfwd.setup.request import Layout, SetupRequest
from rayfwd.setup.steps import public_key
from rayfwd.setup.survey import Survey
from rayfwd.ssh.own_sshd import KEY_FILE

_HOST_KEYS = ("ed25519", "ecdsa", "rsa")
"""In the order in which a worker asks for them (`ssh_connector.HOST_KEY_TYPES`)."""


def print_for_head(request: SetupRequest, layout: Layout, seen: Survey) -> None:
    """What a head's workers, and its meeting place, are to have."""
    _print_for_workers(request, layout)
    if request.meet is not None:
        _print_head_meeting(request, layout, seen)


def print_for_worker(
    request: SetupRequest, layout: Layout, seen: Survey, head_key: str | None
) -> None:
    """What the head, or the meeting place, is to have of a worker. `head_key`: the public one of a
    head that dials."""
    if request.head is None:
        _print_dialled(request, layout, head_key or "(the head's public key)")
    elif not request.by_hand:
        own = seen.public_key if request.identity else public_key(layout.identity)
        _print_login(request, seen.login, own or "(the key that will be created)")
        if request.meet is not None:
            _print_meeting(request, own or "(the same key)")
            host = HeadConfig(ssh=request.head or "").ssh_target()[1]
            print(
                f"\nAdd the head's host key to ~{request.user}/.ssh/known_hosts on this machine. "
                "The head's own\n`rayfwd init` printed the line:\n"
            )
            print(f"    {host} ssh-ed25519 AAAA…")


def print_for_others(
    request: SetupRequest, layout: Layout, seen: Survey, asked: list[str], file_was_kept: bool
) -> None:
    """What other workers are to have that this one dials, and its own file. `asked`: the ways that
    were asked for now."""
    own = seen.public_key if request.identity else public_key(layout.identity)
    only = _only(request, asked)
    if only.direct and (request.by_hand or file_was_kept):
        print(f"\nAdd this at the end of {layout.config}:\n")
        print(textwrap.indent(texts.direct_text(only, layout), "    "))
    shown = only if request.by_hand else request
    _print_direct(shown, layout, own or "(this machine's public key)")


def print_restart(layout: Layout, had_overlay: bool, before: Config | None, role: str) -> None:
    """What is left to do where the service runs by other units than are there now."""
    wanted = before is None or before.network.level != "listeners"
    if layout.overlay and not had_overlay and wanted:
        cost = (
            "what runs in it.\nNo other node's is."
            if role == "worker"
            else "every job\nof the cluster: the workers' Ray joins the new one."
        )
        print(
            "\nThe next restart of rayfwd gives this node the overlay network, if the machine "
            "allows it\n(docs/overlay.md). This node's Ray is then restarted once, which ends "
            f"{cost}"
        )
    print("\nNext, run this here to use what is new:\n")
    print(f"    {texts.restart_command(layout, had_overlay)}")


def _host_keys() -> list[asyncssh.SSHKey]:
    """Of this machine's sshd, those that a worker prefers first."""
    found = []
    for kind in _HOST_KEYS:
        try:
            found.append(asyncssh.read_public_key(Path(f"/etc/ssh/ssh_host_{kind}_key.pub")))
        except (OSError, ValueError):
            continue
    return found


def _print_for_workers(request: SetupRequest, layout: Layout) -> None:
    prints = [key.get_fingerprint() for key in _host_keys()]
    line = texts.worker_command(request, layout, socket.gethostname(), prints)
    if request.meet is None:
        print(
            "\nRun this on each worker, with this machine's name or address as the worker "
            "sees it, and the worker's `ray`:\n"
        )
    else:
        print(
            "\nRun this on each worker, with the worker's `ray`. The name after the @ does not "
            "have to resolve:\nit is the name under which this machine's host key is known there.\n"
        )
    print(f"    {line}")


def _print_dialled(request: SetupRequest, layout: Layout, key: str) -> None:
    print(f"\nAdd this line to ~{request.user}/.ssh/authorized_keys on this machine:\n")
    print(f"    {texts.authorized_line(layout.command, key)}")
    print(
        "\nAdd this to the head's file, with this machine's name or address as the head sees it, "
        "and\nadd this machine's host key to known_hosts there:\n"
    )
    section = texts.dial_section(request, layout, socket.gethostname())
    print(textwrap.indent(section, "    "))


def _print_head_meeting(request: SetupRequest, layout: Layout, seen: Survey) -> None:
    """What the third host and the workers are to have of this head."""
    if request.identity is not None:
        own = seen.public_key
    elif request.meet_identity is not None:
        own = public_key(layout.identity) or "(the key that will be created)"
    else:
        own = None
    _print_meeting(request, own or f"(the public key with which {request.user} logs in there)")
    if request.own_ssh:
        print(
            "\nNo sshd answers here at 127.0.0.1:22, so rayfwd answers there itself "
            '(sshd = "own").\nIts host key is created at the first start. Then add this line to '
            "known_hosts on each worker,\nwith the key from the file:\n"
        )
        key = f"({layout.state}/{KEY_FILE}.pub)"
    else:
        print("\nAdd this head's host key to known_hosts on each worker:\n")
        key = next((k.export_public_key().decode() for k in _host_keys()), "(its public key)")
    print(f"    {socket.gethostname()} {key.strip()}")


def _print_meeting(request: SetupRequest, key: str) -> None:
    """What the third host is to have, and what this machine of it."""
    user, host, port = HeadConfig(ssh=request.meet or "").ssh_target()
    print(f"\nAdd this line to {f'~{user}' if user else '~'}/.ssh/authorized_keys on {host}:\n")
    print(f"    {texts.forwarding_line(key)}")
    print(
        f"\nAdd the host key of {host} to known_hosts on this machine, as {request.user}. Compare "
        "it with the\none that its owner names:\n"
    )
    print(f"    mkdir -p ~/.ssh && ssh-keyscan -p {port or 22} {host} >> ~/.ssh/known_hosts")


def _only(request: SetupRequest, asked: list[str]) -> SetupRequest:
    """With those direct ways alone that were asked for now."""
    names = {each.partition("=")[0] for each in asked}
    return replace(request, direct=tuple(way for way in request.direct if way[0] in names))


def _print_direct(request: SetupRequest, layout: Layout, key: str) -> None:
    """What each worker is to have that this one dials, and what this one of it."""
    for node, ssh in request.direct:
        user, host, port = HeadConfig(ssh=ssh).ssh_target()
        print(
            f"\nFor the direct way to {node}, add this line to "
            f"~{user or request.user}/.ssh/authorized_keys there:\n"
        )
        print(f"    {texts.authorized_line(layout.command, key, peer=True)}")
        print(
            f"\nAdd the host key of {host} to ~{request.user}/.ssh/known_hosts on this machine, "
            "after you compare it\nwith its owner:\n"
        )
        print(f"    ssh-keyscan -p {port or 22} {host} >> ~{request.user}/.ssh/known_hosts")


def print_peer(request: SetupRequest, layout: Layout, key: str) -> None:
    print(
        f"\nA worker dials this one directly. Add this line to ~{request.user}/.ssh/authorized_keys"
        " on this machine:\n"
    )
    print(f"    {texts.authorized_line(layout.command, key, peer=True)}")


def _print_login(request: SetupRequest, login: str, key: str) -> None:
    print(f"\nAdd this line to ~{login or request.user}/.ssh/authorized_keys on the head:\n")
    print(f"    {texts.authorized_line(request.head_command, key)}")
