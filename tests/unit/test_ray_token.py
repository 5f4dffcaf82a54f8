"""Ray's token: when there is one, which it is, where it is put, and that it is told nowhere."""

from __future__ import annotations

import http.server
import json
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayfwd import codes
from rayfwd.cluster.plan import head_plan
from rayfwd.config import parse
from rayfwd.problems import ProblemError
from rayfwd.ray import commandline, token
from rayfwd.ray.commandline import RayPlan
from rayfwd.ray.token import RayAuth
from rayfwd.session.target import Target
from rayfwd.transport.endpoints import Endpoint
from tests.unit.cluster import free_place
from tests.unit.loops import run

OFF = RayAuth("off")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def own_file(home: Path, text: str) -> Path:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("setting", "version", "env", "file", "mode"),
    [
        ("auto", "2.9.3", {}, True, "off"),
        ("auto", "2.51.1", {"RAY_AUTH_MODE": "token"}, True, "off"),
        ("auto", "2.52.0", {}, False, "off"),
        ("auto", "2.60.0", {}, False, "off"),
        ("auto", "2.60.0", {}, True, "token"),
        ("auto", "2.60.0", {"RAY_AUTH_MODE": "TOKEN"}, False, "token"),
        ("auto", "2.60.0", {"RAY_AUTH_MODE": "disabled"}, True, "off"),
        ("auto", "2.61.0", {}, False, "token"),
        ("auto", "2.61.0", {"RAY_AUTH_MODE": "disabled"}, False, "off"),
        ("auto", None, {}, True, "off"),
        ("token", "2.60.0", {}, False, "token"),
        ("token", "2.60.0", {"RAY_AUTH_MODE": "disabled"}, False, "token"),
        ("token", None, {}, False, "token"),
        ("off", "2.61.0", {"RAY_AUTH_MODE": "token"}, True, "off"),
    ],
)
def test_when_there_is_a_token(
    home: Path,
    state: Path,
    setting: str,
    version: str | None,
    env: dict[str, str],
    file: bool,
    mode: str,
) -> None:
    if file:
        own_file(home, "the user's\n")
    auth = token.decide(setting, version, {"HOME": str(home), **env}, state)
    assert auth.mode == mode
    if mode == "token":
        assert auth.token == "the user's" if file else len(auth.token) == 64
        assert token.kept_auth(state) == auth
        for name in (token.RECORD, token.TOKEN_FILE):
            assert stat.S_IMODE((state / name).stat().st_mode) == 0o600
        set_ = token.environment(auth, state)
        assert auth.token not in set_.values()
        assert token.read_token(set_) == auth.token


def test_a_ray_that_knows_none_is_not_started_without(home: Path, state: Path) -> None:
    with pytest.raises(ProblemError) as caught:
        token.decide("token", "2.40.0", {"HOME": str(home)}, state)
    assert caught.value.problem.code == codes.RAY_AUTH_UNSUPPORTED


def test_it_holds_once_it_is_decided(home: Path, state: Path) -> None:
    """A file that comes or goes later would else restart Ray, and its jobs, with the daemon."""
    env = {"HOME": str(home)}
    assert token.decide("auto", "2.60.0", env, state) == OFF
    file = own_file(home, "later")
    assert token.decide("auto", "2.60.0", env, state) == OFF
    first = token.decide("token", "2.60.0", env, state)
    assert first.token == "later"
    file.write_text("later still")
    assert token.decide("token", "2.60.0", env, state) == first
    assert token.decide("auto", "2.60.0", env, state) == first
    explicit = {**env, "RAY_AUTH_TOKEN": "given"}
    assert token.decide("token", "2.60.0", explicit, state).token == "given"


def test_drivers_find_it_and_their_own_files_are_left_alone(home: Path, state: Path) -> None:
    env = {"HOME": str(home)}
    auth = token.decide("token", "2.60.0", env, state)
    assert token.provide(auth, env, state) is None
    file = home / ".ray" / "auth_token"
    assert file.read_text().strip() == auth.token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    # The head has another one now: what we gave is renewed.
    other = RayAuth("token", "another")
    token.keep(other, state)
    assert token.provide(other, env, state) is None
    assert file.read_text().strip() == "another"

    file.write_text("mine")
    problem = token.provide(other, env, state)
    assert problem is not None
    assert problem.code == codes.RAY_TOKEN_FILE_DIFFERS
    assert "another" not in str(problem).replace("another token", "")
    assert token.provide(OFF, env, state) is None
    assert file.read_text() == "mine"


def test_what_was_given_is_taken_away_when_it_is_off(home: Path, state: Path) -> None:
    env = {"HOME": str(home)}
    token.provide(token.decide("token", "2.60.0", env, state), env, state)
    off = token.decide("off", "2.60.0", env, state)
    assert token.provide(off, env, state) is None
    assert not (home / ".ray" / "auth_token").exists()


@pytest.mark.parametrize("whose", ["ours", "the user's", "another"])
def test_another_takes_its_place(home: Path, state: Path, whose: str) -> None:
    """Also in a file that the user made, where that holds the token which is no good any more."""
    env = {"HOME": str(home)}
    if whose == "the user's":
        own_file(home, "the user's\n")
    old = token.decide("token", "2.60.0", env, state)
    token.provide(old, env, state)
    file = home / ".ray" / "auth_token"
    if whose == "another":
        file.write_text("another")
    new = token.turn_over(env, state)
    assert new.mode == "token"
    assert new.token != old.token
    assert token.kept_auth(state) == new
    assert token.read_token(token.environment(new, state)) == new.token
    assert file.read_text().strip() == ("another" if whose == "another" else new.token)
    assert token.decide("token", "2.60.0", env, state) == new
    assert token.provide(new, env, state) is None or whose == "another"


def test_one_that_is_named_is_not_ours() -> None:
    assert token.named_by({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""}) is None
    assert token.named_by({"RAY_AUTH_TOKEN": "x"}) == "RAY_AUTH_TOKEN"
    assert token.named_by({"RAY_AUTH_TOKEN_PATH": "/x"}) == "RAY_AUTH_TOKEN_PATH"


def test_a_disk_that_is_full_leaves_the_old_one(
    home: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"HOME": str(home)}
    old = token.decide("token", "2.60.0", env, state)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token, "replace_file", full)
    with pytest.raises(ProblemError) as caught:
        token.turn_over(env, state)
    assert caught.value.problem.code == codes.RAY_AUTH_UNWRITABLE
    assert token.decide("token", "2.60.0", env, state) == old


def test_a_home_that_cannot_be_written(home: Path, state: Path) -> None:
    (home / ".ray").write_text("a file")
    problem = token.provide(RayAuth("token", "x"), {"HOME": str(home)}, state_made(state))
    assert problem is not None
    assert problem.code == codes.RAY_TOKEN_FILE_UNWRITABLE


def state_made(state: Path) -> Path:
    state.mkdir()
    return state


@pytest.mark.parametrize(
    "data",
    [
        *(None, [], "token", {}, {"mode": "maybe"}, {"mode": ["token"]}),
        *({"mode": "token", "token": t} for t in (None, "", 5, "a b\n", " a", "ä", "x" * 513)),
    ],
)
def test_what_comes_over_the_link_is_checked(data: Any) -> None:
    with pytest.raises(ValueError, match="ray_auth"):
        RayAuth.from_wire(data)


def test_it_is_not_shown() -> None:
    auth = RayAuth("token", "sesame")
    assert "sesame" not in repr(auth)
    assert "sesame" not in auth.fingerprint
    assert RayAuth.from_wire(auth.to_wire()) == auth


def test_ray_is_started_anew_with_another_token_only() -> None:
    services = {"gcs": 6379, "dashboard": 8265, "client": 10001}
    own = head_plan("h", "127.77.0.0/16", 20000, 8, services)
    plan = RayPlan(own, own, parse({"role": "head"}).ray, 120.0, "127.77.0.0/16")

    def digest(auth: RayAuth | None) -> str:
        return commandline.digest(plan, auth)

    assert digest(None) == digest(OFF)
    assert digest(OFF) != digest(RayAuth("token", "a")) != digest(RayAuth("token", "b"))


def test_the_environment_of_ray(state: Path) -> None:
    services = {"gcs": 6379, "dashboard": 8265, "client": 10001}
    own = head_plan("h", "127.77.0.0/16", 20000, 8, services)
    plan = RayPlan(own, own, parse({"role": "head"}).ray, 120.0, "127.77.0.0/16")
    outside = {"RAY_AUTH_TOKEN": "the daemon's own", "RAY_AUTH_MODE": "disabled"}
    auth = token.environment(RayAuth("token", "x"), state)
    env = commandline.start_environment(plan, outside, auth)
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_AUTH_TOKEN_PATH"] == str(state / token.TOKEN_FILE)
    assert "RAY_AUTH_TOKEN" not in env
    line = commandline.by_hand(plan, None, auth)
    assert f"RAY_AUTH_TOKEN_PATH={state / token.TOKEN_FILE}" in line
    env = commandline.start_environment(plan, outside)
    assert env["RAY_AUTH_TOKEN"] == "the daemon's own"


@contextmanager
def dashboard(mode: str | None, good: str = "") -> Iterator[tuple[str, int]]:
    """Answers as Ray 2.60's does; None: as one that is older."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if mode is None:
                self.send_error(404)
            else:
                self._answer(200, {"authentication_mode": mode})

        def do_POST(self) -> None:
            fits = self.headers["Authorization"] == f"Bearer {good}"
            self._answer(200 if fits else 403, {})

        def _answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None: ...

    with http.server.HTTPServer(free_place(), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield str(server.server_address[0]), int(server.server_address[1])
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("mode", "env", "code"),
    [
        ("token", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "good"}, None),
        ("token", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "bad"}, "ray_token_wrong"),
        ("token", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "good"}, "ray_token_missing"),
        ("token", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/no"}, "ray_token_missing"),
        ("token", {}, "ray_token_missing"),
        ("disabled", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "good"}, "ray_auth_differs"),
        ("disabled", {"RAY_AUTH_MODE": "disabled"}, None),
        ("disabled", {}, None),
        (None, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "good"}, None),
    ],
)
def test_the_heads_ray_is_asked(mode: str | None, env: dict[str, str], code: str | None) -> None:
    async def body() -> None:
        with dashboard(mode, "good") as (host, port):
            problem = await token.check(Endpoint(Target(host, port)), env)
        assert (problem.code.name if problem else None) == code
        place = free_place()
        assert await token.check(Endpoint(place), env) is None, "nobody answers: nothing is known"

    run(body)
