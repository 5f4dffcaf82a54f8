"""What must not be in a report: values of names that name a secret, wherever they stand (pure).

Three nets, one behind the other: what a name gives away is not put in; a secret that is known is
taken out of all text, also where nothing names it; and what looks like one in text is blanked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from rayfwd.system.redact import (
    REDACTED,
    names_a_secret,
    redact_command,
    redact_text,
    secrets_in,
)

SHORTEST_SECRET = 6
"""Characters of a secret that is looked for in text: shorter ones are in every other word."""

SET = "[set]"
"""Stands for the value of a variable that is not one of those below."""

NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TMPDIR", "SSH_AUTH_SOCK"),
        *("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH"),
        *("STATE_DIRECTORY", "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "INVOCATION_ID"),
    }
)
PREFIXES = ("RAY_", "RAYFWD_", "GRPC_", "NCCL_", "GLOO_", "CUDA_")
"""Environment variables that bear on rayfwd or Ray."""


def matters(name: str) -> bool:
    return name.upper() in NAMES or name.startswith(PREFIXES)


def variable(name: str, value: str) -> str:
    """The value as it may be shown."""
    if names_a_secret(name):
        return REDACTED
    if not matters(name):
        return SET
    # With its name, which says whether what looks random is an id that may be shown.
    return redact_text(f"{name}={value}").removeprefix(f"{name}=")


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter."""
    return {name: variable(name, value) for name, value in sorted(env.items()) if matters(name)}


def configuration(data: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration file's content as it may be shown."""
    out: dict[str, Any] = _shown("", dict(data))
    ray = data.get("ray")
    if isinstance(ray, Mapping):
        env, arguments = ray.get("env"), ray.get("extra_args")
        if isinstance(env, Mapping):
            out["ray"]["env"] = {str(n): variable(str(n), str(v)) for n, v in env.items()}
        if isinstance(arguments, list):
            out["ray"]["extra_args"] = [redact_text(w) for w in redact_command(map(str, arguments))]
    return out


def _shown(name: str, value: Any) -> Any:
    if names_a_secret(name):
        return REDACTED
    if isinstance(value, Mapping):
        return {str(n): _shown(str(n), v) for n, v in value.items()}
    if isinstance(value, list):
        return [_shown("", v) for v in value]
    return redact_text(value) if isinstance(value, str) else value


def known(data: Mapping[str, Any], env: Mapping[str, str], others: Iterable[str]) -> set[str]:
    """The secrets that are known: of the configuration, of the environment, and `others`."""
    found = {value for name, value in env.items() if names_a_secret(name)}
    found |= {secret for value in env.values() for secret in secrets_in(value)}
    found |= set(_of_configuration("", data))
    ray = data.get("ray")
    if isinstance(ray, Mapping):
        theirs, arguments = ray.get("env"), ray.get("extra_args")
        if isinstance(theirs, Mapping):
            found |= {str(value) for name, value in theirs.items() if not matters(str(name))}
        if isinstance(arguments, list):
            found |= secrets_in(" ".join(map(str, arguments)))
    return {s for one in (*found, *others) for s in [one.strip()] if len(s) >= SHORTEST_SECRET}


def _of_configuration(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            # All that is below a name of a secret is one.
            yield from _of_configuration(name if names_a_secret(name) else str(key), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _of_configuration(name, inner)
    elif names_a_secret(name):
        yield str(value)
    else:
        yield from secrets_in(str(value))


def scrub(text: str, secrets: Iterable[str]) -> str:
    """`text` without these secrets, and without what looks like one."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return redact_text(text)


def scrub_all(value: Any, secrets: Collection[str]) -> Any:
    """The same of every text in what is to be JSON; what a name gives away is left out."""
    if isinstance(value, Mapping):
        return {
            scrub(str(name), secrets): REDACTED
            if names_a_secret(str(name))
            else scrub_all(inner, secrets)
            for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrub_all(inner, secrets) for inner in value]
    return scrub(value, secrets) if isinstance(value, str) else value
