"""The page in the browser: what is answered to whom, and how it looks in a real Chromium."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from rayfwd import client as client_module
from rayfwd import codes
from rayfwd.client import Client
from rayfwd.config import Config, ConfigError, parse
from rayfwd.daemon import history as history_module
from rayfwd.daemon.history import History, LinkNow
from rayfwd.session.stream import ResetReason
from rayfwd.session.target import Target
from rayfwd.transport import link as link_module
from rayfwd.transport.refused import MOST, RefusedStreams
from rayfwd.transport.relay import SocketRelay
from rayfwd.watch import machine_watch, reach
from rayfwd.watch.cluster_watch import ClusterWatch
from rayfwd.watch.conditions import Finding
from tests.chromium import Browser, browser, need_chromium
from tests.need import CHECKOUT
from tests.unit.cluster import echo, goodbye, serving
from tests.unit.daemons import Daemon, Site, SocketCarrier, exposed, site
from tests.unit.loops import run, until
from tests.unit.other_user import OTHER, child, needs_root
from tests.unit.ports import free_port

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"

DIAL = """
sock = socket.socket()
sock.connect(("127.0.0.1", int(sys.argv[1])))
try:
    sock.sendall(b"GET / HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n\\r\\n")
    print(sock.recv(12).decode() or "closed", flush=True)
except ConnectionResetError:
    print("reset", flush=True)
"""


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redial fast; there is no Ray, so none is dialled."""
    for name, seconds in {"REDIAL_FIRST": 0.05, "REDIAL_PARKED": 0.1, "REDIAL_LAST": 0.2}.items():
        monkeypatch.setattr(link_module, name, seconds)
    monkeypatch.setattr(reach, "servers", lambda _plan: [])


async def get(port: int, target: str = "/", method: str = "GET", **headers: str) -> tuple[str, ...]:
    """Status, head and body."""
    lines = {"Host": f"127.0.0.1:{port}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    request = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{request}\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    await goodbye(writer)
    return head[9:12], head, body


async def data(port: int, since: int = 0) -> Any:
    return json.loads((await get(port, f"/data.json?since={since}"))[2])


async def port_of(daemon: Daemon) -> int:
    """Where the page of a daemon is served."""
    await until(lambda: daemon.role.node.page is not None)
    page = daemon.role.node.page
    assert page is not None
    return page.port


# -- the endpoint ----------------------------------------------------------------------------------


def test_what_is_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            await s.start()
            port = await port_of(s.head)
            for target, kind in {
                "/": "text/html; charset=utf-8",
                "/page.css": "text/css; charset=utf-8",
                "/page.js": "text/javascript; charset=utf-8",
                "/icon.svg": "image/svg+xml",
                "/data.json": "application/json",
            }.items():
                status, head, body = await get(port, target)
                assert status == "200"
                assert body
                assert f"Content-Type: {kind}\r\n" in head
                assert "script-src 'self'" in head
                assert "default-src 'none'" in head
                assert "unsafe" not in head
                assert "Cache-Control: no-store" in head
                assert "X-Content-Type-Options: nosniff" in head
                assert "Access-Control-Allow-Origin" not in head
                assert (await get(port, target, "HEAD"))[2] == ""
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                assert (await get(port, "/", method))[0] == "405"
            for target in ("/x", "/../page.css", "/page.css/", "//", "/__init__.py", "http://x/"):
                assert (await get(port, target))[0] == "404"

    run(main)


def test_only_who_asks_by_a_loopback_address_is_answered(tmp_path: Path) -> None:
    """A name that leads to 127.0.0.1 is somebody else's page (DNS rebinding)."""

    async def main() -> None:
        async with site(tmp_path) as s:
            await s.start()
            port = await port_of(s.head)
            for host in ("127.0.0.1", "localhost:8000", "LOCALHOST", "127.0.0.5:1", "[::1]:9480"):
                assert (await get(port, Host=host))[0] == "200", host
            for host in (
                "evil.example",
                f"evil.example:{port}",
                "127.0.0.1.evil.example",
                "localhost.evil.example",
                "127.0.0.1@evil.example",
                "10.0.0.1",
                "0.0.0.0",
                "",
            ):
                assert (await get(port, "/data.json", Host=host))[0] == "421", host
            twice = f"127.0.0.1\r\nHost: 127.0.0.1:{port}"
            assert (await get(port, Host=twice))[0] == "421"
            for page, status in {
                "cross-site": "403",
                "same-site": "403",
                "same-origin": "200",
            }.items():
                assert (await get(port, "/data.json", Sec_Fetch_Site=page))[0] == status

    run(main)


@needs_root
def test_another_user_is_reset_before_a_byte_is_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.start()
            port = await port_of(s.head)
            for uid, said in ((OTHER, "reset"), (0, "HTTP/1.1 200")):
                with child(DIAL, port, uid=uid) as other:
                    assert await asyncio.to_thread(other.says) == said
            (refused,) = (await data(port))["refused"]["users"]
            assert refused == {"user": str(OTHER), "connections": 1}

    run(main)


def test_where_the_kernel_does_not_tell_nobody_is_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path) as s:
            await s.start()
            port = await port_of(s.head)
            admission = s.head.role.node.listeners.admission
            diag, admission._diag = admission._diag, None
            with pytest.raises(ConnectionResetError):
                await get(port)
            admission._diag = diag
            assert (await get(port))[0] == "200"

    run(main)


def test_what_is_told_and_what_not(tmp_path: Path) -> None:
    async def main() -> None:
        async with site(tmp_path, "w1", "w2") as s:
            across, back = s.path("w1", "w2"), s.path("head", "w1")
            await s.start()
            s.head.role.node.board.put_all("test", [Finding(HOSTILE, problem())])
            port = await port_of(s.head)
            for at in (across, across, back):
                await in_vain(at)
            await until(lambda: len(s.head.runtime.health.now().refused) == 2)
            told = await data(port)
            machines = {machine["name"]: machine["role"] for machine in told["machines"]}
            assert machines == {"head": "head", "w1": "worker", "w2": "worker"}
            assert [(link["key"], link["state"]) for link in told["links"]] == [
                ("w1", "up"),
                ("w2", "up"),
            ]
            assert HOSTILE in [each["subject"] for each in told["conditions"]]
            newest, older = told["refused"]["ports"]
            assert [newest[k] for k in ("by", "of", "times", "reason")] == [
                "head",
                "w1",
                1,
                "refused",
            ]
            assert [older[k] for k in ("by", "of", "times", "reason")] == ["w1", "w2", 2, "refused"]
            port_of_w2 = exposed(s.workers["w2"])
            assert older["cause"] == f"nothing listens on {port_of_w2}"
            text = json.dumps(told)
            assert str(tmp_path) not in text, "no path of this machine"
            assert "command" not in text
            assert "pid" not in told
            status = await s.head.ask("status")
            assert status["page"] == f"http://127.0.0.1:{port}/"
            assert [row["by"] for row in status["refused"]] == ["head", "w1"]

    run(main)


def problem() -> Any:
    return codes.DISK_NEARLY_FULL.problem(f"cause {HOSTILE}", f"remedy {HOSTILE}")


async def in_vain(at: Any) -> None:
    """Dial a port behind which nothing listens."""
    reader, writer = await asyncio.open_connection(*at)
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()


def test_where_it_is_served(tmp_path: Path) -> None:
    """A head has it at the first free port, a worker where its file says so; either without a
    restart."""

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            await s.start()
            w1, at = s.workers["w1"], free_port()
            assert 9480 <= await port_of(s.head) < 9500
            assert w1.role.node.page is None
            w1.more = f"page.listen = '127.0.0.1:{at}'"
            w1.write()
            assert w1.runtime.reload()["changed"] == ["page.listen"]
            assert await port_of(w1) == at
            told = await data(at)
            assert [link["key"] for link in told["links"]] == ["head"]
            own = next(machine for machine in told["machines"] if machine["own"])
            assert (own["name"], own["link"]) == ("w1", "head")
            s.head.more = "page.listen = 'off'"
            s.head.write()
            s.head.runtime.reload()
            await until(lambda: s.head.role.node.page is None)
            assert s.head.runtime.health.now().page is None

    run(main)


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            at = taken.getsockname()[1]
            async with site(tmp_path) as s:
                s.head.more = f"page.listen = '127.0.0.1:{at}'"
                await s.start()
                await until(lambda: s.head.role.node.board.conditions)
                (condition,) = s.head.role.node.board.conditions
                assert (condition.code, condition.severity) == (codes.PAGE_BLOCKED, "warning")
                assert f"127.0.0.1:{at}: Address already in use" in condition.problem.cause

    run(main)


def head_with(**keys: Any) -> Config:
    return parse({"role": "head", "name": "head", **keys})


def test_places() -> None:
    assert head_with().page_places[:2] == ("127.0.0.1:9480", "127.0.0.1:9481")
    taken = head_with(expose=[9480], metrics={"listen": "127.0.0.1:9481"}, ray={"port": 9482})
    assert taken.page_places[0] == "127.0.0.1:9483"
    assert head_with(page={"listen": "off"}).page_places == ()
    assert parse({"role": "worker", "name": "w", "head": {"ssh": "h"}}).page_places == ()
    for listen in ("0.0.0.0:9480", "/run/page.sock", "on", "127.0.0.1"):
        with pytest.raises(ConfigError, match=r"page\.listen"):
            head_with(page={"listen": listen})
    with pytest.raises(ConfigError, match=r"must differ from metrics\.listen"):
        head_with(page={"listen": "127.0.0.1:1"}, metrics={"listen": "127.0.0.1:1"})


def test_a_client_sees_it_and_a_worker_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "carrier_for", SocketCarrier)
    monkeypatch.setattr(client_module, "USUAL_PAGE", free_port())

    async def main() -> None:
        async with site(tmp_path, "w1") as s:
            await s.start()
            port = await port_of(s.head)
            said: list[str] = []
            running = asyncio.create_task(Client(client_of(s), said.append).run())
            await until(lambda: "Ctrl-C ends it." in said, 10, lambda: f"{said}")
            (line,) = (line for line in said if line.startswith("  page "))
            at = int(line.split(":")[2].partition("/")[0])
            assert (await get(at))[0] == "200"
            links = (await data(at))["links"]
            assert [(link["key"], link["peer"]) for link in links] == [
                ("w1", "w1"),
                ("client 0", "laptop"),
            ]
            assert (await data(at))["machines"][-1]["link"] == "client 0"
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            own = s.head.role.node.view.own
            assert own is not None
            for target in (Target(own.address, port), Target("127.0.0.1", port)):
                lost: list[ResetReason] = []
                dialled(s.workers["w1"], target, lost)
                await until(lambda: lost)  # noqa: B023
                assert lost == [ResetReason.NOT_IN_PLAN]

    run(main)


def client_of(s: Site) -> Config:
    ports = {"dashboard_port": free_port(), "client_port": free_port()}
    head = {"ssh": "head", "socket": f"{s.head.directory}/run/hub.sock"}
    state = f"{s.directory}/client"
    return parse(
        {"role": "client", "name": "laptop", "state_dir": state, "head": head, "client": ports}
    )


def dialled(worker: Daemon, target: Target, lost: list[ResetReason]) -> None:
    """A stream of the worker's to there, whatever its own plan has."""

    class Owner(SocketRelay):
        def stream_lost(self, reason: ResetReason, text: str) -> None:
            lost.append(reason)

    mux = worker.worker._link.mux
    assert mux is not None
    Owner(set()).attach(mux.open(target.encode(), Owner(set())))


# -- what is kept ----------------------------------------------------------------------------------


def test_an_hour_is_kept_and_no_more() -> None:
    links = {"w1": LinkNow(0.020, 0, 0)}
    history = History(links.items)
    for second in range(0, 5000, 10):
        links["w1"] = LinkNow(None if second == 4980 else 0.020, 1000 * second, 500 * second)
        history.take(links, float(second))
    told = history.since(0)
    assert (told["taken"], told["length"], told["interval"]) == (500, 360, 10.0)
    w1 = told["links"]["w1"]
    assert [len(w1[name]) for name in ("rtt_ms", "in", "out")] == [360, 360, 360]
    assert w1["rtt_ms"][-3:] == [20.0, None, 20.0]
    assert (w1["in"][-1], w1["out"][-1]) == (1000, 500)
    assert [len(lists["in"]) for lists in history.since(498)["links"].values()] == [2]
    assert history.since(500)["links"]["w1"]["in"] == []
    assert len(history.since(501)["links"]["w1"]["in"]) == 360, "it is of an earlier daemon"
    links["w2"] = LinkNow(None, 0, 0)
    history.take(links, 5000.0)
    assert history.since(499)["links"]["w2"] == {"rtt_ms": [None], "in": [0], "out": [0]}
    del links["w1"]
    history.take(links, 5010.0)
    assert list(history.since(0)["links"]) == ["w2"]


def test_links_that_have_a_history_are_bounded() -> None:
    links = {f"w{i}": LinkNow(None, 0, 0) for i in range(history_module.MOST_LINKS + 3)}
    history = History(links.items)
    for second in (0.0, 10.0):
        history.take(links, second)
    assert len(history.since(0)["links"]) == history_module.MOST_LINKS


def test_refusals_are_bounded_and_the_last_ones_kept() -> None:
    refused = RefusedStreams(lambda: 7.0)
    for number in range(MOST + 10):
        refused.note("w1", "", ResetReason.REFUSED, f"nothing listens on {number}")
    refused.note("w1", "", ResetReason.REFUSED, "nothing listens on 20")
    refused.note("w1", "", ResetReason.ABORTED, "a program's own")
    refused.note("w2", "", ResetReason.NOT_IN_PLAN, "x" * 5000)
    last = refused.last()
    assert len(last) == MOST
    assert (last[0].by, len(last[0].text)) == ("w2", 200)
    assert (last[1].text, last[1].times, last[1].last) == ("nothing listens on 20", 2, 7.0)


# -- how it looks ----------------------------------------------------------------------------------

CONTRAST = r"""(() => {
  const numbers = (text) => text.match(/[\d.]+/g).map(Number);
  const light = (text) => {
    const [r, g, b] = numbers(text).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const back = getComputedStyle(at).backgroundColor;
      if (numbers(back)[3] !== 0) return back;
    }
    return "rgb(255, 255, 255)";
  };
  const bad = [];
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim())) continue;
    if (node.closest("noscript, title, desc") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(node.closest("svg") ? style.fill : style.color), light(behind(node))]
      .sort().reverse();
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(`${node.textContent}: ${(a + 0.05) / (b + 0.05)}`);
  }
  return bad;
})()"""

WRITES_PICTURES = os.environ.get("RAYFWD_SCREENSHOTS") == "1"

TEXT = "document.getElementById('{}').textContent"


def test_in_a_real_chromium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real sessions, one of them cut for good, one cut and ridden through while the page is open.

    RAYFWD_SCREENSHOTS=1 writes the pictures of docs/page.md; nothing is compared by its pixels.
    """
    need_chromium()
    monkeypatch.setattr(history_module, "INTERVAL", 0.02 if WRITES_PICTURES else 0.05)
    only_the_links_are_watched(monkeypatch)

    async def main() -> None:
        async with site(tmp_path, "gpu-1", "gpu-2", "gpu-3") as s, browser() as page:
            gpu1, _gpu2, gpu3 = s.workers.values()
            at, nobody = s.path("head", "gpu-1"), s.path("gpu-1", "gpu-2")
            await s.start()
            port = await port_of(s.head)
            async with serving(echo, exposed(gpu1)):
                await talk(at, 400 if WRITES_PICTURES else 40)
            await in_vain(nobody)
            url = f"http://127.0.0.1:{port}/"
            await page.call("Page.navigate", url=url)
            await page.until("document.documentElement?.dataset.turn >= 1")
            await looks_right(page)
            await is_alive(page, gpu1, gpu3)
            await is_for_everybody(page)
            await write_pictures(page)
            await fits_a_narrow_window(page)
            await is_harmless(page, s.head)
            await s.head.stop()
            await page.until("!document.getElementById('stale').hidden")
            assert "does not answer" in await page.value(TEXT.format("stale"))
            foreign = [asked for asked in page.requests if not asked.startswith(url)]
            assert not foreign, "no outside resources"

    run(main, 120.0)


def test_without_javascript_it_says_where_to_look(tmp_path: Path) -> None:
    need_chromium()

    async def main() -> None:
        async with site(tmp_path) as s, browser() as page:
            await s.start()
            await page.call("Emulation.setScriptExecutionDisabled", value=True)
            await page.call("Page.navigate", url=f"http://127.0.0.1:{await port_of(s.head)}/")
            await page.until("document.querySelector('noscript p') !== null")
            shown = (await page.value("document.body.innerText")).splitlines()
            assert [line for line in shown if line.strip()] == [
                "Skip to the content",
                "rayfwd",
                "This page needs JavaScript. In a terminal on this machine, rayfwd status shows "
                "the same.",
            ]

    run(main, 120.0)


def only_the_links_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """All machines are this one, and there is no Ray."""

    async def nothing(_watch: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(machine_watch, "judge", lambda _seen: [])
    monkeypatch.setattr(ClusterWatch, "run", nothing)


async def talk(at: Any, times: int) -> None:
    reader, writer = await asyncio.open_connection(*at)
    for turn in range(times):
        size = 1000 * (20 + turn % 80)
        writer.write(bytes(size))
        await reader.readexactly(size)
        await asyncio.sleep(0.02)
    await goodbye(writer)


async def looks_right(page: Browser) -> None:
    assert await page.value("document.title") == "ready: head, rayfwd"
    assert await page.value(TEXT.format("conditions")) == "Nothing is wrong."
    names = "[...document.querySelectorAll('#picture text.name')].map((t) => t.textContent)"
    assert await page.value(names) == ["head", "gpu-1", "gpu-2", "gpu-3"]
    assert await page.value("document.querySelectorAll('#picture .wire.up').length") == 3
    rows = "[...document.querySelectorAll('#links tr')].map((r) => r.cells[1].textContent)"
    assert await page.value(rows) == ["up, 2 lanes"] * 3
    assert "nothing listens there" in await page.value(TEXT.format("refused"))
    await page.until("document.querySelector('#link-gpu-1 .chart .two').getAttribute('d')")


async def is_alive(page: Browser, ridden: Daemon, lost: Daemon) -> None:
    """What happens is there without reloading."""
    await page.value("window.same = true")
    ridden.cut()
    assert lost.carrier is not None
    lost.carrier._path = Path("/nowhere")
    lost.cut()
    await page.until("document.querySelectorAll('#picture .wire.parked').length === 1")
    await page.until(f"{TEXT.format('link-gpu-1')}.includes('s, ridden through')")
    await page.until(f"{TEXT.format('conditions')}.includes('link_parked')")
    assert "gpu-3" in await page.value(TEXT.format("conditions"))
    assert await page.value("window.same === true")


async def is_harmless(page: Browser, head: Daemon) -> None:
    """What other machines say is text, whatever it says."""
    board = head.role.node.board
    board.put_all("test", [Finding(HOSTILE, problem())])
    await page.until(f"{TEXT.format('conditions')}.includes('<script>')")
    assert await page.value("document.querySelectorAll('img, #main script').length") == 0
    assert "owned" not in await page.value("document.title")
    assert not page.complaints
    # Were there markup in it, the page's policy would let it do nothing.
    await page.value(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(HOSTILE)})")
    await page.until("document.querySelector('img') !== null")
    assert "owned" not in await page.value("document.title")


async def is_for_everybody(page: Browser) -> None:
    """Contrast in both schemes, names for what is drawn, the keyboard, and no motion."""
    for scheme in ("light", "dark"):
        await page.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        assert await page.value(CONTRAST) == []
    animation = "getComputedStyle(document.querySelector('.wire.parked')).animationName"
    assert await page.value(animation) == "none"
    tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
    roles = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"]
    ]
    assert ("heading", "Links") in roles
    assert ("main", "") in roles
    images = [name for role, name in roles if role in {"image", "img"}]
    assert len(images) >= 6
    assert all(images)
    assert all(name for role, name in roles if role == "link")
    stops = set()
    for _ in range(8):
        await page.press("Tab", 9)
        stops.add(await page.value("document.activeElement.id || document.activeElement.tagName"))
    assert {"box-link-gpu-1", "box-link-gpu-2", "box-link-gpu-3"} <= stops
    await page.value("document.activeElement.blur()")


async def fits_a_narrow_window(page: Browser) -> None:
    """As a phone's: nothing is cut off, and each figure has its name."""
    await page.window(380)
    await page.until("document.querySelector('#picture svg').clientWidth <= 380")
    assert await page.value("document.scrollingElement.scrollWidth") <= 380
    beyond = (
        "[...document.querySelectorAll('#links td, #refused td, #picture text, #conditions p')]"
        ".filter((e) => e.getBoundingClientRect().right > 380).map((e) => e.textContent)"
    )
    assert await page.value(beyond) == []
    named = (
        "[...document.querySelectorAll('#link-gpu-1 td')]"
        ".map((e) => getComputedStyle(e, '::before').content)"
    )
    assert await page.value(named) == [
        f'"{name}"'
        for name in (
            "State",
            "Round trip",
            "Round trip, last hour",
            "In and out",
            "Traffic, last hour",
            "Connections",
            "Cuts",
        )
    ]
    assert await page.value(CONTRAST) == []
    if WRITES_PICTURES:
        await page.media(prefers_color_scheme="light", prefers_reduced_motion="reduce")
        await page.picture(CHECKOUT / "docs" / "page-narrow.png", 380)
    await page.window(1200)
    await page.until("document.querySelector('#picture svg').clientWidth > 600")


async def write_pictures(page: Browser) -> None:
    if not WRITES_PICTURES:
        return
    for scheme in ("light", "dark"):
        await page.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        await page.picture(CHECKOUT / "docs" / f"page-{scheme}.png", 1200)
