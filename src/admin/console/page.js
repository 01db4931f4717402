// The page of the admin listener: asks /stats and /metrics every two seconds and draws what came of it. Nothing is kept: neither the
// token, nor what was seen before the page was opened.
"use strict";

const EVERY = 2000;
const KEPT = 150;
const OUTCOMES = ["hit", "stale", "miss", "collapsed", "pass", "failed", "client-left"];
const at = (id) => document.getElementById(id);

/** An element with a text, and attributes. */
function make(name, text, attributes = {}) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// Numbers for people.

const grouped = (number) => (number === null || number === undefined ? "–" : Math.round(number).toLocaleString("en"));
const percent = (ratio) => (ratio === null || Number.isNaN(ratio) ? "–" : `${(ratio * 100).toFixed(1)} %`);
const count = (number, one, many) => `${grouped(number)} ${number === 1 ? one : many}`;
function rate(number) {
  if (number === null) return "–";
  return number < 10 && number > 0 ? number.toFixed(1) : grouped(number);
}
function millis(ms) {
  if (ms === null || ms === undefined || Number.isNaN(ms)) return "–";
  if (ms === Infinity) return "> 30 s";
  return ms < 1 ? `${(ms * 1000).toFixed(0)} µs` : ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
function bytes(count) {
  if (count === null || count === undefined) return "–";
  let unit = 0;
  for (; count >= 1024 && unit < 3; unit += 1) count /= 1024;
  return `${unit ? count.toFixed(1) : count} ${["B", "KiB", "MiB", "GiB"][unit]}`;
}
function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "m"]]) if (seconds >= size && seconds % size === 0) return `${seconds / size}${unit}`;
  return `${seconds}s`;
}

// What the metrics page says.

/** Its series: name, labels, value. */
function series(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const [, name, labels, value] = /^sluice_(\w+)(?:\{(.*)\})? (\S+)$/.exec(line) || [];
    if (!name) continue;
    const pairs = {};
    for (const [, key, quoted] of (labels || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) pairs[key] = quoted.replace(/\\(.)/g, "$1");
    found.push({ name, labels: pairs, value: Number(value) });
  }
  return found;
}

/** The sums of a metric, by one of its labels. */
function sums(all, name, label) {
  const result = {};
  for (const one of all) if (one.name === name) result[one.labels[label]] = (result[one.labels[label]] || 0) + one.value;
  return result;
}

/** The buckets of all answers' times together: [upper bound in seconds, how many up to there]. */
function buckets(all) {
  const up = sums(all.filter((one) => one.labels.outcome !== "pass"), "request_seconds_bucket", "le");
  return Object.entries(up).map(([le, count]) => [le === "+Inf" ? Infinity : Number(le), count]).sort((a, b) => a[0] - b[0]);
}

/** A quantile of what came between two pages, in milliseconds. */
function quantile(before, after, share) {
  const old = new Map(before);
  const fresh = after.map(([le, count]) => [le, count - (old.get(le) || 0)]);
  const total = fresh.length ? fresh[fresh.length - 1][1] : 0;
  if (total <= 0) return null;
  let [low, below] = [0, 0];
  for (const [le, count] of fresh) {
    if (count >= share * total) return le === Infinity ? Infinity : 1000 * (low + ((le - low) * (share * total - below)) / Math.max(1, count - below));
    [low, below] = [le, count];
  }
  return null;
}

const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);

/** One look: what is counted, and when. */
function look(all) {
  return { when: performance.now(), outcomes: sums(all, "requests_total", "outcome"), backend: sum(sums(all, "backend_requests_total", "status")), buckets: buckets(all) };
}

/** How tiers and breakers are; `null` for what is not configured. */
function condition(stats, all) {
  const [memory, redis] = ["memory", "redis"].map((name) => stats.tiers.find((one) => one.tier === name));
  const breakers = sums(all, "breaker_open", "of");
  for (const [of, how] of Object.entries(stats.breakers)) breakers[of] = { open: 1, closed: 0 }[how] ?? null;
  return { memory: memory && memory.capacity ? memory.bytes / memory.capacity : null, redis: redis ? Number(redis.up) : null, breakers };
}

/** What came between two looks, a second. */
function between(before, after) {
  const seconds = (after.when - before.when) / 1000;
  const outcomes = {};
  // A restart begins at zero.
  for (const name of OUTCOMES) outcomes[name] = Math.max(0, (after.outcomes[name] || 0) - (before.outcomes[name] || 0)) / seconds;
  const cached = outcomes.hit + outcomes.stale + outcomes.miss + outcomes.collapsed;
  return {
    outcomes,
    requests: Math.max(0, sum(after.outcomes) - sum(before.outcomes)) / seconds,
    ratio: cached > 0 ? (outcomes.hit + outcomes.stale) / cached : null,
    backend: Math.max(0, after.backend - before.backend) / seconds,
    median: quantile(before.buckets, after.buckets, 0.5),
    p99: quantile(before.buckets, after.buckets, 0.99),
  };
}

// Drawing.

const CHARTS = [
  { title: "Requests a second", show: rate, lines: OUTCOMES.map((name) => [name, (one) => one.outcomes[name]]) },
  { title: "Hit ratio", show: percent, most: 1, lines: [["hit ratio", (one) => one.ratio]] },
  { title: "Time to the answer", show: millis, lines: [["median", (one) => one.median], ["p99", (one) => (one.p99 === Infinity ? 30000 : one.p99)]] },
  { title: "Asked of the backend, a second", show: rate, lines: [["asked", (one) => one.backend]] },
  {
    title: "Tiers", show: percent, most: 1,
    lines: [["memory filled", (one) => one.memory], ["Redis", (one) => one.redis, (value) => either(value, "up", "away")]],
  },
  {
    title: "Breakers", show: (value) => either(value, "open", "closed"), most: 1, scale: "open above, closed below",
    lines: ["backend", "redis", "mysql"].map((of) => [of, (one) => one.breakers[of] ?? null]),
  },
];

/** What one of two states is called. */
function either(value, on, off) {
  return value === null || value === undefined ? "–" : value ? on : off;
}

function draw(history) {
  at("charts").replaceChildren(...CHARTS.map((chart) => {
    const values = chart.lines.map(([, of]) => history.map(of));
    const most = chart.most || Math.max(...values.flat().filter((value) => value !== null), 0) || 1;
    const now = chart.lines.map(([name, , show], index) => `${name} ${(show || chart.show)(values[index].at(-1) ?? null)}`);
    const figure = make("figure");
    const caption = make("figcaption");
    const legend = make("span", undefined, { class: "legend" });
    legend.append(...now.map((text, index) => make("span", text, { class: `l${chart.lines.length > 1 ? index : 2}` })));
    caption.append(make("b", `${chart.title}, ${chart.scale || `up to ${chart.show(most)}`}`), legend);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [key, value] of Object.entries({ viewBox: "0 0 149 100", preserveAspectRatio: "none", role: "img", "aria-label": `${chart.title}: ${now.join(", ")}` })) svg.setAttribute(key, value);
    const shape = (name, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      svg.append(element);
    };
    for (const y of [1, 50, 99]) shape("line", { x1: 0, x2: 149, y1: y, y2: y });
    values.forEach((line, index) => {
      let pen = "M";
      const d = line.map((value, place) => {
        if (value === null) { pen = "M"; return ""; }
        const point = `${pen}${place + KEPT - line.length} ${(99 - (98 * Math.min(value, most)) / most).toFixed(2)}`;
        pen = "L";
        return point;
      }).join("");
      if (d) shape("path", { d, class: `s${chart.lines.length > 1 ? index : 2}` });
    });
    figure.append(caption, svg);
    return figure;
  }));
}

function tiles(stats, one) {
  const open = Object.entries(stats.breakers).filter(([, state]) => state === "open").map(([of]) => of);
  const rows = [
    ["Hit ratio", percent(one ? one.ratio : stats.total.hit_ratio)],
    ["Requests", one ? `${rate(one.requests)}/s` : "–"],
    ["Median", one ? millis(one.median) : "–"],
    ["99th percentile", one ? millis(one.p99) : "–"],
    ["Asked of the backend", one ? `${rate(one.backend)}/s` : "–"],
    ["Failed", one ? `${rate(one.outcomes.failed)}/s` : "–", one && one.outcomes.failed > 0 ? "bad" : ""],
    ["Left alone", open.join(", ") || "nothing", open.length ? "bad" : "good"],
    ["Connections", grouped(stats.connections)],
  ];
  at("tiles").replaceChildren(...rows.map(([term, value, kind]) => {
    const tile = make("div");
    tile.append(make("dt", term), make("dd", value, { class: kind || "" }));
    return tile;
  }));
}

/** Rows of a table: each the texts of its cells, the first one naming it. */
function fill(body, rows, none) {
  const lines = rows.map((cells) => {
    const row = make("tr");
    row.append(...cells.map((cell, index) => {
      const [text, kind] = Array.isArray(cell) ? cell : [cell, ""];
      return index ? make("td", text, { class: kind }) : make("th", text, { scope: "row" });
    }));
    return row;
  });
  if (!lines.length) lines.push(make("tr"));
  if (!rows.length) lines[0].append(make("td", none, { colspan: 13 }));
  body.replaceChildren(...lines);
}

const COLUMNS = ["Rule", "Requests", "Hit ratio", "Hits", "Stale", "Misses", "Joined", "Passed", "Refused", "Failed", "Mean hit", "Mean miss", "TTL"];

function tables(stats, all) {
  const routes = Object.entries(stats.routes).sort((a, b) => (b[1].mean_miss_ms || 0) - (a[1].mean_miss_ms || 0));
  fill(at("rules"), routes.map(([name, one]) => [
    name, grouped(one.requests), percent(one.hit_ratio), grouped(one.hits), grouped(one.stale), grouped(one.misses), grouped(one.collapsed),
    grouped(one.passed), grouped(one.refused), [grouped(one.failed), one.failed ? "bad" : ""], millis(one.mean_hit_ms), millis(one.mean_miss_ms), span(one.ttl_seconds),
  ]), "no rules: everything passes");
  const state = stats.tiers.map((tier) => [
    tier.tier, tier.up ? ["up", "good"] : ["away", "bad"],
    tier.bytes === null ? "–" : `${count(tier.entries, "entry", "entries")}, ${bytes(tier.bytes)} of ${bytes(tier.capacity)}`,
  ]);
  for (const [of, how] of Object.entries(stats.breakers)) state.push([`${of}, breaker`, [how, { closed: "good", open: "bad" }[how] || ""], "–"]);
  if (stats.timeline) {
    for (const [name, endpoint] of Object.entries(stats.timeline.endpoints)) state.push([`timeline: ${name}`, [endpoint.state, endpoint.state === "on" ? "good" : ""], "–"]);
    state.push(["timeline", "", `${count(stats.timeline.symbols, "symbol", "symbols")}, ${count(stats.timeline.spans, "span", "spans")}, ${bytes(stats.timeline.bytes)} of ${bytes(stats.timeline.capacity)}`]);
  }
  state.push(["purges that wait for Redis", stats.voids && stats.voids.waiting ? [grouped(stats.voids.waiting), "bad"] : "none", "–"]);
  fill(at("state"), state);
  fill(at("hottest"), stats.hottest.map((one) => [one.target, grouped(one.requests)]), "nothing yet");
  const limits = {};
  for (const { name, labels, value } of all) if (name === "limit_requests_total") (limits[labels.limit] ||= {})[labels.result] = value;
  fill(at("limits"), Object.entries(limits).map(([name, one]) => [name, grouped(one.allowed || 0), [grouped(one.refused || 0), one.refused ? "bad" : ""], grouped(one.reported || 0)]), "none that counted anything");
}

// Asking.

async function ask(path, options) {
  const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10000), ...options });
  const text = await answer.text();
  if (!answer.ok) {
    let reason = text;
    try { reason = JSON.parse(text).detail || text; } catch { /* It is no JSON: as it is. */ }
    throw new Error(`${answer.status}: ${reason.trim()}`);
  }
  return text;
}

const looks = [];
const history = [];

async function update() {
  try {
    const [page, metrics] = await Promise.all([ask("stats"), ask("metrics")]);
    const [stats, all] = [JSON.parse(page), series(metrics)];
    looks.push(look(all));
    if (looks.length > 1) history.push({ ...between(looks.shift(), looks[0]), ...condition(stats, all) });
    if (history.length > KEPT) history.shift();
    at("about").textContent = `${stats.version} · configuration ${stats.config.digest} since ${stats.config.since} · ${count(stats.config.rules, "rule", "rules")}`;
    at("trouble").hidden = true;
    tiles(stats, history.at(-1));
    draw(history);
    tables(stats, all);
  } catch (error) {
    // Said once, not with each try.
    if (at("trouble").hidden) at("trouble").textContent = `Sluice does not answer here: ${error.message}. What is shown is old.`;
    at("trouble").hidden = false;
  }
  setTimeout(update, EVERY);
}

// Explaining and changing.

at("explain").addEventListener("submit", async (event) => {
  event.preventDefault();
  let target = at("target").value.trim();
  try { const url = new URL(target); target = url.pathname + url.search; } catch { /* It is a path already. */ }
  at("explained").hidden = false;
  at("verdict").hidden = true;
  try {
    const text = await ask(`explain?target=${encodeURIComponent(target)}`);
    at("explained").textContent = text;
    // The last line says whether it is a hit.
    const verdict = text.trimEnd().split("\n").pop();
    at("verdict").textContent = verdict.replace(/^answer +/, "");
    at("verdict").hidden = !verdict.startsWith("answer ");
  } catch (error) {
    at("explained").textContent = error.message;
  }
});

/** Asks for the token, and does it. */
function change(question, path) {
  const dialog = at("confirm");
  at("question").textContent = question;
  dialog.onclose = async () => {
    const token = at("token").value;
    at("token").value = "";
    if (dialog.returnValue !== "yes") return;
    at("result").textContent = "…";
    try {
      at("result").textContent = await ask(path, { method: "POST", headers: { Authorization: `Bearer ${token}` } });
    } catch (error) {
      at("result").textContent = error.message;
    }
  };
  dialog.returnValue = "no";
  dialog.showModal();
  at("token").focus();
}

at("purge").addEventListener("submit", (event) => {
  event.preventDefault();
  const [kind, what, soft] = [at("kind").value, at("what").value, at("soft").checked];
  change(`Purge everything by ${kind} ${what}${soft ? ", softly" : ""}, on every instance?`, `purge?${kind}=${encodeURIComponent(what)}&soft=${soft}`);
});
at("reload").addEventListener("click", () => change("Read the configuration file again, and serve by it?", "reload"));
at("warm").addEventListener("click", () => change("Ask the backend for all targets of [warm]?", "warm"));

at("rule-heads").append(...COLUMNS.map((name) => make("th", name, { scope: "col" })));
update();
