"""What is written from the code is up to date, can be read, and completes; the exit codes hold."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rayfwd.cli import EXIT_CODES, VERBS, full_parser
from tests.commands import main
from tests.need import need
from tools import manual

CHECKOUT = Path(__file__).parents[2]
SHARE = CHECKOUT / "share"
PAGES = (SHARE / "man/man1/rayfwd.1", SHARE / "man/man5/rayfwd.toml.5")


def shipped() -> set[Path]:
    return {p.relative_to(CHECKOUT) for p in SHARE.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def written() -> dict[Path, str]:
    """What `make manual` would write; made here, since whoever collects tests makes it too."""
    return manual.files()


@pytest.mark.parametrize("name", sorted({*shipped(), Path("config.example.toml")}), ids=str)
def test_it_is_up_to_date(name: Path, written: dict[Path, str]) -> None:
    assert (CHECKOUT / name).read_text() == written[name], "run `make manual`"


def test_nothing_is_missing(written: dict[Path, str]) -> None:
    assert shipped() == set(written) - {Path("config.example.toml")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_reads_it_without_a_complaint(page: Path) -> None:
    need(None if shutil.which("groff") else "groff is not installed")
    read = subprocess.run(
        ["groff", "-ww", "-man", "-Tascii", str(page)], capture_output=True, text=True, check=True
    )
    assert read.stderr == ""
    assert read.stdout.count("\n") > 100


def test_the_page_has_every_verb_and_option() -> None:
    text = PAGES[0].read_text().replace("\\-", "-")
    _, verbs = full_parser()
    assert verbs.keys() == VERBS.keys()
    for verb, parser in verbs.items():
        part = text.partition(f"\n.SS {verb}\n")[2].partition("\n.S")[0]
        for action in parser._actions:
            if action.help == argparse.SUPPRESS:
                continue
            for option in set(action.option_strings) - {"-h", "--help", "--config"}:
                assert option in part, (verb, option)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_reads_well(verb: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"] if verb else ["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    options = said.partition("options:")[2].partition("exit codes:")[0]
    assert max(map(len, options.splitlines())) <= 80
    for code, why in (VERBS[verb].exit_codes if verb else EXIT_CODES).items():
        assert f"  {code:<4} {why}" in said


def completed(*words: str) -> set[str]:
    """What bash offers for the last of these words."""
    script = """
        source "$1"; shift
        function=$(complete -p rayfwd | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
        "$function" rayfwd "${@: -1}" "${@: -2:1}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    file = SHARE / "bash-completion/completions/rayfwd"
    argv = ["bash", "--norc", "-c", script, "bash", str(file), "rayfwd", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes() -> None:
    assert completed("sta") == {"status"}
    assert set(VERBS) <= completed("")
    assert completed("status", "--w") == {"--watch"}
    assert completed("init", "wo") == {"worker"}
    assert completed("connect", "--via", "e") == {"exec"}


def told_by(shell: str, *words: str) -> str:
    need(None if shutil.which(shell) else f"{shell} is not installed")
    return subprocess.run([shell, *words], capture_output=True, text=True, check=True).stdout


def test_fish_completes() -> None:
    file = SHARE / "fish/vendor_completions.d/rayfwd.fish"
    ask = f'source {file}; complete -C "rayfwd sta"; complete -C "rayfwd status --w"'
    said = told_by("fish", "--no-config", "-c", ask)
    assert [line.split()[0] for line in said.splitlines()] == ["status", "--watch"]


def test_zsh_takes_it_for_the_commands_completion() -> None:
    look = f"fpath=({SHARE}/zsh/site-functions $fpath); autoload -U compinit; compinit -u -D; "
    look += "echo $_comps[rayfwd]; autoload +X _rayfwd"
    assert told_by("zsh", "-f", "-c", look) == "_rayfwd\n"


@pytest.mark.runs("rayfwd explain *", "rayfwd explain")
def test_explain_shows_the_section(capsys: Any) -> None:
    assert main(["explain", "ray_died"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ray_died\n")
    assert "the raylet or the GCS" in said
    assert "ray_start_failed" not in said, "that is another section"


@pytest.mark.parametrize("verb", VERBS)
def test_a_mistake_on_the_command_line_is_2(verb: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--no-such-option"])
    assert ended.value.code == 2


@pytest.mark.parametrize("verb", ["run", "check", "plan", "status", "canary", "forget", "connect"])
def test_a_mistake_in_the_file_is_2(verb: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "rayfwd.toml"
    file.write_text('role = "boss"\n')
    assert main([verb, "--config", str(file), *(["w1"] if verb == "forget" else [])]) == 2
    assert f'{file}: role = "boss": must be' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["status"], 1),
        (["canary"], 1),
        (["plan"], 1),
        (["check"], 0),
        (["explain", "no-such-code"], 1),
        (["explain", "ray_died"], 0),
        (["forget", "w1"], 2),
        (["uninstall"], 0),
        (["init", "worker", "--login", "ray"], 2),
        (["demo", "--ray", "/nonexistent"], 1),
        (["connect", "a@b", "--identity", "/nonexistent"], 1),
    ],
)
def test_exit_codes(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What run and keeper end with is seen in the lab; attach, and status 0 and 3, in test_cli."""
    file = tmp_path / "rayfwd.toml"
    monkeypatch.setenv("HOME", str(tmp_path))
    where = f'state_dir = "{tmp_path}/s"\nruntime_dir = "{tmp_path}/r"\n'
    file.write_text(f'role = "worker"\nname = "w1"\n{where}[head]\nssh = "ray@h"\n')
    config = [] if words[0] in {"explain", "demo", "connect"} else ["--config", str(file)]
    assert main([*words, *config]) == code
