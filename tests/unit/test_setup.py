"""`rayfwd init`: the plan, its texts, and what is made of it in a home of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rayfwd.cli import init, init_answers, init_words, main
from rayfwd.config import load, parse
from rayfwd.doctor.unit_checks import SERVICE
from rayfwd.problems import ProblemError
from rayfwd.ray import token
from rayfwd.setup import places, texts, units
from rayfwd.setup.apply import Applied, apply, take_away
from rayfwd.setup.manifest import Manifest
from rayfwd.setup.planner import plan
from rayfwd.setup.request import MAN_PAGES, Layout, Role, SetupRequest, system_layout, user_layout
from rayfwd.setup.steps import Directory, File, Key, Member, Symlink, SystemGroup, User, public_key
from rayfwd.setup.survey import Survey, probe
from rayfwd.system.paths import belongs_to_root

COMMAND, PYTHON = "/srv/rayfwd/bin/rayfwd", "/srv/rayfwd/bin/python"
HOST_KEY = "head.example.org ssh-ed25519 AAAA\n"


def head() -> SetupRequest:
    return SetupRequest("head", "h", "ann", Path("/home/ann"), False, "/srv/ray/bin/ray")


def worker(home: Path = Path("/home/ann")) -> SetupRequest:
    return SetupRequest(
        "worker",
        "w1",
        "ann",
        home,
        False,
        "/srv/ray/bin/ray",
        head="ray@head.example.org:2222",
        head_command="/opt/rayfwd/bin/rayfwd",
        host_key=HOST_KEY,
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


@pytest.fixture
def layout(home: Path) -> Layout:
    return user_layout(home, 1000, COMMAND, PYTHON, None)


@pytest.mark.parametrize("auth", ["token", "off", None])
def test_a_head_asks_for_a_token_where_that_is_chosen(auth: str | None) -> None:
    layout = system_layout("/opt/rayfwd/bin/rayfwd", "/opt/rayfwd/bin/python")
    made = tomllib.loads(texts.config_text(replace(head(), auth=auth), layout))
    assert made["ray"].get("auth") == auth


@pytest.mark.parametrize(
    ("role", "version", "others", "before", "chosen"),
    [
        ("head", "2.60.0", ["ann"], None, "token"),
        ("head", "2.60.0", [], None, None),
        ("head", "2.61.0", ["ann"], None, None),
        ("head", "2.40.0", ["ann"], None, None),
        ("worker", "2.60.0", ["ann"], None, None),
        ("head", "2.60.0", ["ann"], {}, None),
        ("head", "2.60.0", [], {"auth": "token"}, "token"),
        ("head", "2.60.0", ["ann"], {"auth": "auto"}, "auto"),
    ],
)
def test_when_init_chooses_a_token(
    monkeypatch: pytest.MonkeyPatch,
    role: Role,
    version: str,
    others: list[str],
    before: dict[str, str] | None,
    chosen: str | None,
) -> None:
    """What is in a file that is there stays as it is."""
    monkeypatch.setattr(init_answers, "who_else_logs_in", lambda uid: others)
    asks = token.asks_by_itself(version, {"HOME": "/nonexistent"})
    seen = Survey("/r/ray", f"Ray {version}", None, asks)
    there = None if before is None else parse({"role": "head", "ray": before})
    assert init_answers.auth(role, there, seen, "root") == chosen


def test_the_machines_service() -> None:
    layout = replace(system_layout(COMMAND, PYTHON), overlay=True)
    steps = plan(worker(), layout, units.shipped())
    assert steps[:2] == (SystemGroup("rayfwd"), Member("ann", "rayfwd"))
    assert steps[2] == Directory(Path("/etc/rayfwd"), "root", "rayfwd", 0o750)
    assert isinstance(steps[3], Key)
    assert (steps[3].path, steps[3].owner) == (Path("/etc/rayfwd/id_ed25519"), "ann")
    files = {step.path: step for step in steps if isinstance(step, File)}
    config = files.pop(Path("/etc/rayfwd.toml"))
    assert (config.owner, config.group, config.mode) == ("root", "rayfwd", 0o640)
    assert files.pop(Path("/etc/rayfwd/known_hosts")).text == HOST_KEY
    assert {p.parent for p in files} == {Path("/etc/systemd/system")}
    assert {p.name for p in files} == set(units.shipped())
    assert all(step.owner == "root" and step.mode == 0o644 for step in files.values())


def test_root_runs_nothing_that_another_user_could_change() -> None:
    """Without the overlay there is neither its unit nor a word of it."""
    steps = plan(worker(), system_layout(COMMAND, PYTHON), units.shipped())
    made = {step.path.name: step.text for step in steps if isinstance(step, File)}
    assert texts.OVERLAY_SERVICE not in made
    settings = [line for line in made[SERVICE].splitlines() if not line.startswith("#")]
    assert not [s for s in settings if texts.OVERLAY_SERVICE in s or texts.OVERLAY_VARIABLE in s]


def test_what_belongs_to_root(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root: nothing that is made here is root's")
    bin_ = Path("/usr/local/sbin") / f"rayfwd-test-{os.getpid()}"
    bin_.mkdir()
    try:
        good, link = bin_ / "rayfwd", tmp_path / "rayfwd"
        good.write_text("")
        link.symlink_to(good)
        assert belongs_to_root(good)
        assert belongs_to_root(link), "root's, below a sticky directory"
        good.chmod(0o666)
        assert not belongs_to_root(link)
        good.chmod(0o755)
        bin_.chmod(0o777)
        assert not belongs_to_root(good)
        bin_.chmod(0o755)
        os.chown(bin_, 1000, 1000)
        assert not belongs_to_root(link)
        assert not belongs_to_root(bin_ / "absent")
    finally:
        shutil.rmtree(bin_)


def test_a_user_that_is_to_be_made_comes_after_its_group() -> None:
    wanted = replace(head(), user="rayfwd", home=Path("/var/lib/rayfwd"), user_is_new=True)
    steps = plan(wanted, system_layout(COMMAND, PYTHON), units.shipped())
    assert steps[:2] == (SystemGroup("rayfwd"), User("rayfwd", wanted.home, "rayfwd"))
    assert not any(isinstance(step, Key | Directory) for step in steps)


def test_a_user_without_root_makes_nothing_outside_of_home(layout: Layout, home: Path) -> None:
    for step in plan(worker(home), layout, units.shipped()):
        assert isinstance(step, Directory | File | Key)
        assert step.path.is_relative_to(home)
        assert step.owner is None


@pytest.fixture
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The man pages of an environment."""
    made = tmp_path_factory.mktemp("env") / "share" / "man"
    for page in MAN_PAGES:
        (made / page).parent.mkdir(parents=True)
        (made / page).write_text(".TH RAYFWD")
    return made


def test_the_machines_man_pages(pages: Path) -> None:
    layout = replace(system_layout(COMMAND, PYTHON), pages=pages)
    man = Path("/usr/local/share/man")
    steps = plan(head(), layout, units.shipped())
    directories = [Directory(man / name, None, None, 0o755) for name in ("man1", "man5")]
    links = [Symlink(man / page, pages / page) for page in MAN_PAGES]
    assert list(steps[-4:]) == [*directories, *links]


def test_a_users_man_pages_come_and_go(layout: Layout, home: Path, pages: Path) -> None:
    layout = replace(layout, pages=pages)
    dry, _ = make(worker(home), layout, dry=True)
    outcome, _ = make(worker(home), layout)
    assert outcome.changed == dry.changed, "each directory once"
    for page in MAN_PAGES:
        assert (home / ".local/share/man" / page).read_text() == ".TH RAYFWD"
    assert make(worker(home), layout)[0] == Applied((), ())
    take_away(Manifest(layout.manifest), layout, False, False, Told())
    assert tree(home) == {}


def test_another_environments_man_pages(layout: Layout, home: Path, pages: Path) -> None:
    """Ours follow the environment, somebody else's stay, and so does what leads there already."""
    page, other = (layout.man / page for page in MAN_PAGES)
    make(worker(home), replace(layout, pages=Path("/old")))
    other.unlink()
    other.symlink_to("/elsewhere")
    outcome, _ = make(worker(home), replace(layout, pages=pages))
    assert outcome == Applied((str(page),), (str(other),))
    assert page.read_text() == ".TH RAYFWD"
    told = Told()
    take_away(Manifest(layout.manifest), layout, False, False, told)
    assert ("left (it points elsewhere now)", str(other)) in told.lines
    assert other.is_symlink()
    assert not page.is_symlink()

    (pages.parent / "same").symlink_to(pages)
    page.parent.mkdir(exist_ok=True)
    page.symlink_to(pages.parent / "same" / MAN_PAGES[0])  # as pipx does
    outcome, _ = make(worker(home), replace(layout, pages=pages))
    assert str(page) not in (*outcome.changed, *outcome.kept)


@pytest.mark.parametrize(
    ("prefix", "man", "linked"),
    [
        ("opt", "man", True),
        ("opt", "opt/share/man", False),  # there already
        ("opt", "closed/man", False),
        ("none", "man", False),
    ],
)
def test_which_pages_are_to_be_linked(
    prefix: str, man: str, linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "opt" / "share" / "man" / MAN_PAGES[0]
    page.parent.mkdir(parents=True)
    page.touch()
    (tmp_path / "closed").mkdir()
    closed = str(tmp_path / "closed")
    monkeypatch.setattr(os, "access", lambda path, _: str(path) != closed)
    found = places._pages(tmp_path / prefix, tmp_path / man)
    assert found == (tmp_path / "opt" / "share" / "man" if linked else None)


def test_a_configuration_by_hand_gets_no_key() -> None:
    steps = plan(replace(worker(), by_hand=True), system_layout(COMMAND, PYTHON), units.shipped())
    assert not any(isinstance(step, Key | Directory) for step in steps)
    assert not any(step.id.endswith("known_hosts") for step in steps)


ODD = 'a "b" \\c\x7f\t'
"""Characters of a path that TOML wants escaped."""


@pytest.mark.parametrize(
    "wanted",
    [
        head(),
        replace(head(), logins=("bob", "c d")),
        worker(),
        replace(worker(), ray=f"/opt/{ODD}/ray"),
    ],
)
def test_the_configuration_is_valid_and_says_what_was_wished(
    wanted: SetupRequest, layout: Layout, tmp_path: Path
) -> None:
    file = tmp_path / "made.toml"
    file.write_text(texts.config_text(wanted, layout))
    config = load(file)
    assert (config.role, config.name) == (wanted.role, wanted.name)
    assert (config.state_dir, config.runtime_dir) == (layout.state, layout.runtime)
    assert config.ray.command == wanted.ray
    assert config.hub.users == wanted.logins
    if config.head is not None:
        assert config.head.ssh == wanted.head
        assert (config.head.identity, config.head.known_hosts) == (
            layout.identity,
            layout.known_hosts,
        )
        assert (config.head.via, config.head.attach_command) == (
            "exec",
            "/opt/rayfwd/bin/rayfwd attach",
        )


def test_any_path_comes_back_from_the_configuration(layout: Layout) -> None:
    odd = replace(layout, state=Path("/s") / ODD)
    wanted = replace(worker(), identity=Path("/i") / ODD, head_command=f"/opt/{ODD}/rayfwd")
    made = tomllib.loads(texts.config_text(wanted, odd))
    assert made["state_dir"] == f"/s/{ODD}"
    assert made["head"]["identity"] == f"/i/{ODD}"
    assert shlex.split(made["head"]["attach_command"]) == [f"/opt/{ODD}/rayfwd", "attach"]


def test_the_line_for_authorized_keys() -> None:
    assert texts.authorized_line("/opt/rayfwd/bin/rayfwd", "ssh-ed25519 AAAA rayfwd w1\n") == (
        'restrict,command="/opt/rayfwd/bin/rayfwd attach" ssh-ed25519 AAAA rayfwd w1'
    )
    assert '"\'/a \\"b/rayfwd\' attach"' in texts.authorized_line('/a "b/rayfwd', "k")


def test_known_hosts_names_a_port_that_is_not_the_usual() -> None:
    assert texts.known_hosts_line("h", 22, "ssh-ed25519 AAAA c") == "h ssh-ed25519 AAAA\n"
    assert texts.known_hosts_line("h", 2222, "ssh-ed25519 AAAA") == "[h]:2222 ssh-ed25519 AAAA\n"


class TestUnits:
    """Held to the units as they are shipped: a change there that `init` misses fails here."""

    def settings(self, text: str) -> list[str]:
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    def test_of_the_machine(self) -> None:
        layout = replace(system_layout(COMMAND, PYTHON), overlay=True)
        for name, shipped in units.shipped().items():
            made = texts.unit_text(name, shipped, "ann", layout)
            assert "/opt/rayfwd" not in made
            expected = [
                line.replace("/opt/rayfwd/bin/", "/srv/rayfwd/bin/")
                .replace("User=ray", "User=ann")
                .replace("--user ray", "--user ann")
                for line in self.settings(shipped)
            ]
            assert self.settings(made) == expected
            assert "`rayfwd uninstall`" in made

    def test_of_a_user(self, layout: Layout) -> None:
        for name, shipped in units.shipped().items():
            made = texts.unit_text(name, shipped, "ann", layout)
            for word in ("/opt/", "User=", "/run/", "Protect", "network-online", "multi-user"):
                assert word not in "\n".join(self.settings(made)), (name, word)
            if name == SERVICE:
                assert f"ExecStart={COMMAND} --config {layout.config} run" in made
                assert "WantedBy=default.target" in made
                for line in ("Wants=rayfwd-ray.service", "After=basic.target rayfwd-ray.service"):
                    assert line in made.splitlines()
                assert "DefaultDependencies=no\nRequires=basic.target\n" in made
                assert "NoNewPrivileges=yes" in made

    def test_ray_may_what_a_login_may(self) -> None:
        """No setting that implies NoNewPrivileges= or a list of devices (systemd.exec(5))."""
        text = "\n".join(self.settings(units.shipped()["rayfwd-ray.service"]))
        implied = (
            r"(?m)^(NoNewPrivileges|Private|Protect(?!System=full)|Restrict|SystemCall|Lock|Memory)"
        )
        assert not re.search(implied, text)
        assert "Device" not in text

    def test_paths_with_anything_in_them(self) -> None:
        layout = system_layout('/a b/50%/"/rayfwd', PYTHON)
        made = texts.unit_text(SERVICE, units.shipped()[SERVICE], "ann", layout)
        assert 'ExecStart="/a b/50%%/\\"/rayfwd" run' in made

    def test_another_file_is_named(self) -> None:
        layout = system_layout(COMMAND, PYTHON, Path("/srv/r.toml"))
        made = texts.unit_text(SERVICE, units.shipped()[SERVICE], "ann", layout)
        assert f"ExecStart={COMMAND} --config /srv/r.toml run" in made

    def test_a_unit_that_has_changed_is_not_guessed_at(self) -> None:
        with pytest.raises(ValueError, match="ExecStart=/bin/x"):
            texts.unit_text("u", "[Service]\nExecStart=/bin/x\n", "ann", system_layout("r", "p"))


@pytest.mark.parametrize(
    ("role", "had_overlay", "level", "said", "command"),
    [
        ("head", False, "auto", "ends every job of the cluster", "systemctl restart rayfwd"),
        ("worker", False, "auto", "No other node's is.", "systemctl restart rayfwd"),
        ("head", False, "listeners", "", "systemctl restart rayfwd"),
        ("head", True, "auto", "", "systemctl restart rayfwd-net rayfwd"),
    ],
)
def test_what_is_left_to_do_where_the_service_runs(
    role: str,
    had_overlay: bool,
    level: str,
    said: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the restart costs is said before it: on the head that is all of Ray's state."""
    layout = replace(system_layout("/opt/rayfwd/bin/rayfwd", "/opt/x/python"), overlay=True)
    before = parse({"role": "head", "name": "h", "network": {"level": level}})
    init_words.print_restart(layout, had_overlay, before, role)
    out = capsys.readouterr().out
    assert ("This node's Ray is then restarted once" in out) is bool(said)
    assert said in " ".join(out.split())
    assert out.splitlines()[-1].strip() == command


def test_an_aliass_login_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the SSH configuration, and nobody is dialled for it."""
    monkeypatch.setenv("HOME", str(home))
    (home / ".ssh").mkdir()
    (home / ".ssh" / "config").write_text("Host head-node\n  HostName 127.0.0.1\n  User eve\n")
    for head, login in (("head-node", "eve"), ("bob@head-node:2222", "bob")):
        seen = asyncio.run(probe(None, head, None, False))
        assert (seen["login"], "host_key" in seen) == (login, False)
    (home / ".ssh" / "config").write_text("Port none\n")
    assert "login" not in asyncio.run(probe(None, "head-node", None, False))


def test_a_key_is_read_where_its_owner_can(tmp_path: Path) -> None:
    path = tmp_path / "id"
    assert asyncio.run(probe(None, None, str(path), False))["public_key"] is None
    Key(path, None, "w1").do()
    found = asyncio.run(probe(None, None, str(path), False))["public_key"]
    assert found == (tmp_path / "id.pub").read_text().strip()


class Told:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, came: str, thing: str) -> None:
        self.lines.append((came, thing))


def make(wanted: SetupRequest, layout: Layout, dry: bool = False) -> tuple[Applied, Told]:
    told = Told()
    steps = plan(wanted, layout, units.shipped())
    return apply(steps, Manifest(layout.manifest), layout, dry, told), told


def tree(home: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(home)): (p.lstat().st_mode, p.read_bytes() if p.is_file() else b"")
        for p in home.rglob("*")
    }


def test_a_dry_run_says_what_a_run_does_and_changes_nothing(layout: Layout, home: Path) -> None:
    dry, told_dry = make(worker(home), layout, dry=True)
    assert tree(home) == {}
    outcome, told = make(worker(home), layout)
    assert outcome.changed == dry.changed
    assert [thing for _, thing in told.lines] == [thing for _, thing in told_dry.lines]
    assert {came for came, _ in told_dry.lines} == {"to create"}


def test_made_once_and_taken_away_whole(layout: Layout, home: Path) -> None:
    (home / ".config").mkdir(mode=0o755)
    before = tree(home)
    make(worker(home), layout)
    assert stat.S_IMODE(layout.config.stat().st_mode) == 0o600
    assert stat.S_IMODE(layout.identity.stat().st_mode) == 0o600
    assert (public_key(layout.identity) or "").startswith("ssh-ed25519 ")
    load(layout.config)
    made = tree(home)
    again, told = make(worker(home), layout)
    assert again == Applied((), ())
    assert {came for came, _ in told.lines} == {"exists"}
    assert tree(home) == made

    dry = Told()
    assert take_away(Manifest(layout.manifest), layout, True, False, dry) == ()
    assert tree(home) == made
    gone = Told()
    assert take_away(Manifest(layout.manifest), layout, False, False, gone) == ()
    assert tree(home) == before
    assert [thing for _, thing in gone.lines] == [thing for _, thing in dry.lines]


def test_what_was_edited_is_never_overwritten_nor_removed(layout: Layout, home: Path) -> None:
    make(worker(home), layout)
    edited = layout.config.read_text() + "num_cpus = 3\n"
    layout.config.write_text(edited)
    outcome, _ = make(replace(worker(home), name="other"), layout)
    assert outcome == Applied((), (str(layout.config),))
    assert layout.config.read_text() == edited
    assert take_away(Manifest(layout.manifest), layout, False, False, Told()) == (
        str(layout.config),
    )
    assert layout.config.read_text() == edited
    assert not layout.identity.exists()
    assert not list(layout.units.glob("*"))
    assert take_away(Manifest(layout.manifest), layout, False, True, Told()) == ()
    assert tree(home) == {}


def test_what_was_not_edited_follows_the_wishes(layout: Layout, home: Path) -> None:
    make(worker(home), layout)
    outcome, told = make(replace(worker(home), name="other"), layout)
    assert outcome.changed == (str(layout.config),)
    assert ("renewed", str(layout.config)) in told.lines
    assert load(layout.config).name == "other"
    take_away(Manifest(layout.manifest), layout, False, False, Told())
    assert tree(home) == {}


def test_a_key_that_was_moved_away_is_made_anew(layout: Layout, home: Path) -> None:
    make(worker(home), layout)
    first = public_key(layout.identity)
    layout.identity.unlink()
    outcome, _ = make(worker(home), layout)
    assert outcome.changed == (str(layout.identity),)
    assert public_key(layout.identity) != first
    take_away(Manifest(layout.manifest), layout, False, False, Told())
    assert tree(home) == {}


def test_somebody_elses_file_is_kept_and_not_ours_to_remove(layout: Layout, home: Path) -> None:
    layout.units.mkdir(parents=True)
    mine = layout.units / SERVICE
    mine.write_text("[Service]\n")
    outcome, _ = make(worker(home), layout)
    assert outcome.kept == (str(mine),)
    take_away(Manifest(layout.manifest), layout, False, True, Told())
    assert mine.read_text() == "[Service]\n"


def test_a_run_that_failed_midway_goes_on_and_is_taken_away(layout: Layout, home: Path) -> None:
    (home / ".config").mkdir()
    (home / ".config" / "systemd").write_text("in the way")
    with pytest.raises(ProblemError, match="systemd exists, but is not a directory"):
        make(worker(home), layout)
    (home / ".config" / "systemd").unlink()
    make(worker(home), layout)
    take_away(Manifest(layout.manifest), layout, False, False, Told())
    assert set(tree(home)) == {".config"}


def test_the_state_stays_unless_purged(layout: Layout, home: Path) -> None:
    make(worker(home), layout)
    (layout.state / "plan.json").write_text("{}")
    take_away(Manifest(layout.manifest), layout, False, False, Told())
    assert (layout.state / "plan.json").exists()
    assert not layout.manifest.exists()
    make(worker(home), layout)
    take_away(Manifest(layout.manifest), layout, False, True, Told())
    assert not layout.state.exists()


def test_what_other_clusters_have_below_it_stays_in_any_case(layout: Layout, home: Path) -> None:
    """Of `rayfwd join --cluster blue`, which may run; of one that has ended nothing is there."""
    make(worker(home), layout)
    theirs = [layout.state / "clusters/blue/node_key", layout.state / "run/clusters/blue/hub.sock"]
    for path in (*theirs, layout.state / "plan.json", layout.state / "run/hub.sock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    told = Told()
    take_away(Manifest(layout.manifest), layout, False, True, told)
    left = [path for path in layout.state.rglob("*") if not path.is_dir()]
    assert set(left) == set(theirs)
    assert ("kept", f"{layout.state}/clusters (of other clusters)") in told.lines
    assert not layout.manifest.exists()


@pytest.mark.parametrize(
    "text", ["", "{", '{"schema": 9, "made": []}', '{"schema": 1, "made": [3]}']
)
def test_a_manifest_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "m").write_text(text)
    with pytest.raises(ProblemError, match="cannot be read"):
        Manifest(tmp_path / "m")


def test_a_manifest_that_others_may_write_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text(json.dumps({"schema": 1, "made": []}))
    path.chmod(0o666)
    with pytest.raises(ProblemError, match="other users can write to it"):
        Manifest(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ProblemError, match="other users can write to it"):
        Manifest(tmp_path / "link")


class TestTheCommand:
    @pytest.fixture(autouse=True)
    def _as_somebody(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """All its layout below `home`, whoever runs the test, and nobody at the terminal."""
        from rayfwd.cli import uninstall

        found = user_layout(home, os.geteuid(), COMMAND, PYTHON, None)
        for module in (init, uninstall):
            monkeypatch.setattr(module, "find_places", lambda _: found)
        with open(os.devnull) as nobody:
            monkeypatch.setattr("sys.stdin", nobody)
            yield

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["worker"], "--head: must be given, as there is no terminal to ask"),
            (["worker", "--head", "a b"], "head.ssh"),
            (["worker", "--head", "h", "--login", "x"], "--login: only for a head"),
            (["head", "--fingerprint", "SHA256:x"], "--fingerprint: only for a worker"),
            (["head", "--name", "no good"], "--name no good"),
        ],
    )
    def test_mistakes(
        self, argv: list[str], said: str, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["init", *argv]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert "Traceback" not in err
        assert tree(home) == {}

    def test_nothing_to_take_away(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["uninstall"]) == 0
        assert "nothing to remove" in capsys.readouterr().out


def test_a_worker_that_is_dialled_has_no_key_and_is_told_both_lines() -> None:
    request = replace(worker(), head=None, host_key=None)
    system = system_layout(COMMAND, PYTHON)
    steps = plan(request, system, units.shipped())
    assert not any(isinstance(step, Key) for step in steps)
    config = tomllib.loads(texts.config_text(request, system))
    assert config["head"] == {"dialled": True}
    parse(config)
    section = tomllib.loads(texts.dial_section(request, system, "gpu-1.example.org"))
    head = parse({"role": "head", "name": "h", **section})
    assert head.hub.dial[0].called == request.name
    assert head.hub.dial[0].via == "exec"


@pytest.mark.parametrize("dialled", [False, True])
def test_a_direct_way_has_a_section_and_a_key(dialled: bool) -> None:
    """Also where the head dials this worker, which then needs a key for the other one alone."""
    layout = system_layout(COMMAND, PYTHON)
    asked = replace(worker(), direct=(("gpu-2", "ray@gpu-2.example.org"),))
    request = replace(asked, head=None, host_key=None) if dialled else asked
    assert any(isinstance(step, Key) for step in plan(request, layout, units.shipped()))
    config = tomllib.loads(texts.config_text(request, layout))
    (direct,) = parse(config).direct
    assert (direct.node, direct.ssh, direct.via) == ("gpu-2", "ray@gpu-2.example.org", "exec")
    assert direct.identity == layout.identity
    assert direct.attach_command == f"{COMMAND} attach --peer"
    assert texts.authorized_line(COMMAND, "ssh-ed25519 AAAA x\n", peer=True) == (
        f'restrict,command="{COMMAND} attach --peer" ssh-ed25519 AAAA x'
    )


@pytest.mark.parametrize(
    ("request_", "peers", "lines"),
    [
        (head(), False, ["this machine: the port of its sshd, for the workers"]),
        (
            replace(head(), meet="ray@meet:2222"),
            False,
            ["this machine: nothing", "meet: port 2222, for this machine"],
        ),
        (
            replace(worker(), head="ray@head.example.org"),
            False,
            ["this machine: nothing", "head.example.org: port 22, for this machine"],
        ),
        (
            replace(worker(), head="ray@head", meet="ray@meet"),
            False,
            ["this machine: nothing", "meet: port 22, for this machine"],
        ),
        (
            replace(worker(), head=None, direct=(("w2", "ray@w2:23"),)),
            True,
            [
                "this machine: the port of its sshd, for the head and the worker that dials it",
                "w2: port 23, for this machine",
            ],
        ),
    ],
)
def test_what_is_to_be_open_is_said_of_each_way(
    request_: SetupRequest, peers: bool, lines: list[str]
) -> None:
    assert texts.to_open(request_, peers) == lines


def test_a_meeting_place_is_in_both_files_and_its_line_lets_sockets_only() -> None:
    layout = user_layout(
        Path("/home/ann"), 1000, "/opt/rayfwd/bin/rayfwd", "/usr/bin/python3", None
    )
    at_head = tomllib.loads(texts.config_text(replace(head(), meet="ray@meet"), layout))
    assert at_head["hub"] == {"meet": [{"ssh": "ray@meet"}]}
    keyed = replace(head(), meet="ray@meet", meet_identity=layout.identity)
    (section,) = tomllib.loads(texts.config_text(keyed, layout))["hub"]["meet"]
    assert section == {"ssh": "ray@meet", "identity": str(layout.identity)}
    there = replace(worker(), meet="ray@meet", host_key=None)
    config = tomllib.loads(texts.config_text(there, layout))
    assert config["head"]["meet"] == "ray@meet"
    assert "known_hosts" not in config["head"]
    assert parse(config).head is not None, "as it is written"
    assert texts.forwarding_line("ssh-ed25519 AAAA x\n") == (
        "restrict,port-forwarding ssh-ed25519 AAAA x"
    )
    said = texts.worker_command(replace(head(), meet="ray@meet"), layout, "h", ["SHA256:x"])
    assert "--meet ray@meet" in said
    assert "--fingerprint" not in said, "nobody can look at the head's key from there"
