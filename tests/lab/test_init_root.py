"""`rayfwd init` as root, on a copy of this machine's root that is gone afterwards."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lab import package
from tests.need import need, ray_envs, tool

pytestmark = pytest.mark.ray

IN_A_COPY = r"""
set -eu
space=$1; shift
mount -t tmpfs tmpfs "$space"
mkdir "$space/upper" "$space/work" "$space/root"
mount -t overlay -o "lowerdir=/,upperdir=$space/upper,workdir=$space/work" overlay "$space/root"
umask 022
mount -t tmpfs tmpfs "$space/root/tmp"
while [ "$1" != -- ]; do
    mkdir -p "$space/root$1"; mount --rbind "$1" "$space/root$1"
    above=$1  # the service's user is to run what is in there
    while above=${above%/*} && [ -n "$above" ]; do chmod a+x "$space/root$above"; done
    shift
done
shift
mount --rbind /dev "$space/root/dev"
mount -t proc proc "$space/root/proc"
mount -t tmpfs tmpfs "$space/root/run"
rm -rf "$space/root/var/lib/rayfwd" "$space/root/etc/rayfwd" "$space/root/etc/rayfwd.toml"
exec chroot "$space/root" /bin/sh -c "$@"
"""

SCRIPT = r"""
set -eu
rayfwd=$1 ray=$2
echo "ann:x:54321:54321::/:/bin/sh" >> /etc/passwd
all() {
    find /etc /var/lib /home /usr/local/share ! -name '*-' ! -name '.pwd.lock' \
        \( -type d -printf '%p %m %U %G\n' -o -printf '%p %m %U %G %s\n' \) \
        | grep -v -e '^/etc [0-9]' -e '/etc/[a-z]*shadow' | sort
    cat /etc/passwd /etc/group
}
all > /run/before
echo "== dry"; "$rayfwd" init head --ray "$ray" --dry-run; all > /run/dry
cmp /run/before /run/dry
echo "== unknown"; man -w rayfwd 2>&1 || echo "code $?"
echo "== init"; "$rayfwd" init head --ray "$ray"; all > /run/made
echo "== again"; "$rayfwd" init head; all > /run/again
cmp /run/made /run/again
echo "== look"
stat -c '%n %a %U %G' /etc/rayfwd.toml /var/lib/rayfwd /var/lib/rayfwd/.ssh/authorized_keys
stat -c '%n %a %U %G' /var/lib/rayfwd-init.json
id rayfwd
"$rayfwd" check | head -1
grep -A2 '^.ray' /etc/rayfwd.toml
echo "== man"; man -w rayfwd rayfwd.toml 2>&1 || echo "code $?"
echo "== worker"; "$rayfwd" init worker --head x --ray "$ray" 2>&1 || echo "code $?"
echo "== root"; "$rayfwd" init head --user root --config /etc/other.toml 2>&1 || echo "code $?"
echo "== uninstall"; "$rayfwd" uninstall --purge; all > /run/after
diff /run/before /run/after
echo "== whole"
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, rayfwd: Path) -> dict[str, str]:
    """What each part of the script printed."""
    ray = ray_envs() / "ray-2.60.0" / "bin" / "ray"
    trees = list(dict.fromkeys(package.trees(rayfwd.parents[1]) + package.trees(ray.parents[1])))
    space = tmp_path_factory.mktemp("space")
    unshare = [tool("unshare"), "--mount", "--pid", "--fork", "--net", "--"]
    copy = ["sh", "-c", IN_A_COPY, "copy", str(space), *trees, "--"]
    ran = subprocess.run(
        [*unshare, *copy, SCRIPT, "script", str(rayfwd), str(ray)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    parts = re.split(r"(?m)^== (\w+)\n", ran.stdout)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_made_once_and_taken_away_whole(said: dict[str, str]) -> None:
    """The script compares the files; it ends where they differ."""
    assert "whole" in said
    assert "to create group rayfwd" in said["dry"]
    assert "created   user rayfwd" in said["init"]
    assert "Nothing had to be done" in said["again"]
    assert "created   " not in said["again"]


def test_rights(said: dict[str, str]) -> None:
    lines = said["look"].splitlines()
    assert lines[:4] == [
        "/etc/rayfwd.toml 640 root rayfwd",
        "/var/lib/rayfwd 700 rayfwd rayfwd",
        "/var/lib/rayfwd/.ssh/authorized_keys 600 rayfwd rayfwd",
        "/var/lib/rayfwd-init.json 600 root root",
    ]
    assert "/etc/rayfwd.toml: valid" in lines


def test_ray_asks_for_a_token_where_others_may_log_in(said: dict[str, str]) -> None:
    for part in ("dry", "init"):
        (line,) = [line for line in said[part].splitlines() if "chosen" in line]
        assert re.search(r'ray.auth = "token", because .*\bann\b.* may log in here', line)
        assert 'set "auto" in /etc/rayfwd.toml to undo this' in line
    assert "chosen" not in said["again"]
    assert said["look"].splitlines()[-1] == 'auth = "token"'


def test_man_finds_its_pages(said: dict[str, str], rayfwd: Path) -> None:
    need(None if shutil.which("man") else "man is not installed")
    assert said["unknown"].endswith("code 16\n")
    pages = rayfwd.parents[1] / "share" / "man"
    found = [str(pages / "man1/rayfwd.1"), str(pages / "man5/rayfwd.toml.5")]
    assert said["man"].splitlines() == found


def test_the_next_step_is_said(said: dict[str, str]) -> None:
    assert said["init"].splitlines()[-1] == "    systemctl enable --now --no-block rayfwd"
    assert "rayfwd init worker --head rayfwd@" in said["init"]


def test_what_is_refused(said: dict[str, str]) -> None:
    assert "has role = 'head'" in said["worker"]
    assert "--user root" in said["root"]
    assert said["root"].endswith("code 2\n")
