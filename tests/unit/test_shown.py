"""What the documents show beside commands: output, configuration, lines for authorized_keys, names.

A block of output is compared with what the command prints by a test that has it (`tests/shown.py`);
a block of configuration is read by rayfwd; a name in backquotes is one that the sources have.
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from rayfwd import config
from rayfwd.cli import full_parser
from rayfwd.config import SECTIONS
from rayfwd.setup import texts
from rayfwd.setup.remote import keys
from tests import shown
from tests.unit.test_documents import DOCUMENTS, PROGRAMS, program
from tests.unit.test_readability import KEYS, NO_KEYS

CHECKOUT = Path(__file__).parents[2]

# Neither a command, nor its output, nor rayfwd's configuration: what it is.
OTHER = {
    ("docs/add.md", "ray@gpu-1.example.org"): "the file of hosts; tests/lab/test_join.py has one",
    ("docs/architecture.md", "a program on gpu-1"): "a drawing",
    ("docs/architecture.md", "src/rayfwd/"): "the tree, which tests/unit/test_pages.py walks",
    ("docs/developing.md", "w1 = cluster.worker"): "the beginning of a test",
    ("docs/metrics.md", "scrape_configs:"): "of Prometheus, which no machine here has",
    ("docs/overlay.md", "[Service]"): "of systemd; tests/systemd has the unit",
    ("docs/overlay.md", "network = ray.train"): "of a driver; test_listeners_level.py runs it",
    ("docs/add.md", "~/.local/state/rayfwd/machines"): "paths; tests/lab/test_one_home.py has them",
    ("docs/overlay.md", "settings = RayExecutor"): "of a driver, which was run by hand",
    ("docs/overlay.md", "#!/opt/ray/bin/python"): "test_libraries.py runs it with mpirun",
    ("docs/page.md", "http://127.0.0.1:9480/"): "an address; test_page.py has it",
    ("docs/protocol.md", "0      1"): "a frame; test_frames.py",
    ("docs/protocol.md", '"rayfwd proves'): "what is signed; test_proof.py",
    ("docs/protocol.md", "OPENING"): "a table; test_pages.py compares it",
    ("docs/protocol.md", "FRESH"): "a table; test_pages.py compares it",
    ("docs/ways.md", "worker ──ssh──▶ head"): "a drawing",
    ("docs/ways.md", "# ~/.ssh/config"): "of ssh; test_ways_real.py has a ControlMaster",
    ("docs/ways.md", "Host head.example.org"): "of ssh; test_ways_credentials.py",
    ("docs/ways.md", "[Service]"): "of systemd",
    ("docs/ways.md", "head ssh-ed25519"): "a line of known_hosts; test_meeting.py",
}


def everything() -> list[shown.Block]:
    return [one for page in DOCUMENTS for one in shown.blocks(page)]


def as_data(one: shown.Block) -> dict[str, Any] | None:
    """A block of configuration; None: it is none."""
    try:
        return tomllib.loads("\n".join(one.lines))
    except tomllib.TOMLDecodeError:
        return None


def is_of_rayfwd(data: dict[str, Any] | None) -> bool:
    return data is not None and data.keys() <= {*SECTIONS, *config.Config.model_fields}


def kind(one: shown.Block) -> str | None:
    """What a block is; None: nobody has said."""
    if any(page == one.page and shown.has(one, first) for page, first in shown.compared()):
        return "output"
    if one.fenced:
        return None
    if any(page == one.page and one.lines[0].startswith(first) for page, first in OTHER):
        return "other"
    if one.lines[0].startswith("restrict,"):
        return "key"
    if is_of_rayfwd(as_data(one)):
        return "configuration"
    begun = {program(re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)) for line in one.lines if line}
    return "commands" if begun <= PROGRAMS | {""} else None


@pytest.mark.parametrize("page", DOCUMENTS)
def test_what_a_block_is_has_been_said(page: str) -> None:
    """Output without a test that compares it is the usual reason to be here."""
    unknown = [one.lines[0] for one in everything() if one.page == page and kind(one) is None]
    assert unknown == [], "a test must have shown.compare for it, or OTHER what it is"


def test_every_entry_is_needed() -> None:
    for page, first in [*OTHER, *shown.compared()]:
        assert any(one.page == page and shown.has(one, first) for one in everything()), first


BASE: dict[str, dict[str, Any]] = {
    "worker": {"role": "worker", "head": {"ssh": "ray@head"}},
    "head": {"role": "head"},
}


@pytest.mark.parametrize(
    "one",
    [one for one in everything() if kind(one) == "configuration"],
    ids=lambda one: one.lines[0],
)
def test_configuration_is_accepted(one: shown.Block) -> None:
    """On one of the roles, as it stands on the page."""
    data = as_data(one)
    assert data is not None
    wrong = {}
    for role, base in BASE.items():
        try:
            config.parse({**base, **data})
        except config.ConfigError as exc:
            wrong[role] = str(exc)
    assert len(wrong) < len(BASE), wrong


def test_lines_for_authorized_keys_are_those_that_are_printed() -> None:
    command = "rayfwd attach"
    key = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    printed = {
        texts.authorized_line("rayfwd", key),
        texts.authorized_line("rayfwd", key, peer=True),
        texts.forwarding_line(key),
        *(
            keys.forced_line([*command.split(), *more], key, "name")
            for more in (["--node", "gpu-1"], ["--client"])
        ),
    }
    allowed = {line.partition(" ssh-ed25519")[0] for line in printed}
    lines = [line for one in everything() for line in one.lines if line.startswith("restrict,")]
    assert len(lines) > 4
    assert {line.partition(" ssh-ed25519")[0] for line in lines} <= allowed


@cache
def sources() -> str:
    files = [
        p for d in ("src", "tests", "bench", "tools", "examples") for p in (CHECKOUT / d).rglob("*")
    ]
    read = [p.read_text() for p in files if p.suffix in {".py", ".sh", ".toml", ".yml", ".service"}]
    return "\n".join([*read, (CHECKOUT / "Makefile").read_text()])


def spoken(page: str) -> list[str]:
    text = re.sub(r"(?ms)^```.*?^```", "", (CHECKOUT / page).read_text())
    return [" ".join(one.split()) for one in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", text)]


@pytest.mark.parametrize("page", DOCUMENTS)
def test_keys_that_are_named_are_the_configurations(page: str) -> None:
    """`section.key`, where the section is one of the configuration's."""
    named = "|".join(map(re.escape, SECTIONS))
    found = {one for one in spoken(page) if re.fullmatch(rf"(?:{named})\.[a-z_]+", one)}
    status = (CHECKOUT / "docs" / "status.md").read_text()
    known = KEYS | NO_KEYS | {key for key in found if f"`{key}`" in status}
    files = {
        key
        for key in found
        if key.endswith((".py", ".md", ".sock", ".json", ".key", ".log", ".toml"))
    }
    assert found - known - files == set()


@pytest.mark.parametrize("page", DOCUMENTS)
def test_names_with_an_underscore_are_the_sources(page: str) -> None:
    """Codes, events, keys, variables and functions: each is somewhere in the sources."""
    found = {one for one in spoken(page) if re.fullmatch(r"[A-Za-z]+(?:_[A-Za-z0-9]+)+", one)}
    words = set(re.findall(r"\w+", sources()))
    if page == "docs/metrics.md":  # put together from parts; tests/unit/test_metrics.py has them
        found = {one for one in found if not one.startswith(("rayfwd_", "process_"))}
    assert found - words - ELSEWHERE == set()


_OF_OTHERS = (
    "NCCL_DEBUG NCCL_SOCKET_RETRY_CNT OMPI_MCA_plm_rsh_agent PENDING_NODE_ASSIGNMENT "
    "btl_tcp_if_exclude dmlc_retry fully_shard root_squash ucx_perftest"
)
ELSEWHERE = frozenset(_OF_OTHERS.split())
"""Names of other programs, which no source of ours has."""


@cache
def options() -> frozenset[str]:
    parser, verbs = full_parser()
    return frozenset(
        option for one in (parser, *verbs.values()) for action in one._actions
        for option in action.option_strings
    )  # fmt: skip


@pytest.mark.parametrize("page", DOCUMENTS)
def test_options_that_are_named_are_rayfwds(page: str) -> None:
    """In backquotes by themselves; those of Ray, ssh and others are in `THEIRS`."""
    found = {
        one.partition(" ")[0].partition("=")[0] for one in spoken(page) if one.startswith("--")
    }
    rays = (CHECKOUT / "src/rayfwd/ray/commandline.py").read_text()
    rays += (CHECKOUT / "src/rayfwd/ray/starter.py").read_text()
    assert {one for one in found if f'"{one}' not in rays} - options() - THEIRS == set()


_BY_OTHERS = (
    "--address --complete-reload --cpu --host --ipc --local-addr --master-addr --mpirun_hostfile "
    "--multi_gpu --nnodes --over --privileged --rdzv-conf --rdzv-endpoint --read-only --temp-dir"
)
THEIRS = frozenset(_BY_OTHERS.split())
"""Of firewall-cmd, mpirun, docker, torchrun, Accelerate and `python -m tests.lab.training`."""


OUTPUT = "a line\n\nREADY  worker w1 at 127.77.0.3, up 12 s\nnext  /home/x\nlast\n"
READY = "READY  worker gpu-1 at 127.77.0.2, up 1 min"


@pytest.mark.parametrize(
    ("lines", "lost"),
    [
        ((READY, "next /run/a/b"), None),
        ((READY, "", "…", "last"), None),
        (("READY  worker …", "next /run/a/b"), None),
        ((READY, "last"), "last"),
        ((READY.replace(", up", ""),), READY.replace(", up", "")),
        ((READY.replace("worker", "head"),), READY.replace("worker", "head")),
        (("last", "…", "next /run/a/b"), "next /run/a/b"),
    ],
)
def test_the_comparison_sees_what_differs(lines: tuple[str, ...], lost: str | None) -> None:
    assert shown.missing(shown.Block("x", lines, fenced=True), OUTPUT) == lost


def test_blocks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "CHECKOUT", tmp_path)
    text = """\
        A page:

            rayfwd status
              further

        - an item

              [head]

        ```
        READY

        x
        ```
        """
    (tmp_path / "page.md").write_text(textwrap.dedent(text))
    assert [one.lines for one in shown.blocks("page.md")] == [
        ("READY", "", "x"), ("rayfwd status", "  further"), ("[head]",)
    ]  # fmt: skip
