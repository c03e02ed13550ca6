"use strict";
// Asks the daemon once a second and draws what it says. It reads only; everything is put in as text, never as markup.

const EVERY_MS = 1000;
const KEPT = 1800;
const SVG = "http://www.w3.org/2000/svg";
const PHASES = ["preflight", "expand", "backfill", "verify", "constrain", "flip", "watch", "done"];
const CHARTS = [
  { title: "Rows per second", columns: ["rows_per_second"], show: (v) => number(v) },
  { title: "Batch duration", columns: ["batch_p50_ms", "batch_p99_ms"], names: ["p50", "p99"], show: millis },
  { title: "Database answers within", columns: ["probe_latency_s"], show: (v) => millis(v * 1000) },
  { title: "Replica lag", columns: ["replica_lag_s"], show: (v) => `${v.toFixed(1)} s` },
];

let series = { columns: [], points: [] };
let last = null;      // the last answer
let lastAt = 0;       // when it came, by this browser's clock
let failing = null;   // since when there is none

const $ = (id) => document.getElementById(id);

/** In these states nothing happens before somebody says so. */
const STANDS = ["paused", "held", "failed"];

/** Sets a text only where it changed, so that nothing flickers and screen readers stay quiet. */
function put(id, text) {
  const element = typeof id === "string" ? $(id) : id;
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function number(n) {
  return Math.round(n).toLocaleString("en-US");
}

function millis(ms) {
  return ms >= 10000 ? `${(ms / 1000).toFixed(0)} s` : ms >= 100 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
}

function value(n, unit) {
  if (n === null) return "–"; // JSON knows no infinity
  const digits = Number.isInteger(n) || Math.abs(n) >= 100 ? 0 : 2;
  return `${Number(n.toFixed(digits)).toLocaleString("en-US")}${unit ? ` ${unit}` : ""}`;
}

/** Two units at most: `3 h 20 min`. */
function span(seconds) {
  if (seconds < 1) return "under 1 s";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return seconds < 600 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s` : `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} days ${hours % 24} h`;
}

function clock(ms, withDay) {
  const date = new Date(ms);
  const time = date.toLocaleTimeString("en-GB");
  return withDay && date.toDateString() !== new Date().toDateString() ? `${date.toISOString().slice(0, 10)} ${time}` : time;
}

function draw(s) {
  document.title = `${s.summary.label} · ${s.job}`;
  put("job", s.job);
  put("headline", s.summary.headline);
  put("mood", s.summary.label);
  $("mood").dataset.mood = s.summary.mood;
  drawTiles(s);
  drawPhases(s);
  put("next-text", s.summary.next.text);
  put("command", s.summary.next.command);
  $("next-line").hidden = !s.summary.next.command;
  drawProofs(s);
  drawSignals(s);
  drawEvents(s.events);
  const lease = s.lease.is_ours ? `holds the lease, epoch ${s.lease.epoch}` : s.lease.holder ? `standby; ${s.lease.holder} holds the lease` : "no lease";
  put("about", `${s.instance}: ${lease}, up for ${span((s.now_ms - s.started_ms) / 1000)}, backfilld ${s.version}`);
  $("picture").setAttribute("aria-busy", "false");
}

function drawTiles(s) {
  const ratio = s.summary.ratio;
  const percent = ratio === null ? "–" : `${(ratio * 100).toFixed(ratio > 0 && ratio < 0.1 ? 1 : 0)} %`;
  put("percent", percent);
  const bar = $("bar");
  bar.firstElementChild.style.width = `${(ratio || 0) * 100}%`;
  bar.setAttribute("aria-valuenow", Math.round((ratio || 0) * 100));
  bar.setAttribute("aria-valuetext", percent);
  const of = s.rows_estimate > 0 ? ` of about ${number(s.rows_estimate)}` : "";
  const walked = s.stored_phase === "verify" ? `${number(s.rows_verified)}${of} rows verified` : `${number(s.rows_scanned)}${of} rows walked, ${number(s.rows_updated)} filled`;
  put("rows", walked + (s.sweep > 1 ? `, sweep ${s.sweep}` : ""));
  const why = s.waiting[0];
  if (s.eta && why) {
    put("left", "–");
    put("ends", `about ${span(s.eta.seconds)} of work when it goes on`);
  } else if (s.eta) {
    const { seconds, least_seconds: least, most_seconds: most } = s.eta;
    const [from, to] = [span(least), span(most)];
    put("left", `${span(seconds)}`);
    put("ends", (from === to ? "" : `${from} to ${to}; `) + `this phase ends about ${clock(s.now_ms + seconds * 1000, true)}`);
  } else {
    put("left", "–");
    put("ends", s.summary.mood === "done" ? "nothing is left to do" : "not known now");
  }
  put("rate", s.summary.moves ? `${number(why ? 0 : s.rows_per_second)} rows/s` : "–");
  const sizes = s.batch_p99_ms === null ? "" : `batches: p50 ${millis(s.batch_p50_ms)}, p99 ${millis(s.batch_p99_ms)}`;
  put("size", sizes + (s.lanes.length > 1 ? `, ${s.lanes.length} lanes` : ""));
  $("wait-tile").classList.toggle("waits", Boolean(why));
  put("wait", why ? why.signal : STANDS.includes(s.status) ? "an operator" : "nothing");
  put("wait-why", why ? s.waiting.map((w) => w.text).join("; ") : s.note);
}

function drawPhases(s) {
  const times = new Map();
  for (const span of s.timeline) {
    const end = span.until_ms === null ? (span.phase === "done" ? span.since_ms : s.now_ms) : span.until_ms;
    times.set(span.phase, (times.get(span.phase) || 0) + Math.max(0, end - span.since_ms));
  }
  const now = PHASES.indexOf(s.stored_phase);
  const list = $("phases");
  PHASES.forEach((phase, i) => {
    const item = list.children[i] || list.appendChild(make("li"));
    const finished = s.status === "done";
    const state = i < now || finished ? "past" : i === now ? "now" : "todo";
    item.className = state === "now" && (s.status === "failed" || s.status === "rolling_back") ? "now stuck" : state;
    if (state === "now") item.setAttribute("aria-current", "step");
    else item.removeAttribute("aria-current");
    if (!item.firstChild) item.append(make("b", phase), make("span"));
    const took = times.has(phase) && phase !== "done" ? span(times.get(phase) / 1000) : "";
    put(item.lastChild, state === "past" ? (phase === "done" ? "reached" : took || "passed") : state === "now" ? took || "now" : "to come");
  });
}

function drawProofs(s) {
  const items = s.proofs.map((p) => {
    const item = make("li");
    item.append(make("span", p.passed ? "passed" : "not passed", p.passed ? "good" : "wrong"));
    item.append(` ${p.kind}: ${number(p.checked)} compared at ${clock(p.at_ms, true)} in ${span(p.duration_ms / 1000)}`);
    const found = Object.entries(p.findings).filter(([, n]) => n > 0);
    const looked = Object.keys(p.findings).join(", ");
    item.append(make("div", found.length ? found.map(([k, n]) => `${k} ${number(n)}`).join(", ") : looked ? `found nothing (${looked})` : "found nothing", "small"));
    return item;
  });
  if (!items.length) items.push(make("li", "Nothing is proven yet; verify comes after the backfill.", "small"));
  const aside = make("li");
  aside.append(make("span", number(s.quarantined), s.quarantined ? "wrong" : "good"));
  aside.append(s.quarantined ? ` rows in quarantine: they could not be updated and block the flip (table backfilld.quarantine)` : " rows in quarantine");
  replace("proofs", [...items, aside]);
}

function drawSignals(s) {
  const rows = s.signals.map((g) => {
    const row = make("tr", undefined, g.is_waiting ? "waits" : "");
    const limit = g.refuses ? "–" : `${g.is_floor ? "≥" : "≤"} ${value(g.threshold, g.unit)}`;
    const waited = s.throttled_seconds[g.signal];
    row.append(make("td", g.signal), make("td", g.refuses ? "no" : value(g.observed, g.unit)), make("td", limit), make("td", waited ? span(waited) : "–"));
    row.title = g.text;
    return row;
  });
  replace($("signals").tBodies[0], rows);
  $("signals").hidden = !rows.length;
  $("no-signals").hidden = rows.length > 0;
}

function drawEvents(events) {
  replace("events", [...events].reverse().map((e) => {
    const item = make("li");
    const time = make("time", clock(e.at_ms));
    time.dateTime = new Date(e.at_ms).toISOString();
    time.title = time.dateTime;
    const text = make("span", undefined, e.level);
    text.append(e.level === "info" ? e.message : `${e.level}: ${e.message}`);
    const fields = Object.entries(e.fields).filter(([k]) => k !== "job").map(([k, v]) => `${k} ${typeof v === "object" ? JSON.stringify(v) : v}`);
    if (fields.length) text.append(" ", make("span", fields.join(", "), "fields"));
    item.append(time, text);
    return item;
  }));
}

/** Puts children in only if they look different: what is selected or scrolled to stays. */
function replace(id, children) {
  const element = typeof id === "string" ? $(id) : id;
  const next = make(element.tagName);
  next.append(...children);
  if (next.innerHTML !== element.innerHTML) element.replaceChildren(...next.childNodes);
}

function drawCharts() {
  const box = $("charts");
  CHARTS.forEach((chart, i) => {
    const figure = box.children[i] || box.appendChild(make("div"));
    if (!figure.firstChild) {
      const picture = document.createElementNS(SVG, "svg");
      picture.setAttribute("role", "img");
      picture.setAttribute("preserveAspectRatio", "none");
      picture.setAttribute("viewBox", "0 0 600 100");
      figure.append(make("h3", chart.title), picture, make("div", undefined, "axis"));
      figure.firstChild.append(make("span"));
      figure.lastChild.append(make("span"), make("span", "now"));
    }
    drawChart(chart, figure);
  });
}

function drawChart(chart, figure) {
  const points = series.points;
  const [heading, picture, axis] = figure.children;
  const lines = chart.columns.map((name) => series.columns.indexOf(name));
  const end = points.length ? points[points.length - 1][0] : 0;
  const begin = points.length ? Math.min(points[0][0], end - 60000) : 0;
  const known = points.flatMap((p) => lines.map((c) => p[c]).filter((v) => v !== null));
  const top = Math.max(...known, 0) || 1;
  const x = (t) => (600 * (t - begin)) / (end - begin || 1);
  const y = (v) => 100 - (96 * v) / top;
  const parts = [50, 100].map((at) => shape("line", "grid", { x1: 0, x2: 600, y1: at, y2: at }));
  const held = series.columns.indexOf("waiting");
  let bands = "";
  points.forEach((p, i) => {
    if (p[held] && i + 1 < points.length) bands += `M${x(p[0]).toFixed(1)} 0H${x(points[i + 1][0]).toFixed(1)}V100H${x(p[0]).toFixed(1)}Z`;
  });
  if (bands) parts.push(shape("path", "held", { d: bands }));
  lines.forEach((column, i) => {
    let d = "";
    let before = null;
    for (const p of points) {
      if (p[column] === null) { before = null; continue; }
      // A gap where nothing was measured, or where the daemon was away.
      d += `${before === null || p[0] - before > 15000 ? "M" : "L"}${x(p[0]).toFixed(1)} ${y(p[column]).toFixed(1)}`;
      before = p[0];
    }
    if (d) parts.push(shape("path", i ? "b" : "a", { d }));
  });
  picture.replaceChildren(...parts);
  const newest = lines.map((c) => (points.length ? points[points.length - 1][c] : null));
  const said = newest.map((v, i) => `${chart.names ? `${chart.names[i]} ` : ""}${v === null || v === undefined ? "–" : chart.show(v)}`);
  const most = known.length ? `, highest ${chart.show(Math.max(...known))}` : "";
  const key = heading.lastChild;
  const text = said.join(", ") + most;
  if (key.textContent !== text) {
    key.replaceChildren(...said.flatMap((t, i) => [make("span", t, i ? "key-b" : "key-a"), i + 1 < said.length ? ", " : ""]), most);
  }
  picture.setAttribute("aria-label", `${chart.title}: now ${text}`);
  put(axis.firstChild, points.length ? `${span((end - begin) / 1000)} ago` : "");
}

function shape(tag, className, attributes) {
  const element = document.createElementNS(SVG, tag);
  element.setAttribute("class", className);
  for (const [name, v] of Object.entries(attributes)) element.setAttribute(name, v);
  return element;
}

function merge(more) {
  const newest = series.points.length ? series.points[series.points.length - 1][0] : 0;
  series.columns = more.columns;
  series.points.push(...more.points.filter((p) => p[0] > newest));
  series.points.splice(0, series.points.length - KEPT);
}

function away(why) {
  failing = failing || lastAt || Date.now();
  const banner = $("gone");
  const seconds = (Date.now() - failing) / 1000;
  const old = last ? " The picture below is from then." : "";
  put(banner, `${why} since ${clock(failing)} (${span(seconds)}).${old} Trying again; a job goes on at its checkpoint when its daemon does.`);
  banner.hidden = false;
  document.body.classList.add("stale");
  put("mood", "no answer");
  $("mood").dataset.mood = "unknown";
  document.title = "no answer · backfilld";
}

async function look() {
  try {
    const newest = series.points.length ? series.points[series.points.length - 1][0] : 0;
    const stop = AbortSignal.timeout(4000);
    const answer = await fetch(`api/v1/status?since=${newest}`, { cache: "no-store", signal: stop }).catch(() => null);
    if (answer === null) {
      away("The daemon does not answer");
    } else if (!answer.ok) {
      away(`The daemon answers ${answer.status}`);
    } else {
      last = await answer.json();
      lastAt = Date.now();
      failing = null;
      $("gone").hidden = true;
      put("gone", "");
      document.body.classList.remove("stale");
      merge(last.series);
      draw(last);
      drawCharts();
    }
  } catch (e) {
    away(`This page cannot read the daemon's answer (${e.message})`);
  }
  setTimeout(look, document.hidden ? EVERY_MS * 5 : EVERY_MS);
}

if (navigator.clipboard) {
  $("copy").hidden = false;
  $("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText($("command").textContent);
    put("copy", "Copied");
    setTimeout(() => put("copy", "Copy"), 2000);
  });
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && last) drawCharts(); });
look();
