"""Writes config.example.toml, the man pages and the shell completions from the code.

`make manual` writes them; a unit test holds them to be up to date. The words are those below the
keys in config.py, and of the command line's own help.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shtab
import tomli_w

from rayfwd.cli import EXIT_CODES, VERBS, full_parser
from rayfwd.cli.flags import said_of
from rayfwd.config import INNER, SECTIONS, Config

CHECKOUT = Path(__file__).parents[1]
COLUMN = 40
"""Where the example's comments begin."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the configuration, as the page and the example show it."""

    name: str
    words: str
    example: str
    """As TOML writes it: the default, or what stands for one that is found at run time."""
    default: str | None
    """None: none, or found at run time."""
    allowed: str
    required: bool


_LISTS = tuple(tuple[cls, ...] for cls in INNER.values())  # type: ignore[valid-type]
"""What has a section of its own."""


def sections() -> Iterator[tuple[str, str, type[Any]]]:
    """Name, header and class of each, a section's own lists behind it."""
    for name, cls in SECTIONS.items():
        yield name, f"[[{name}]]" if name in {"forward", "direct"} else f"[{name}]", cls
        for inner, its in INNER.items():
            if inner.startswith(f"{name}."):
                yield inner, f"[[{inner}]]", its


def keys(cls: type[Any]) -> Iterator[Key]:
    """The keys of a section; of the whole file, those before any section."""
    said = said_of(cls)
    schema = cls.model_json_schema()
    for name, field in cls.model_fields.items():
        if (cls is Config and name in SECTIONS) or field.annotation in _LISTS:
            continue
        shown = field.examples[0] if field.examples else field.default
        plain = None if field.examples or field.is_required() else _toml(field.default)
        yield Key(
            name=name,
            words=said[name],
            example=_toml(shown),
            default=plain,
            allowed=allowed(schema["properties"][name]),
            # Of the link, where the head does not dial: the example is a worker's that does.
            required=field.is_required() or name == "ssh",
        )


def _toml(value: Any) -> str:
    """On one line, as a key's value."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {_toml(inner)}' for key, inner in value.items())}}}"
    plain = str(value) if isinstance(value, Path) else value
    return tomli_w.dumps({"x": plain}).removeprefix("x = ").rstrip("\n")


def _key(name: str) -> str:
    return tomli_w.dumps({name: 0}).removesuffix(" = 0\n")


_TYPES = {
    "boolean": "true or false",
    "string": "a string",
    "array": "a list",
    "object": "a table",
}


def allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    for part in schema.get("anyOf", ()):
        if part.get("type") != "null":
            return allowed(part)
    if "enum" in schema:
        *first, last = (json.dumps(value) for value in schema["enum"])
        return f"{', '.join(first)} or {last}"
    if schema.get("format") == "path":
        return "a path"
    kind = schema["type"]
    if kind == "array":
        return f"a list, of each: {allowed(schema['items'])}"
    if kind == "object":
        return f"a table, of each: {allowed(schema['additionalProperties'])}"
    if kind in {"integer", "number"}:
        words = "a whole number" if kind == "integer" else "a number"
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        high = schema.get("maximum")
        if (below := schema.get("exclusiveMaximum")) is not None:
            high = below - 1
        words += f" from {low:g}" if low is not None and high is not None else ""
        words += f" to {high:.0f}" if high is not None else ""
        return words + (f", at least {low:.0f}" if low is not None and high is None else "")
    return _TYPES[kind]


# -- the example -----------------------------------------------------------------------------------

_ABSENT = {"hub", "hub.dial", "hub.meet", "client", "forward", "direct"}
"""Sections that the example, a worker's file, shows without having them."""


def example() -> str:
    """config.example.toml."""
    lines = [
        "# rayfwd's configuration, every key with its default.",
        "# A key that is commented out shows its default. `rayfwd check` shows what a file results",
        "# in. An unknown key is a mistake, and the file is refused.",
        "",
        *_example_of(Config, False),
    ]
    for name, header, cls in sections():
        absent = name in _ABSENT
        lines += ["", *_wrapped(str(inspect.getdoc(cls))), "#" * absent + header]
        lines += _example_of(cls, absent)
    return "\n".join(lines) + "\n"


def _example_of(cls: type[Any], absent: bool) -> Iterator[str]:
    for key in keys(cls):
        mark = "" if key.required and not absent else "#"
        choices = re.findall(r'"\w+"', key.allowed)
        untold = f"{key.allowed}: " * any(word not in key.words for word in choices[1:])
        yield f"{mark}{key.name} = {key.example}".ljust(COLUMN - 1) + f" # {untold}{key.words}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")


# -- man pages -------------------------------------------------------------------------------------


def roff(text: str) -> str:
    """Plain text for troff: nothing in it is a request or an escape."""
    safe = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("…", "...")
    safe = re.sub(r"`([^`]+)`", r"\\fB\1\\fP", safe)
    return re.sub(r"(?m)^([.'])", r"\\&\1", safe)


def _head(name: str, section: int, what: str) -> list[str]:
    return [
        '.\\" Written by `make manual`.',
        f'.TH {name.upper()} {section} "" rayfwd',
        ".SH NAME",
        f"{name} \\- {roff(what)}",
    ]


def _paragraphs(text: str) -> Iterator[str]:
    for index, part in enumerate(inspect.cleandoc(text).split("\n\n")):
        if index:
            yield ".PP"
        yield roff(" ".join(part.split()))


def page_of_file() -> str:
    """rayfwd.toml(5)."""
    lines = _head("rayfwd.toml", 5, "configuration of rayfwd")
    lines += [
        ".SH DESCRIPTION",
        roff(
            "A TOML file that says which part a machine has in its Ray cluster: the file that "
            "--config names, else ~/.config/rayfwd.toml if the user has one, else "
            "/etc/rayfwd.toml. `rayfwd check` shows what it results in. An unknown key is a "
            "mistake, and so is a key of another role."
        ),
        ".SH KEYS OF THE FILE",
        *_page_of(Config),
    ]
    for _, header, cls in sections():
        lines += [f".SH {header}", *_paragraphs(str(inspect.getdoc(cls))), *_page_of(cls)]
    lines += [".SH SEE ALSO", ".BR rayfwd (1)"]
    return "\n".join(lines) + "\n"


def _page_of(cls: type[Any]) -> Iterator[str]:
    for key in keys(cls):
        facts = key.allowed + ("; required" if key.required else "")
        if key.default is not None:
            facts += f"; default: {key.default}"
        yield ".TP"
        yield f".B {roff(key.name)}"
        first = key.words.split()[0]
        words = key.words[0].upper() + key.words[1:] if first.isalpha() else key.words
        yield roff(f"{words}.")
        yield ".br"
        yield roff(f"({facts})")


def page_of_command() -> str:
    """rayfwd(1)."""
    parser, verbs = full_parser()
    lines = _head("rayfwd", 1, "makes a Ray cluster work over SSH")
    lines += [".SH SYNOPSIS", ".B rayfwd", roff("[--config PATH] VERB ..."), ".SH DESCRIPTION"]
    lines += _paragraphs(str(parser.description))
    lines += [".SH OPTIONS", *_options(parser), ".SH VERBS"]
    for verb, sub in verbs.items():
        lines += [f".SS {verb}", ".B", roff(_usage(sub)), ".PP", *_paragraphs(str(sub.description))]
        lines += _options(sub)
        lines += [roff(f"Exit code {code}: {why}.") for code, why in VERBS[verb].exit_codes.items()]
    lines += [".SH EXIT CODES"]
    for code, why in EXIT_CODES.items():
        lines += [".TP", f".B {code}", roff(why)]
    lines += [
        ".SH FILES",
        ".TP",
        roff("~/.config/rayfwd.toml, /etc/rayfwd.toml"),
        "The configuration.",
        ".TP",
        roff("/var/lib/rayfwd, /run/rayfwd"),
        "State and sockets of a service of the machine.",
        ".SH SEE ALSO",
        ".BR rayfwd.toml (5)",
    ]
    return "\n".join(lines) + "\n"


def _usage(parser: argparse.ArgumentParser) -> str:
    return " ".join(parser.format_usage().removeprefix("usage: ").split())


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.help in {None, argparse.SUPPRESS} or isinstance(
            action, (argparse._HelpAction, argparse._SubParsersAction)
        ):
            continue
        if action.dest == "config" and parser.prog != "rayfwd":
            continue  # the same everywhere
        names = ", ".join(action.option_strings)
        metavar = action.metavar or (
            "{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper()
        )
        value = "" if action.nargs == 0 else f"[{metavar}]" if action.nargs == "?" else metavar
        yield ".TP"
        yield f".B {roff(f'{names} {value}'.strip())}"
        yield roff(" ".join(str(action.help).replace("%%", "%").split()))
    yield ".PP"


# -- completion ------------------------------------------------------------------------------------


def completion(shell: str) -> str:
    """What that shell needs to complete rayfwd's words."""
    parser, verbs = full_parser()
    for each in (parser, *verbs.values()):
        for action in each._actions:
            if action.metavar in {"PATH", "FILE"}:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar == "DIRECTORY":
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    with contextlib.redirect_stderr(io.StringIO()):
        made = shtab.complete(parser, shell)
    return "".join(f"{line.rstrip()}\n" for line in made.strip().splitlines())


# -- all of it -------------------------------------------------------------------------------------


def files() -> dict[Path, str]:
    """What there is to write, by its place in the checkout."""
    share = Path("share")
    return {
        Path("config.example.toml"): example(),
        share / "man/man1/rayfwd.1": page_of_command(),
        share / "man/man5/rayfwd.toml.5": page_of_file(),
        share / "bash-completion/completions/rayfwd": completion("bash"),
        share / "zsh/site-functions/_rayfwd": completion("zsh"),
        share / "fish/vendor_completions.d/rayfwd.fish": completion("fish"),
    }


def main() -> None:
    """Write what is not up to date."""
    for name, text in files().items():
        path = CHECKOUT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"written: {name}")


if __name__ == "__main__":
    main()
