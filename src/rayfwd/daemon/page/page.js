// The page: asks the daemon for data.json every few seconds and shows it.
// Names and causes come from other machines. They reach the document as text only.
"use strict";

const PAUSE = 3000; // milliseconds between two questions
const PATIENCE = 10000; // milliseconds for an answer
const SVG = "http://www.w3.org/2000/svg";

const STATES = {
  ready: "good", up: "good", starting: "warn", waiting: "warn", parked: "warn", sidelined: "warn",
  stopping: "warn", down: "bad", failed: "bad", error: "bad", warning: "warn",
};

const byId = (id) => document.getElementById(id);
const quality = (state) => STATES[state] || "quiet";

let boot = "";
let taken = 0;
let series = new Map(); // of each link: {rtt_ms, in, out}, arrays that end now
let shown = new Map(); // what each part was last made of
let heard = null; // when the daemon last answered
let latest = null; // what it last answered

// -- making elements -----------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  for (const child of children) made.append(child); // a string becomes a text node
  return made;
}

// Replace a part where it has changed, so that focus and selection stay where it has not.
function show(id, data, make) {
  const key = JSON.stringify(data);
  if (shown.get(id) === key) return;
  shown.set(id, key);
  const part = byId(id);
  const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
  part.replaceChildren(...make());
  if (focused) byId(focused)?.focus();
}

// -- words and numbers ---------------------------------------------------------------------------

function age(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  while (bytes >= 1000 && index < units.length - 1) { bytes /= 1000; index += 1; }
  return `${index && bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)} ${units[index]}`;
}

const trip = (ms) => (ms === null ? "–" : `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`);
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString();
const times = (count) => (count === 1 ? "once" : `${count} times`);

function lastCut(cut, now) {
  if (cut === null) return "";
  if (cut.seconds === null) return `began ${age(now - cut.began)} ago, still down`;
  const how = cut.ridden_through ? "ridden through" : "given up";
  const long = cut.seconds < 0.1 ? "less than 0.1" : cut.seconds.toFixed(1);
  return `last ${age(now - cut.began)} ago, for ${long} s, ${how}`;
}

// -- the parts -----------------------------------------------------------------------------------

function head(data) {
  document.title = `${data.state}: ${data.name}, rayfwd`;
  byId("who").textContent = `rayfwd on ${data.name}${data.name === data.role ? "" : `, a ${data.role}`}`;
  const state = byId("state");
  state.textContent = data.state;
  state.className = `badge ${quality(data.state)}`;
  const summary = byId("summary");
  if (summary.textContent !== data.summary) summary.textContent = data.summary;
  byId("asof").textContent =
    `Updated at ${clock(data.now)}, and again every ${PAUSE / 1000} s. ` +
    `rayfwd ${data.version}, up for ${age(data.uptime)}.`;
}

function conditions(data) {
  const key = data.conditions.map((each) => [each, Math.floor((data.now - each.since) / 10)]);
  show("conditions", key, () => {
    if (!data.conditions.length) return [element("p", { class: "good" }, "Nothing is wrong.")];
    return data.conditions.map((each) => condition(each, data));
  });
}

function condition(each, data) {
  const root = data.conditions.find((other) => other.id === each.explained_by);
  const parts = [
    element("h3", {},
      element("span", { class: `badge ${quality(each.severity)}` }, each.severity), " ",
      element("span", { class: "code" }, each.code), ` ${each.subject}`,
      element("span", { class: "quiet" }, ` for ${age(data.now - each.since)}`)),
    element("p", {}, each.cause),
    element("p", {}, element("strong", {}, "Do: "), each.remedy),
  ];
  if (root) parts.push(element("p", { class: "quiet" }, `Caused by ${root.code} of ${root.subject}.`));
  return element("article", { class: `condition ${each.severity}${root ? " symptom" : ""}` }, ...parts);
}

const BOX = { width: 230, height: 50, gap: 14, left: 20, reach: 300, least: 215, top: 12 };
const STACK = { left: 4, trunk: 20, indent: 48, label: 22, most: 460 };

// The hub at the left, everybody who has a link to it at the right, a line for each link.
function picture(data) {
  const links = new Map(data.links.map((link) => [link.key, link]));
  const hub = data.machines.find((machine) => machine.role === "head");
  if (!hub) {
    show("picture", [], () => [element("p", {}, "This node has no plan yet: it has not reached the head.")]);
    return;
  }
  const others = data.machines.filter((machine) => machine !== hub);
  const rows = others.map((machine) => [machine, links.get(machine.link) || null]);
  const shownNow = rows.map(([machine, link]) =>
    [machine, link && [link.state, Math.round(link.rtt_ms), rates(link)]]);
  const room = byId("picture").clientWidth;
  const spare = room - 2 * (BOX.left + BOX.width);
  show("picture", [hub, shownNow, room], () =>
    [spare < BOX.least ? stacked(hub, rows, room) : beside(hub, rows, Math.min(BOX.reach, spare))]);
}

// The head beside the others.
function beside(hub, rows, reach) {
  const step = BOX.height + BOX.gap;
  const height = Math.max(1, rows.length) * step + 2 * BOX.top;
  const right = BOX.left + BOX.width + reach;
  const width = right + BOX.width + BOX.left;
  const middle = height / 2;
  const lines = [];
  const boxes = [box(hub, null, BOX.left, middle - BOX.height / 2)];
  rows.forEach(([machine, link], index) => {
    const y = BOX.top + index * step + BOX.height / 2 + BOX.gap / 2;
    boxes.push(box(machine, link, right, y - BOX.height / 2));
    if (!link) return;
    const from = BOX.left + BOX.width;
    const bend = from + reach * 0.3;
    lines.push(
      drawn("path", {
        class: `wire ${link.state}`,
        d: `M${from} ${middle} C${bend} ${middle} ${from + 20} ${y} ${from + reach * 0.42} ${y} H${right}`,
      }),
      drawn("text", { x: right - 10, y: y - 7, "text-anchor": "end" }, said(link)),
      drawn("text", { x: right - 10, y: y + 17, "text-anchor": "end", class: "quiet" }, itsCuts(link)));
  });
  return whole(width, height, hub, rows, [...lines, ...boxes]);
}

// The head above the others, in a window that has no room for both.
function stacked(hub, rows, room) {
  const width = Math.min(STACK.most, room);
  const step = STACK.label + BOX.height + BOX.gap;
  const below = BOX.top + BOX.height;
  const inner = width - STACK.indent - STACK.left;
  const boxes = [box(hub, null, STACK.left, BOX.top, width - 2 * STACK.left)];
  const lines = [];
  rows.forEach(([machine, link], index) => {
    const top = below + BOX.gap + index * step + STACK.label;
    const y = top + BOX.height / 2;
    boxes.push(box(machine, link, STACK.indent, top, inner));
    if (!link) return;
    lines.push(
      drawn("path", { class: "trunk", d: `M${STACK.trunk} ${index ? y - step : below}V${y}` }),
      drawn("path", { class: `wire ${link.state}`, d: `M${STACK.trunk} ${y}H${STACK.indent}` }),
      drawn("text", { x: STACK.indent + 4, y: top - 7 }, said(link)),
      drawn("text", { x: width - STACK.left - 4, y: top - 7, "text-anchor": "end", class: "quiet" },
        link.cuts ? `cut ${times(link.cuts)}` : ""));
  });
  return whole(width, below + BOX.gap + rows.length * step, hub, rows, [...lines, ...boxes]);
}

// What stands at a link.
const said = (link) => (link.state === "up" ? `${trip(link.rtt_ms)}  ${rates(link)}` : link.state);
function itsCuts(link) {
  if (!link.cuts) return "";
  const through = link.ridden_through ? `, ridden through ${times(link.ridden_through)}` : "";
  return `cut ${times(link.cuts)}${through}`;
}

function whole(width, height, hub, rows, parts) {
  const states = rows.map(([machine, link]) => `${machine.name}: ${link ? link.state : "no link known here"}`);
  return drawn("svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-labelledby": "pic-title pic-desc" },
    drawn("title", { id: "pic-title" }, "The machines and their links to the head"),
    drawn("desc", { id: "pic-desc" }, `The head is ${hub.name}. ${states.join("; ")}.`),
    ...parts);
}

function box(machine, link, x, y, width = BOX.width) {
  const parts = [machine.role === "client" ? "client, no node" : machine.role, machine.address];
  if (machine.direct) parts.push("direct");
  const ray = machine.left ? "left" : machine.ray ? `Ray ${machine.ray.replace("_", " ")}` : "";
  const state = link ? link.state : machine.own ? "up" : "";
  const made = drawn("g", {},
    drawn("title", {}, `${machine.name}, ${parts.filter(Boolean).join(", ")}${ray ? `, ${ray}` : ""}`),
    drawn("rect", { class: "box", x, y, width, height: BOX.height, rx: 6 }),
    drawn("circle", { class: `dot ${quality(state)}`, cx: x + 16, cy: y + 17, r: 5 }),
    drawn("text", { class: "name", x: x + 28, y: y + 22 }, short(machine.name, ray ? 14 : 22)),
    drawn("text", { class: "quiet", x: x + 28, y: y + 40 }, parts.filter(Boolean).join(", ")),
    drawn("text", { class: "quiet", x: x + width - 10, y: y + 21, "text-anchor": "end" }, ray));
  if (!link) return made;
  return drawn("a", { href: `#${rowId(link)}`, id: `box-${rowId(link)}` }, made);
}

const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const rowId = (link) => `link-${link.key.replace(" ", "~")}`;

function rates(link) {
  const past = series.get(link.key);
  if (!past || !past.in.length) return "";
  return `↓ ${size(past.in.at(-1))}/s  ↑ ${size(past.out.at(-1))}/s`;
}

// For a narrow window, where no head of the table stands above its cells.
const COLUMNS = ["State", "Round trip", "Round trip, last hour", "In and out", "Traffic, last hour", "Connections"];

function links(data) {
  const key = data.links.map((link) => [link, Math.floor(data.now / 10)]);
  show("links", [key, taken], () => {
    if (data.links.length) return data.links.map((link) => row(link, data.now));
    return [element("tr", {}, element("td", { colspan: 8 }, "No machine has joined yet. Run `rayfwd join` on each, or `rayfwd add` here."))];
  });
}

function row(link, now) {
  const past = series.get(link.key);
  const lanes = link.lanes.length === 1 ? "1 lane" : `${link.lanes.length} lanes`;
  const held = link.streams.parked ? `${link.streams.open}, ${link.streams.parked} held` : `${link.streams.open}`;
  const name = link.key.startsWith("client ") ? `${link.peer} (client)` : link.peer;
  const cells = [
    `${link.state}, ${lanes}`,
    trip(link.rtt_ms),
    past ? chart([past.rtt_ms], trip, `Round-trip time to ${name}`) : "–",
    `${size(link.bytes.in)}, ${size(link.bytes.out)}`,
    past
      ? chart([past.in, past.out], (value) => `${size(value)}/s`, `Traffic with ${name}, in and out`)
      : "–",
    held,
  ].map((cell, index) => element("td", { role: "cell", "data-column": COLUMNS[index] }, cell));
  cells[0].className = quality(link.state);
  return element("tr", { id: rowId(link), role: "row" },
    element("th", { scope: "row", role: "rowheader" }, name),
    ...cells,
    element("td", { class: "words", role: "cell", "data-column": "Cuts" }, ...cuts(link, now)));
}

function cuts(link, now) {
  if (!link.cuts) return ["never"];
  const last = element("span", { class: "quiet" }, lastCut(link.last_cut, now));
  const through = link.ridden_through === link.cuts ? "all" : link.ridden_through;
  if (link.cuts === 1) return ["1 cut", last]; // which the line below is of
  return [`${link.cuts} cuts${link.ridden_through ? `, ${through} ridden through` : ""}`, last];
}

const HOUR = 360; // samples
const CHART = { width: 180, height: 44, top: 4, bottom: 40, left: 2, right: 110 };

// Lines over the last hour; a gap where nothing was measured. Its highest value stands beside it.
function chart(lists, words, what) {
  const measured = lists.flat().filter((value) => value !== null);
  const most = Math.max(...measured, 0);
  const title = measured.length
    ? `${what}, last hour: highest ${words(most)}, now ${lists.map((list) => words(list.at(-1) ?? null)).join(" and ")}`
    : `${what}: nothing measured yet`;
  const made = drawn("svg",
    { class: "chart", viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", "aria-label": title },
    drawn("title", {}, title),
    drawn("path", { class: "axis", d: `M${CHART.left} ${CHART.bottom}H${CHART.right}` }),
    ...lists.map((list, index) => drawn("path", { class: index ? "two" : "one", d: line(list, most) })));
  if (measured.length) {
    made.append(drawn("text", { class: "quiet", x: CHART.right + 4, y: 14 }, words(most)));
  }
  return made;
}

function line(list, most) {
  const across = (CHART.right - CHART.left) / (HOUR - 1);
  let d = "";
  let pen = "M";
  list.forEach((value, index) => {
    if (value === null) { pen = "M"; return; }
    const x = CHART.right - (list.length - 1 - index) * across;
    const y = CHART.bottom - (most ? value / most : 0) * (CHART.bottom - CHART.top);
    d += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  });
  return d;
}

const REASONS = {
  refused: "nothing listens there", unreachable: "no answer",
  not_in_plan: "this node does not offer that port", node_away: "the node is away",
};
const KERNEL = {
  refused_user: "this user may not connect", refused_port: "nobody serves the port",
  refused_node: "no such node", guarded_in: "from another machine, not through rayfwd",
};

function refused(data) {
  const { ports, users, kernel } = data.refused;
  show("refused", [ports, users, kernel], () => {
    const parts = [];
    if (ports.length) {
      parts.push(table("Ports that were dialled and refused", ["Dialled by", "On", "Why", "Message", "Times", "Last"],
        ports.map((each) => [each.by, each.of, REASONS[each.reason] || each.reason, each.cause, each.times, clock(each.last)])));
    }
    if (users.length) {
      parts.push(table("Users of this machine whose connections were reset", ["User", "Connections"],
        users.map((each) => [each.user, each.connections])));
    }
    const packets = Object.entries(kernel).filter(([, count]) => count);
    if (packets.length) {
      parts.push(table("Packets that the kernel refused", ["Why", "Packets"],
        packets.map(([why, count]) => [KERNEL[why] || why, count])));
    }
    return parts.length ? parts : [element("p", {}, "Nothing was refused.")];
  });
}

function table(caption, columns, rows) {
  const heads = columns.map((name) => element("th", { scope: "col", role: "columnheader" }, name));
  const cell = (value, index) =>
    element("td", { class: "words", role: "cell", "data-column": columns[index] }, String(value));
  return element("div", { class: "scroll" }, element("table", { class: "cards", role: "table" },
    element("caption", { class: "quiet" }, caption),
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads)),
    element("tbody", { role: "rowgroup" }, ...rows.map((cells) => element("tr", { role: "row" }, ...cells.map(cell))))));
}

// -- asking --------------------------------------------------------------------------------------

function remember(history) {
  const fresh = history.taken - taken;
  const before = series;
  series = new Map();
  for (const [peer, lists] of Object.entries(history.links)) {
    const old = before.get(peer);
    const joined = {};
    for (const [name, list] of Object.entries(lists)) {
      joined[name] = (old && fresh < history.length ? old[name].concat(list) : list).slice(-history.length);
    }
    series.set(peer, joined);
  }
  taken = history.taken;
}

async function ask() {
  const answer = await fetch(`data.json?since=${taken}`, {
    cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(PATIENCE),
  });
  if (!answer.ok) throw new Error(`the daemon answered ${answer.status}`);
  const data = await answer.json();
  if (data.boot !== boot) {
    const first = taken === 0;
    boot = data.boot;
    taken = 0;
    series = new Map();
    if (!first) return ask(); // another run of the daemon: its history from the beginning
  }
  return data;
}

let asking = false;

async function turn() {
  if (document.hidden || asking) return;
  asking = true;
  try {
    const data = await ask();
    heard = Date.now();
    latest = data;
    byId("stale").hidden = true;
    remember(data.history);
    head(data);
    conditions(data);
    picture(data);
    links(data);
    refused(data);
    document.documentElement.dataset.turn = String(Number(document.documentElement.dataset.turn || 0) + 1);
  } catch (error) {
    const since = heard === null ? "" : ` This is the state of ${new Date(heard).toLocaleTimeString()}.`;
    const stale = byId("stale");
    const text = `The daemon does not answer; still asking.${since}`;
    if (stale.hidden || stale.textContent !== text) stale.textContent = text;
    stale.hidden = false;
    console.warn(error);
  } finally {
    asking = false;
  }
}

async function work() {
  for (;;) {
    await turn();
    await new Promise((done) => setTimeout(done, PAUSE));
  }
}

for (const part of document.querySelectorAll("main, footer, #summary")) part.hidden = false;
document.addEventListener("visibilitychange", turn);
window.addEventListener("resize", () => { if (latest) picture(latest); });
work();
