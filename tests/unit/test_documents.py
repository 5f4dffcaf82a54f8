"""Every command in the documents: held to a test that runs it, or to why none does; and every link.

Which test runs which is said at the tests (`tests/commands.py`). A command of rayfwd's is parsed by
its own command line besides. What counts is a line of a block, or words in backquotes, that begins
with one of `PROGRAMS`; and whatever else begins with a program of this machine's is in `WORDS`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from rayfwd import codes
from rayfwd.cli import VERBS, _parser
from rayfwd.setup import texts
from rayfwd.setup.request import user_layout
from rayfwd.system.eventlog import declared
from tests.commands import matches, simple
from tests.commands import named as named_by_tests
from tests.systemd.install import README

CHECKOUT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in CHECKOUT.glob("docs/*.md")))
SPEAKING = (*DOCUMENTS, "CHANGELOG.md", "config.example.toml")
"""What names commands."""
_PROGRAMS = (
    "chmod conntrack docker eval export fail2ban-client find firewall-cmd install ip iptables "
    "iptables-legacy journalctl jq kill ln loginctl make man modprobe mv nc nft pgrep pip pkill "
    "podman python python3 ray rayfwd sbatch scancel scontrol sed ss ssh ssh-add ssh-keygen "
    "ssh-keyscan sysctl systemctl systemd-analyze timedatectl ufw ulimit uv"
)
PROGRAMS = frozenset(_PROGRAMS.split())
_SHELL = "alias cd exec exit set source test time trap type umask unset wait"
SHELL = frozenset(_SHELL.split())
"""What a shell has, and no directory of PATH."""
WORDS = frozenset({"head", "init", "node", "sshd", "time"})
"""Programs whose names begin what is no command."""

# The README's commands as `tests/systemd/install.py` runs them, which makes each machine from them.
INSTALLS = [part.strip() for part in README.format(wheel=".").split("&&")]

# Named in a sentence, and not to be typed.
NAMES = {
    "pip install": "a name, with what is installed left out",
    "pkill -u ray": "what the page says not to type",
    "ray client *": "an error text",
    "ray start --address=*": "of the recipe that the page replaces",
    "ray start --block": "what rayfwd runs; tests/ray/test_ray.py runs that",
    "ray start --head *": "of the recipe that the page replaces",
    "scancel *": "what examples/slurm/cluster.sh runs, which tests/unit/test_examples.py checks",
    "ssh head-node -N": "of the recipe that the page replaces",
    "ufw limit": "a limit of other people's servers; tests/lab/test_budget.py has one",
}

# Run by no test, and why.
NOT_RUN = {
    **NAMES,
    "docker *": "needs a Docker daemon; docs/join.md says what was tried by hand",
    "ssh-keygen -t ed25519-sk *": "makes a key in an authenticator, which no machine here has",
    "podman *": "its images are to be fetched; tests/lab/test_containers.py has one of its own",
    "fail2ban-client *": "it would watch over the sshd of the machine that runs the tests",
    "rayfwd exec -- accelerate *": "tried by hand (docs/overlay.md); torchrun is a test",
    "rayfwd exec -- deepspeed *": "tried by hand, likewise",
    "iptables-legacy -F": "tried by hand (docs/overlay.md); the tests have iptables of nftables",
    "modprobe *": "loads a part of the kernel, which all machines share",
    "timedatectl set-ntp *": "sets the clock, which all machines share",
    "ray stop": "ends every Ray of its user by name, those of other tests too",
    ".venv/bin/python -m pytest *": "what runs this; its words are looked up by a test below",
    "python -m *": "measures for minutes; its words are parsed by a test below",
    ".venv/bin/pip install -e .": "compiles for a minute what tests/setup_wheel.py compiles, too",
}


def written(name: str) -> Iterator[str]:
    """Lines of a document's blocks, comments taken off, and what is in backquotes, on one line."""
    text = re.sub(r"(?ms)^```.*?^```$", "", (CHECKOUT / name).read_text())
    blocks = re.compile(r"(?m)^(?: {4}| {6,7})(\S.*)$")
    for block in blocks.findall(text):
        if not re.match(r"\w+ = ", block):  # a line of a configuration
            yield re.sub(r"\s{2,}#.*", "", block).strip()
    for spoken in re.findall(r"`([^`]+)`", blocks.sub("", text)):
        yield " ".join(spoken.split())


def commands() -> list[tuple[str, str]]:
    """Document and command; each one of a pipe by itself."""
    found = set()
    for name in SPEAKING:
        for part in (part for line in written(name) for part in simple(line)):
            command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part)
            command = re.sub(r" \[[^]]*\]", "", command)  # options that may be left out
            if " " in command and program(command) in PROGRAMS:
                found.add((name, command))
    return sorted(found)


def program(command: str) -> str:
    """What a command begins with, also in an environment's directory."""
    word, _, _ = command.partition(" ")
    return word.rpartition("/")[2] if word.startswith(("/opt/", ".venv/")) else word


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


def test_no_program_is_passed_over() -> None:
    """A command that is new in a document begins with a program that nobody has named yet."""
    begun = {program(line) for name in SPEAKING for line in written(name) if " " in line}
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    known = PROGRAMS | WORDS
    assert not {word for word in begun - known if word in SHELL or shutil.which(word, path=path)}


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


@pytest.mark.parametrize("command", sorted({c for _, c in commands() if " -m pytest " in c}))
def test_what_pytest_is_given_is_there(command: str) -> None:
    """The file, a test of it that `-k` selects, and the variables that stand before."""
    file, *words = command.partition(" -m pytest ")[2].split()
    text = (CHECKOUT / file).read_text()
    if words:
        option, name = words
        assert option == "-k"
        assert name in text
    page = (CHECKOUT / "docs/developing.md").read_text()
    for given in re.findall(rf"(?m)^ +((?:[A-Z_]+=\S+ )+){re.escape(command)}", page):
        for variable in re.findall(r"(\w+)=", given):
            assert f'"{variable}"' in text


class ParsedError(Exception):
    """A command line was understood; its values."""


@pytest.mark.parametrize(
    "command", sorted({c for _, c in commands() if c.startswith("python -m ")})
)
def test_what_is_measured_for_minutes_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module takes the words that the document gives it, if it takes any."""
    module, *words = command.removeprefix("python -m ").split()
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser) -> None:
        raise ParsedError(vars(parse(parser, words)))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    main = importlib.import_module(module).main
    if words:
        with pytest.raises(ParsedError) as caught:
            main()
        for option, value in zip(words[::2], words[1::2], strict=True):
            assert value in repr(caught.value.args[0][option.removeprefix("--")])


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
    known = {*codes.ALL, *events, "ride_through", "authorized_keys", "local_listen_port"}
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
        "mistakenly been marked as dead by the GCS",
        "failed to connect to all addresses",
        "Could not find any running Ray instance",
        "Failed to connect to Ray at address",
        "retrieving ncclUniqueId from [0] via c10d",
        "cannot be retrieved (gai error",
        "connect [127.0.1.1]",
        "Software caused connection abort",
        "ncclSystemError",
        "Engine core initialization failed",
        "Cannot provide a placement group",
        "Connecting to rank",
        "Connection closed by UNKNOWN port 65535",
        "Connection timed out during banner exchange",
        "no matching host key type found",
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
    """Or events; what else is named in that form is a file, or a key of the configuration."""
    text = (CHECKOUT / "docs/operations.md").read_text()
    table = text.partition("## What each failure looks like")[2]
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", table))
    assert len(named & codes.ALL.keys()) > 10
    assert named - codes.ALL.keys() - declared().keys() == {"authorized_keys", "ride_through"}
