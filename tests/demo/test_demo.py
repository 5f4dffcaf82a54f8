"""`rayfwd demo` in a box of its own: to its end, interrupted, and where it cannot run."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayfwd.demo import machine, teller
from tests.demo.box import OTHER, Box
from tests.need import need, ray_envs, tool

RAY = str(ray_envs() / "ray-2.60.0" / "bin" / "ray")


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    try:
        made.__enter__()
    except AssertionError as exc:
        made.__exit__(None, None, None)
        need(f"no namespaces for the demo: {exc}")
    try:
        yield made
    finally:
        made.__exit__(None, None, None)


def test_the_box_sees_what_is_left(box: Box) -> None:
    """Else the tests below could not fail."""
    box.start("sleep", ["/bin/sh", "-c", "echo up; exec /bin/sleep 600"])
    box.until_said("up", name="sleep")
    while "/bin/sleep 600" not in box.processes():  # the shell becomes it
        time.sleep(0.05)
    (box.tmp / "file").touch()
    assert box.left() == {"processes": ["/bin/sleep 600"], "files": ["file"]}


@pytest.mark.ray
@pytest.mark.parametrize(
    "uid",
    [
        pytest.param(None, id="as ourselves", marks=pytest.mark.thorough),
        pytest.param(OTHER, id="as another user"),
    ],
)
@pytest.mark.runs("rayfwd demo")
def test_to_its_end(box: Box, uid: int | None) -> None:
    need("another user can only be had by root" if uid and os.geteuid() != 0 else None)
    box.demo("--ray", RAY, uid=uid)
    assert box.wait() == 0, box.output()
    said = box.output()
    assert box.left() == {}
    for expected in (
        "worker: its own processes, mounts, host name and network (interfaces: lo)",
        "`ray status`: 0 of 2 CPUs in use",
        "50 MB from head to worker in",
        "50 MB from worker to head in",
        "2 SSH connections closed, new ones refused",
        "tasks done on the head, 0 on the worker",
        "every result arrived exactly once and was correct",
        "head: ended in",
        "none failed, none was retried.",
        "The training did not notice:",
        "Next, on your own machines: run `rayfwd head`",
    ):
        assert expected in said, said


@pytest.mark.ray
@pytest.mark.parametrize(
    ("at", "number"),
    [
        ("Creating two machines", signal.SIGINT),
        # test_kept_files is interrupted there, too.
        pytest.param("head: waiting: Ray is starting", signal.SIGINT, marks=pytest.mark.thorough),
        ("worker's link is parked", signal.SIGTERM),
    ],
)
def test_interrupted(box: Box, at: str, number: signal.Signals) -> None:
    box.demo("--ray", RAY)
    box.until_said(at)
    assert box.processes()
    box.signal("demo", number)
    assert box.wait() == 128 + number, box.output()
    assert box.left() == {}
    assert "Traceback" not in box.output()


@pytest.mark.ray
def test_killed(box: Box) -> None:
    """Nobody is there any more to remove the files, but nothing goes on running."""
    box.demo("--ray", RAY)
    box.until_said("Ray is starting")
    assert len(box.processes()) > 5
    box.signal("demo", signal.SIGKILL)
    assert box.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while (left := box.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@pytest.mark.ray
def test_a_step_that_fails_shows_the_logs(box: Box) -> None:
    """A Ray that is there and does not start."""
    python = (ray_envs() / "ray-2.60.0" / "bin" / "python").absolute()
    broken = box.tmp / "bin" / "ray"
    broken.parent.mkdir()
    broken.write_text(f"#!{python}\nraise SystemExit('no room for a Ray here')\n")
    broken.chmod(0o755)
    box.demo("--ray", "/tmp/bin/ray")
    assert box.wait() == 1
    said = box.output()
    assert "The demo failed after" in said
    assert "Step: Starting `rayfwd run` on both" in said
    assert "The last lines of rayfwd on head:" in said
    assert "no room for a Ray here" in said
    assert "Traceback" not in said
    shutil.rmtree(broken.parent)
    assert box.left() == {}


@pytest.mark.ray
def test_kept_files(box: Box) -> None:
    box.demo("--keep", "--ray", RAY)
    box.until_said("Ray is starting")
    box.signal("demo", signal.SIGINT)
    assert box.wait() == 128 + signal.SIGINT
    left = box.left()
    (kept,) = left.pop("files")
    assert left == {}
    assert f"Kept: /tmp/{kept}" in box.output()
    assert (box.tmp / kept / "head" / "rayfwd.toml").exists()
    assert 'ssh = "demo-head"' in (box.tmp / kept / "worker" / "rayfwd.toml").read_text()


def test_without_ray(box: Box) -> None:
    box.demo("--ray", "/nowhere/ray")
    assert box.wait() == 1
    said = box.output()
    assert said.startswith(
        "rayfwd: ray_not_found: the demo needs Ray: --ray /nowhere/ray: no such file"
    )
    assert "pip install 'ray[default]'" in said
    assert len(said.splitlines()) == 1
    assert box.left() == {}


@pytest.mark.ray
def test_where_namespaces_are_forbidden(box: Box) -> None:
    """A root without rights, where user namespaces are used up, as in many containers."""
    need(None if os.path.isabs(tool("setpriv")) else "there is no setpriv (util-linux)")
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    bare = [tool("setpriv"), "--bounding-set=-all", "--inh-caps=-all"]
    place = [tool("unshare"), "--user", "--map-root-user", "/bin/sh", "-c", forbid, "sh", *bare]
    box.demo("--ray", RAY, before=place)
    assert box.wait() == 1
    said = box.output().splitlines()[-1]
    assert said.startswith("rayfwd: namespaces_forbidden: the demo makes two machines out of Linux")
    assert "a user namespace (unshare): No space left on device" in said
    assert "`sudo sysctl user.max_user_namespaces=10000`" in said
    assert "Traceback" not in box.output()
    assert box.left() == {}


def test_no_wait_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when looking takes long."""
    monkeypatch.setattr(teller, "QUIET_SECONDS", 0.05)
    out = io.StringIO()
    tell = teller.Narrator(out)
    enough = asyncio.Event()

    def how() -> str:
        if out.getvalue().count("the look goes on") == 3:
            enough.set()
        return "the look goes on"

    async def look() -> bool:
        return await enough.wait()

    asyncio.run(tell.until(look, how, 60))
    assert out.getvalue().count("s: the look goes on\n") >= 3


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("kernel/apparmor_restrict_unprivileged_userns", 1, "restrict_unprivileged_userns=0`"),
        ("kernel/unprivileged_userns_clone", 0, "`sudo sysctl kernel.unprivileged_userns_clone=1`"),
        ("user/max_user_namespaces", 0, "`sudo sysctl user.max_user_namespaces=10000`"),
    ],
)
def test_the_remedy_fits_the_host(
    name: str, value: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SETTINGS", tmp_path)
    before = machine.why_forbidden(1, "Operation not permitted").remedy
    assert remedy not in before
    assert before
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(f"{value}\n")
    assert remedy in machine.why_forbidden(1, "Operation not permitted").remedy


def test_the_job_is_in_the_package() -> None:
    assert Path(machine.__file__).with_name("job.py").is_file()
