"""Every command in the documents: held to where it is run, or to why it is not; and every link.

A command of rayfwd's is parsed by its own command line besides. What is set apart is a block
indented by four, or a word in a list's backquotes that begins with one of `PROGRAMS`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rayfwd.cli import VERBS, _parser
from rayfwd.setup import texts
from rayfwd.setup.request import user_layout

CHECKOUT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "docs/from-the-recipe.md",
    "docs/operations.md",
    "docs/security.md",
    "docs/limits.md",
    "docs/doctor.md",
    "docs/developing.md",
)
PROGRAMS = (
    "rayfwd ",
    "systemctl ",
    "journalctl ",
    "python3 ",
    "/opt/",
    "make ",
    "ray ",
    "ln ",
    "mv ",
)

SERVICE = "tests/systemd/test_service.py"
OPERATIONS = "tests/systemd/test_operations.py"
INIT = "tests/lab/test_init.py"
ROOT = "tests/lab/test_init_root.py"
CLI = "tests/unit/test_cli.py"

# The beginning of a command, and the file that runs it with a word that is found there.
RUN = {
    "rayfwd init": (INIT, '"init", "worker"'),
    "rayfwd connect": ("tests/lab/test_client.py", '"connect"'),
    "rayfwd uninstall": (ROOT, '"$rayfwd" uninstall --purge'),
    "rayfwd check": (ROOT, '"$rayfwd" check'),
    "rayfwd status": (INIT, '"status", "--json"'),
    "rayfwd status --watch": ("tests/unit/test_status_watch.py", "--watch"),
    "rayfwd canary": ("tests/lab/test_canary.py", '"canary"'),
    "rayfwd trace": ("tests/unit/test_trace.py", '"trace"'),
    "rayfwd doctor": ("tests/lab/test_doctor.py", '"doctor"'),
    "rayfwd doctor --report": ("tests/lab/test_doctor.py", '"--report"'),
    "rayfwd doctor --report --with-logs": ("tests/systemd/test_journal.py", '"--with-logs"'),
    "rayfwd explain": ("tests/unit/test_conditions.py", "explain.run"),
    "rayfwd forget": (OPERATIONS, '"forget"'),
    "rayfwd plan": (CLI, '"plan"'),
    "rayfwd run": (INIT, '"run"'),
    "rayfwd attach": (INIT, "attach"),
    "rayfwd reload": ("tests/unit/test_reload.py", '"reload"'),
    "rayfwd keeper": ("tests/unit/test_keeper.py", '"keeper"'),
    "systemctl restart rayfwd": (SERVICE, 'systemctl("restart", "rayfwd")'),
    "systemctl --user restart rayfwd": (
        "tests/systemd/cluster.py",
        'systemctl("restart", "rayfwd", user=self.user)',
    ),
    "systemctl disable --now rayfwd": (OPERATIONS, '"disable", "--now", "rayfwd"'),
    "mv /etc/rayfwd/id_ed25519": (OPERATIONS, '"mv", KEY'),
    "systemctl is-system-running": ("tests/systemd/test_boot.py", '"is-system-running"'),
    "systemctl reload rayfwd": (SERVICE, 'systemctl("reload", "rayfwd")'),
    "systemctl stop rayfwd": (SERVICE, 'systemctl("stop", "rayfwd")'),
    "systemctl status rayfwd": (SERVICE, '"systemctl", "status"'),
    "/opt/rayfwd/bin/pip install --upgrade": (SERVICE, "pip install --upgrade"),
    "rayfwd demo": ("Makefile", "rayfwd demo"),
    "python3 -m venv": ("tests/lab/package.py", '"venv"'),
    "ln -s /opt/rayfwd/bin/rayfwd": ("tests/systemd/install.py", "ln -s /opt/rayfwd/bin/rayfwd"),
    "systemctl enable --now --no-block rayfwd": (
        "tests/systemd/cluster.py",
        '"enable", "--now", "--no-block", "rayfwd"',
    ),
    "journalctl": ("tests/systemd/machines.py", '"journalctl"'),
    "make test": (".ci/run", "checks ray-envs roots"),
    "make checks": (".ci/run", "checks ray-envs roots"),
    "make fast": ("Makefile", "fast:"),
    "make manual": ("Makefile", "manual:"),
    "make demo": ("tests/demo/test_demo.py", "demo"),
    ".venv/bin/python -m pytest": ("Makefile", "$(BIN)/python -m pytest"),
}

# Run by no test that this file could name, and why.
NOT_RUN = {
    "systemctl --user": "a name, not a command",
    "ray stop": "would end every Ray of this machine",
    "ray start": "rayfwd's own business; the recipe's is tried in tests/lab/test_by_hand.py",
    "ray status": "run by rayfwd itself",
    "ray job submit": "Ray's own",
    "make clean": "would remove the environment that runs this",
}


def commands() -> list[tuple[str, str]]:
    """Document and command, comments taken off."""
    found = []
    for name in DOCUMENTS:
        text = (CHECKOUT / name).read_text()
        lines = [m[1] for m in re.finditer(r"(?m)^(?: {4}| {7})(\S.*)$", text)]
        lines += [m[1] for m in re.finditer(r"`([^`\n]+)`", text)]
        for line in lines:
            command = re.sub(r"\s{2,}#.*", "", line).strip()
            if command.startswith((*PROGRAMS, ".venv/")) and "…:" not in command:
                found += [(name, part.strip()) for part in command.split("&&")]
    return sorted(set(found))


def longest(command: str, table: dict[str, object]) -> str | None:
    fitting = [key for key in table if command == key or command.startswith(key)]
    return max(fitting, key=len, default=None)


def test_there_are_commands() -> None:
    assert len(commands()) > 40
    assert {name for name, _ in commands()} == set(DOCUMENTS)


@pytest.mark.parametrize(("name", "command"), commands())
def test_a_command_is_run_somewhere_or_said_not_to_be(name: str, command: str) -> None:
    where = longest(command, dict(RUN))
    if where is None:
        if command.startswith("/opt/rayfwd/bin/pip install ."):
            where = "python3 -m venv"
        else:
            assert longest(command, dict(NOT_RUN)), f"{name}: `{command}` is in neither list"
            return
    path, word = RUN[where]
    assert word in (CHECKOUT / path).read_text(), f"{path} no longer runs `{where}`"


@pytest.mark.parametrize(("name", "command"), [c for c in commands() if c[1].startswith("rayfwd ")])
def test_rayfwds_own_commands_are_understood(name: str, command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if not word.startswith("[")]
    assert words[0] in VERBS
    if len(words) > 1:  # else the verb is only spoken of
        _parser().parse_args(words)


def test_every_entry_is_used() -> None:
    used = {longest(c, dict(RUN)) or longest(c, dict(NOT_RUN)) for _, c in commands()}
    assert set(RUN) | set(NOT_RUN) == used - {None}


def test_the_next_command_is_the_one_documented() -> None:
    places = user_layout(Path("/h"), 1, "r", "p", None)
    documented = "systemctl enable --now --no-block rayfwd"
    assert texts.next_command(places) == documented.replace("systemctl", "systemctl --user")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    path = CHECKOUT / name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_are_there(name: str) -> None:
    text = (CHECKOUT / name).read_text()
    for target in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (CHECKOUT / target).exists(), target


def test_codes_that_are_named_exist() -> None:
    text = (CHECKOUT / "docs/operations.md").read_text()
    table = text.partition("## What each failure looks like")[2]
    source = "".join(path.read_text() for path in (CHECKOUT / "src").rglob("*.py"))
    codes = re.findall(r"`([a-z]+(?:_[a-z]+)+)`", table)
    assert len(codes) > 10
    for code in codes:
        assert re.search(rf"\b{code}\b", source), code
