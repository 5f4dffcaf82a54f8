"""Every command in the documents: held to a test that runs it, or to why none does; and every link.

Which test runs which is said at the tests (`tests/commands.py`). A command of rayfwd's is parsed by
its own command line besides. What counts is a line of a block that begins with one of `PROGRAMS` or
`OTHERS`, and words in backquotes that begin with one of `PROGRAMS`.
"""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.cli import VERBS, _parser
from rayfwd.setup import texts
from rayfwd.setup.request import user_layout
from tests.commands import matches
from tests.commands import named as named_by_tests
from tests.systemd.install import README

CHECKOUT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in CHECKOUT.glob("docs/*.md")))
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
OTHERS = ("eval ", "install ", "jq ", "pip ", "pkill ", "sbatch ", "sed ", "ssh -", "uv ")

# The README's commands as `tests/systemd/install.py` runs them, which makes each machine from them.
INSTALLS = [part.strip() for part in README.format(wheel=".").split("&&")]

# Run by no test, and why.
NOT_RUN = {
    "systemctl --user": "a name, not a command",
    "journalctl --user": "a name, not a command",
    "rayfwd connect": "a name; it does nothing without a head",
    "rayfwd join": "a name; it does nothing without a head",
    "rayfwd init": "a name; it does nothing without a role",
    "systemctl stop rayfwd-ray": "what `systemctl stop rayfwd` does besides",
    "ray stop": "would end every Ray of this machine",
    "ray start*": "rayfwd's own business; the recipe's is tried in tests/lab/test_by_hand.py",
    "ray status": "run by rayfwd itself",
    "ray job*": "Ray's own",
    "ray list": "Ray's own",
    "ray client *": "an error text",
    "systemctl edit *": "opens an editor",
    "rayfwd attach --client": "sshd runs it by a key's line: tests/lab/test_client.py",
    "rayfwd attach --node NAME": "sshd runs it by a key's line: tests/lab/test_join.py",
    "jq *": "the keys are held by docs/status.md's own test",
    "pip install .": "what `/opt/rayfwd/bin/pip install .` does, in another environment",
    "sbatch *": "Slurm's; the script is run by tests/unit/test_examples.py",
    ".venv/bin/python -m pytest *": "what runs this",
}


def commands() -> list[tuple[str, str]]:
    """Document and command, comments taken off."""
    found = []
    for name in DOCUMENTS:
        text = (CHECKOUT / name).read_text()
        blocks = [m[1] for m in re.finditer(r"(?m)^(?: {4}| {6,7})(\S.*)$", text)]
        spoken = [m[1] for m in re.finditer(r"`([^`\n]+)`", text)]
        for lines, programs in ((blocks, PROGRAMS + OTHERS), (spoken, PROGRAMS)):
            for line in lines:
                command = re.sub(r"\s{2,}#.*", "", line).strip()
                command = re.sub(r" \[[^]]*\]", "", command)  # options that may be left out
                if not command.startswith((*programs, ".venv/")) or "…:" in command:
                    continue
                parts = [part.strip() for part in command.split("&&")]
                found += [(name, part) for part in parts if " " in part]  # else a path
    return sorted(set(found))


def excused(command: str) -> str | None:
    """The entry of `NOT_RUN` that is meant."""
    return next((key for key in NOT_RUN if fnmatchcase(command, key)), None)


def test_there_are_commands() -> None:
    assert len(commands()) > 40
    assert len({name for name, _ in commands()}) > 15


@pytest.mark.parametrize(("name", "command"), commands())
def test_a_command_is_run_by_a_test(name: str, command: str) -> None:
    """A test that names it has `@pytest.mark.runs`, and fails where it runs something else."""
    if command in INSTALLS or excused(command):
        return
    tests = [test for named, found in named_by_tests().items() for test in found
             if matches(command, named)]  # fmt: skip
    assert tests, f"{name}: no test has @pytest.mark.runs for `{command}`"


def test_what_is_excused_is_run_by_none() -> None:
    for command in {command for _, command in commands()}:
        if (key := excused(command)) is not None:
            assert not [n for n in named_by_tests() if matches(command, n)], f"{key} is run"


@pytest.mark.parametrize(("name", "command"), [c for c in commands() if c[1].startswith("rayfwd ")])
def test_rayfwds_own_commands_are_understood(name: str, command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if not word.startswith("[")]
    assert words[0] in {*VERBS, "--version"}
    if len(words) > 1:  # else the verb is only spoken of
        _parser().parse_args(words)


def test_the_table_of_commands_says_what_help_says() -> None:
    table = (CHECKOUT / "README.md").read_text().split("\n## Commands\n")[1].split("\n## ")[0]
    rows = re.findall(r"(?m)^\| `rayfwd (\w+)[^|]*\| (.*) \|$", table)
    assert sorted(verb for verb, _ in rows) == sorted(VERBS)
    differ = [verb for verb, said in rows if not said.startswith(VERBS[verb].help)]
    assert differ == [], "one wording for both"


def test_every_entry_is_used() -> None:
    written = {command for _, command in commands()}
    assert set(NOT_RUN) == {excused(command) for command in written} - {None}
    assert set(INSTALLS) <= written
    spoken = {n for n in named_by_tests() if any(matches(command, n) for command in written)}
    assert set(named_by_tests()) == spoken, "a test names a command that no document has"


def test_the_next_command_is_the_one_documented() -> None:
    places = user_layout(Path("/h"), 1, "r", "p", None)
    documented = "systemctl enable --now --no-block rayfwd"
    assert texts.next_command(places) == documented.replace("systemctl", "systemctl --user")


def test_each_symptom_has_its_meaning_and_what_to_do_and_names_what_there_is() -> None:
    text = (CHECKOUT / "docs/symptoms.md").read_text()
    for section in re.split(r"(?m)^### ", text)[1:]:
        heading = section.splitlines()[0]
        assert "- **Meaning.** " in section, heading
        assert "- **Without rayfwd.** " in section, heading
        assert "- **With rayfwd.** " in section, heading
    events = re.findall(r"(?m)^\| `(\w+)`", (CHECKOUT / "docs/events.md").read_text())
    known = {*codes.ALL, *events, "ride_through", "authorized_keys"}
    assert set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text)) <= known


@pytest.mark.parametrize(
    "text",
    [
        "1/3 clients joined",
        "No available agent",
        "connected but no resources",
        "This node has an IP address of 127.0.0.1, while we can not find the matched Raylet",
        "Some workers of the worker group … have failed to connect",
        "ConnectionResetError",
        "kex_exchange_identification: Connection closed",
        "NCCL WARN Connect to",
        "Waiting for creating a placement group of specs",
    ],
)
def test_a_text_that_people_search_for_is_a_symptom(text: str) -> None:
    """In a heading, or below it before anything is explained."""
    sections = re.split(r"(?m)^### ", (CHECKOUT / "docs/symptoms.md").read_text())[1:]
    shown = [" ".join(one.split("- **Meaning.** ")[0].split()) for one in sections]
    assert [one for one in shown if text in one]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_modules_that_are_run_are_there(name: str) -> None:
    text = (CHECKOUT / name).read_text()
    for module in re.findall(r"python3? -m\s+((?:bench|tests|tools)[\w.]*)", text):
        path = CHECKOUT / module.replace(".", "/")
        assert path.with_suffix(".py").exists(), module


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
