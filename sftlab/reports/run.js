"use strict";
// The page of one run: what it shows of the data, and its plots.

const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const state = { log: null };
const curve = name => D.curves[name] ?? [];
const count = n => Number(n).toLocaleString("en-US");

// ---- head ------------------------------------------------------------------------------------------------------------
function head() {
  document.title = `${D.name}: run report`;
  $("name").replaceChildren(D.name, " ", html("span", { class: `pill ${D.status}` }, D.status));
  const about = [D.started && `started ${D.started.replace("T", " ").slice(0, 16)}`, D.commit && `commit ${D.commit}`, D.folder, D.group && `a point of ${D.group}`].filter(Boolean);
  $("about").textContent = about.join(" \u00b7 ");
  $("command").textContent = D.command;
  $("s-error").hidden = !D.error; $("error").textContent = D.error;
  const step = D.last.step ?? 0, spent = D.last.time_s ?? 0, left = D.max_steps && step ? (D.max_steps - step) * spent / step : null;
  const tile = (value, label) => html("div", { class: "tile" }, html("b", {}, ...[value].flat()), html("span", {}, label));
  const before = (name, label, digits = 4) => {
    if (D.last[name] === undefined) return null;
    const first = D.first[name], now = shown(D.last[name], digits);
    return tile(first !== undefined && step ? [html("i", {}, `${shown(first, digits)} \u2192 `), now] : [now], label);
  };
  const shown = (v, digits) => Math.abs(v) < 1e4 ? fixed(v, digits) : fig(v);
  const score = ["val/f1", "val/exact_match", ...Object.keys(D.last).filter(n => n.startsWith("val/") && !/loss|perplexity|token_accuracy/.test(n)), "val/token_accuracy"].find(n => D.last[n] !== undefined);
  $("tiles").replaceChildren(...[
    tile([count(step), html("i", {}, D.max_steps ? ` of ${count(D.max_steps)} steps` : " steps")], D.status === "running" && left !== null ? `${span(spent)} so far, ${span(left)} left` : `in ${span(spent)}`),
    before("val/loss", "validation loss, nats per target") ?? before("train/loss", "training loss, nats per target"),
    score ? before(score, score.slice(4)) : null,
    D.last["perf/examples_per_s"] === undefined ? null : tile(fig(D.last["perf/examples_per_s"], 3), "examples per second"),
    D.last["perf/mfu"] === undefined ? null : tile(`${(D.last["perf/mfu"] * 100).toFixed(1)} %`, "of the devices' peak (MFU)"),
    D.last["mem/peak_gib"] === undefined ? null : tile(`${fig(D.last["mem/peak_gib"], 3)} GiB`, "of memory, at most"),
  ].filter(Boolean));
  const silent = D.status === "running" && Date.now() / 1000 - D.written_s > 600;
  $("footer").textContent = `Written ${D.written}${silent ? ", more than ten minutes ago: the run is in a long phase, or it was killed" : ""}. Every figure is from this run's directory.` + (D.skipped ? ` ${D.skipped} steps were skipped because their loss was not finite.` : "");
}

// ---- tables ----------------------------------------------------------------------------------------------------------
const row = (cells, tag = "td") => html("tr", {}, ...cells.map(c => typeof c === "object" && c !== null ? c : html(tag, { class: tag === "th" ? "still" : typeof c === "number" ? "n" : "" }, typeof c === "number" ? count(c) : c)));
const table = (heads, rows) => [html("thead", {}, row(heads, "th")), html("tbody", {}, ...rows.map(r => row(r)))];

function differences() {
  $("s-differences").hidden = !D.differences.length;
  $("differences").replaceChildren(...table(["key", "default", "here"], D.differences.map(([k, a, b]) => [html("td", {}, html("code", {}, k)), a, html("td", { class: "here" }, b)])));
}

function machine() {
  const list = (title, entries) => html("div", {}, html("h3", {}, title), html("dl", { class: "facts" }, ...Object.entries(entries).flatMap(([k, v]) => [html("dt", {}, k), html("dd", {}, v)])));
  $("machine").replaceChildren(...[["Run", D.facts], ["Machine", { ...D.machine, platform: D.platform }], ["Versions", D.versions]].filter(([, e]) => Object.keys(e).length).map(([t, e]) => list(t, e)));
}

// ---- lines over steps ------------------------------------------------------------------------------------------------
// A series has name, points ([step, value] or [step, mean, least, greatest]), and perhaps a baseline.
function lines(box, title, series, { height = 230, log = false, percent = false } = {}) {
  series = series.filter(s => s.points.length);
  const values = series.flatMap(s => [...s.points.map(p => p[1]), ...(s.baseline === undefined ? [] : [s.baseline])]);
  if (!values.length) return;
  const { root, width } = canvas(box, height), lo = Math.min(...values), hi = Math.max(...values), left = 58, right = width - 12;
  const steps = series.flatMap(s => s.points.map(p => p[0])), x = scale(Math.min(0, ...steps), Math.max(1, ...steps), left, right);
  const y = scale(...padded(lo, hi, log, .05), height - 40, 28, log);
  yAxis(root, y, left, right, title + (log ? ", log scale" : ""), percent ? v => `${+(v * 100).toPrecision(3)} %` : undefined);
  for (const t of x.ticks(width < 420 ? 4 : 7)) svg("text", { x: x(t), y: height - 21, "text-anchor": "middle" }, root, fig(t));
  svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, root, "step");
  svg("line", { x1: left, x2: right, y1: height - 40, y2: height - 40, class: "axis" }, root);
  const clip = v => Math.min(height - 40, Math.max(20, y(log ? Math.max(v, Number.MIN_VALUE) : v)));
  const path = (points, at = 1) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${clip(p[at]).toFixed(1)}`).join("");
  series.forEach(s => {
    const c = categorical(s.colour ?? 0), banded = s.points.some(p => p.length > 2);
    if (s.baseline !== undefined) svg("line", { x1: left, x2: right, y1: y(s.baseline), y2: y(s.baseline), stroke: c, "stroke-dasharray": "5 5", opacity: .7 }, root);
    if (banded) svg("path", { d: path(s.points, 3) + path([...s.points].reverse(), 2).replace("M", "L") + "Z", fill: c, "fill-opacity": .16 }, root);
    const noisy = !banded && s.points.length > 150;
    svg("path", { d: path(s.points), fill: "none", stroke: c, "stroke-width": noisy ? 1 : 2, "stroke-opacity": noisy ? .4 : 1, "stroke-linejoin": "round" }, root);
    if (s.smooth && s.points.length > 150) svg("path", { d: path(smoothed(s.points)), fill: "none", stroke: c, "stroke-width": 2.2 }, root);
    else if (noisy) root.lastChild.setAttribute("stroke-opacity", 1);
    if (s.points.length <= 24) for (const p of s.points) svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 3, fill: c }, root);
  });
  const hair = svg("line", { y1: 24, y2: height - 40, class: "axis", "stroke-dasharray": "3 3", visibility: "hidden" }, root);
  root.onpointermove = event => {
    const px = event.clientX - root.getBoundingClientRect().left, near = s => s.points.reduce((a, b) => Math.abs(x(b[0]) - px) < Math.abs(x(a[0]) - px) ? b : a);
    const found = series.map(s => [s, near(s)]), step = found.reduce((a, b) => Math.abs(x(b[1][0]) - px) < Math.abs(x(a[1][0]) - px) ? b : a)[1][0];
    hair.setAttribute("x1", x(step)); hair.setAttribute("x2", x(step)); hair.setAttribute("visibility", "visible");
    showTip(event, html("b", {}, `step ${fig(step, 7)}`), ...found.map(([s, p]) => tipLine(categorical(s.colour ?? 0), p[0] === step ? s.name : `${s.name} (step ${fig(p[0], 7)})`, p.length > 2 ? `${fig(p[1])}  (${fig(p[2])} to ${fig(p[3])})` : fig(p[1]))));
  };
  root.onpointerleave = () => { hideTip(); hair.setAttribute("visibility", "hidden"); };
}
function smoothed(points) {
  const near = Math.max(2, Math.round(points.length / 60));
  return points.map((p, i) => { const part = points.slice(Math.max(0, i - near), i + near + 1); return [p[0], part.reduce((s, q) => s + q[1], 0) / part.length]; });
}
const legend = series => html("div", { class: "legend" }, ...series.map(s => html("span", { class: "key", "--c": categorical(s.colour ?? 0) }, s.name)));

function loss() {
  const series = [{ name: "training", points: curve("train/loss"), colour: 0, smooth: true }, { name: "validation", points: curve("val/loss"), colour: 1, baseline: D.first["val/loss"] }].filter(s => s.points.length);
  $("s-loss").hidden = !series.length;
  if (!series.length) return;
  const values = series.flatMap(s => s.points.map(p => p[1])), lo = Math.min(...values), hi = Math.max(...values);
  state.log ??= lo > 0 && hi / lo > 5;
  $("loss-note").textContent = "Nats per target." + (D.first["val/loss"] === undefined ? "" : ` Dashed: the validation loss before training, ${fig(D.first["val/loss"])}.`) + (series[0].points.some(p => p.length > 2) ? " The band goes from the lowest to the highest loss of the steps that a point joins." : "");
  const log = html("button", { class: state.log ? "on" : "" }, "log scale");
  log.onclick = () => { state.log = !state.log; draw(); };
  $("loss-tools").replaceChildren(legend(series), log);
  lines($("loss"), "loss", series, { height: innerWidth < 640 ? 280 : 340, log: state.log && lo > 0 });
}

function charts(id, wanted) {
  const grid = $(id), found = wanted.filter(w => w.series.some(s => s.points.length));
  $(`s-${id}`).hidden = !found.length;
  grid.replaceChildren(...found.map(() => html("div", { class: "chart" })));
  found.forEach((w, i) => lines(grid.children[i], w.title, w.series, w));
}
function scores() {
  const names = Object.keys(D.curves).filter(n => n.startsWith("val/") && !n.endsWith("loss"));
  charts("scores", names.map((n, i) => ({ title: n.slice(4), series: [{ name: n.slice(4), points: curve(n), baseline: D.first[n], colour: i + 1 }], log: n.endsWith("perplexity") && curve(n).every(p => p[1] > 0) && Math.max(...curve(n).map(p => p[1])) > 10 * Math.min(...curve(n).map(p => p[1])) })));
}
function training() {
  const one = (title, name, colour, more = {}) => ({ title, series: [{ name: title, points: curve(name), colour, ...more }], ...more });
  charts("training", [one("learning rate", "train/lr", 2), one("gradient norm", "train/grad_norm", 3, { smooth: true }), one("examples per second", "perf/examples_per_s", 0),
    one("tokens per second", "perf/tokens_per_s", 6), one("MFU", "perf/mfu", 4, { percent: true }), one("memory, GiB at most", "mem/peak_gib", 5)]);
}

// ---- where the time goes ---------------------------------------------------------------------------------------------
const PARTS = [["data", "waiting for data"], ["forward", "forward"], ["backward", "backward and gradient norm"], ["optimizer", "optimiser"], ["between", "logging, saving"], ["evaluation", "evaluation"]];
function time() {
  const found = PARTS.map(([key, label], i) => ({ label, s: D.time[`time/${key}_s`] ?? 0, colour: i })).filter(p => p.s > 0), all = found.reduce((s, p) => s + p.s, 0);
  $("s-time").hidden = !all;
  if (!all) return;
  const steps = Math.max(1, D.last.step ?? 1), training = found.filter(p => p.label !== "evaluation").reduce((s, p) => s + p.s, 0);
  $("time-note").textContent = `On the first rank, ${span(all)} in all; a step takes ${fig(training / D.timed_steps * 1000, 3)} ms without evaluation.`;
  const wide = innerWidth >= 640, { root, width } = canvas($("time"), 44 + found.length * 26);
  let at = 0;
  found.forEach((p, i) => {
    const w = p.s / all * width;
    svg("rect", { x: at, y: 2, width: Math.max(0, w - 1.5), height: 30, rx: 3, fill: categorical(p.colour) }, root);
    at += w;
    const y = 60 + i * 26;
    svg("rect", { x: 0, y: y - 10, width: 12, height: 12, rx: 3, fill: categorical(p.colour) }, root);
    svg("text", { x: 20, y, class: "title" }, root, p.label);
    svg("text", { x: wide ? 330 : width - 70, y, "text-anchor": "end" }, root, `${(p.s / all * 100).toFixed(1)} %`);
    svg("text", { x: wide ? 430 : width, y, "text-anchor": "end" }, root, span(p.s));
  });
}

// ---- answers ---------------------------------------------------------------------------------------------------------
function answers() {
  $("s-answers").hidden = !D.answers.length;
  if (!D.answers.length) return;
  const plain = t => t.trim().toLowerCase().replace(/[^\p{L}\p{N} ]/gu, "").replace(/\b(a|an|the)\b/g, " ").replace(/\s+/g, " ").trim();
  $("answers-note").textContent = "Greedy answers to the same validation examples at each evaluation. Green is one of the accepted answers, word for word.";
  $("answers").replaceChildren(...D.answers.map(a => {
    const { context, ask } = asked(a.prompt), rows = a.answers.filter(([step, t], i) => i === 0 || i === a.answers.length - 1 || t !== a.answers[i - 1][1]);
    return html("div", { class: "card" }, context ? html("p", { class: "context", title: "hover to read it all" }, context) : null, html("p", { class: "ask" }, ask),
      html("dl", {}, ...rows.flatMap(([step, t]) => [html("dt", {}, step ? `step ${count(step)}` : "before"), html("dd", { class: a.references.some(r => plain(r) === plain(t)) ? "right" : "wrong" }, t || "(nothing)")]),
        html("dt", {}, "expected"), html("dd", {}, [...new Set(a.references)].join(" / "))));
  }));
}

// ---- data ------------------------------------------------------------------------------------------------------------
function accounts() {
  const all = Object.entries(D.data.accounts ?? {}).flatMap(([split, sources]) => Object.entries(sources).map(([name, a]) => [`${split} ${name}`.trim(), a]));
  $("s-data").hidden = !all.length;
  if (!all.length) return;
  $("accounts").replaceChildren(...table(["source", "rows", "examples", "skipped", "dropped", "truncated", "duplicates", "tokens", "supervised"].map((h, i) => html("th", { class: i ? "still n" : "still" }, h)),
    all.map(([name, a]) => [name, a.rows, a.kept, a.skipped.count, Object.values(a.dropped).reduce((s, f) => s + f.count, 0), a.truncated.count, a.duplicates.count, a.tokens, a.supervised_tokens])));
  const found = all.flatMap(([name, a]) => [["skipped", a.skipped], ...Object.entries(a.dropped).map(([why, f]) => [`dropped, ${why}`, f]), ["truncated", a.truncated], ["end of text not supervised", a.end_not_supervised], ["duplicates", a.duplicates], ["rows that hold control tokens as text", a.control]]
    .filter(([, f]) => f && f.count).map(([what, f]) => `${name}: ${count(f.count)} ${what}: ${f.examples.join("; ")}${f.count > f.examples.length ? "; \u2026" : ""}`));
  if (D.data.overlap?.count) found.push(`${count(D.data.overlap.count)} validation examples are training examples too: ${D.data.overlap.examples.join("; ")}`);
  $("findings").replaceChildren(...found.map(t => html("p", { class: "note finding" }, t)));
  const grid = $("histograms");
  grid.replaceChildren(html("div", { class: "chart" }), html("div", { class: "chart" }));
  histogram(grid.children[0], "tokens per example", D.data.lengths ?? {}, 0);
  histogram(grid.children[1], "supervised tokens per example", D.data.supervised_lengths ?? {}, 2);
}
function histogram(box, title, counts, colour) {
  const entries = Object.entries(counts), most = Math.max(1, ...entries.map(([, n]) => n));
  const { root, width } = canvas(box, 34 + entries.length * 20), left = 92, x = scale(0, most, left, width - 64);
  svg("text", { x: 0, y: 14, class: "title" }, root, title);
  entries.forEach(([range, n], i) => {
    const y = 28 + i * 20, [a, b] = range.split("-");
    svg("text", { x: left - 8, y: y + 11, "text-anchor": "end" }, root, a === b ? count(a) : `${count(a)}\u2013${count(b)}`);
    svg("rect", { x: left, y, width: n ? Math.max(1.5, x(n) - left) : 0, height: 14, rx: 2, fill: categorical(colour), opacity: .85 }, root);
    svg("text", { x: x(n) + 6, y: y + 11 }, root, count(n));
  });
}

// ---- a row, drawn: every stretch of tokens over the ones that follow from it -----------------------------------------
function drawnRow() {
  const r = D.row, stretches = r.stretches ?? [];
  $("s-row").hidden = !stretches.length;
  if (!stretches.length) return;
  const saved = r.alone > r.tokens ? ` Alone they would be ${count(r.alone)} tokens.` : "";
  $("row-note").textContent = `${r.rows > 1 ? `One of the ${count(r.rows)} rows of step ${r.step}` : `The row of step ${r.step}`}, layout ${r.layout}: ${count(r.examples)} examples in ${count(r.tokens)} tokens.${saved} A stretch of tokens is computed once for all that stands below it; ${count(r.supervised)} tokens are learned (green).`;
  let start = 0;
  const boxes = stretches.map(s => { const b = { ...s, start, end: start + s.tokens }; start = b.end; return b; });
  for (const [i, b] of boxes.entries()) for (let j = i + 1; j < boxes.length && boxes[j].depth > b.depth; j++) b.end = boxes[j].start + boxes[j].tokens;
  const deepest = Math.max(...boxes.map(b => b.depth)), tall = 26, { root, width } = canvas($("row"), (deepest + 1) * tall + 24), x = scale(0, start, 0, width);
  for (const b of boxes) {
    const y = b.depth * tall, own = x(b.start + b.tokens) - x(b.start), learned = b.counted > 0;
    svg("rect", { x: x(b.start), y, width: Math.max(1, x(b.end) - x(b.start) - 1), height: tall - 3, rx: 3, fill: "var(--tint)" }, root);
    const e = svg("rect", { x: x(b.start), y, width: Math.max(1, own - 1), height: tall - 3, rx: 3, fill: learned ? "var(--good)" : "var(--accent)", opacity: .8 }, root);
    e.onpointermove = event => showTip(event, html("b", {}, `${b.tokens} tokens`), html("span", {}, b.runs.map(u => u[0]).join("").slice(0, 300)));
    e.onpointerleave = hideTip;
    if (own > 60) svg("text", { x: x(b.start) + 6, y: y + 16, style: "fill: var(--card)", "pointer-events": "none" }, root, `${count(b.tokens)}`);
  }
  svg("text", { x: 0, y: (deepest + 1) * tall + 16 }, root, `0`);
  svg("text", { x: width, y: (deepest + 1) * tall + 16, "text-anchor": "end" }, root, r.left_out ? `the first ${count(start)} of ${count(r.tokens)} tokens` : `${count(start)} tokens`);
  $("stretches").replaceChildren(...boxes.map(b => html("div", { class: "stretch", "--d": b.depth }, html("span", { class: "size" }, `${b.tokens}${b.counted > 1 ? `, counted ${b.counted} times` : ""}`),
    ...b.runs.map(([t, learned, special]) => html("span", { class: `${learned ? "learned" : ""} ${special ? "special" : ""}` }, t)))), r.left_out ? html("div", { class: "stretch", "--d": 0 }, `\u2026 and ${r.left_out} more`) : "");
}

function profile() {
  $("s-profile").hidden = !D.links.length && !D.profile;
  $("profile-note").replaceChildren(...(D.links.length ? ["Files: ", ...D.links.flatMap(l => [html("a", { href: l }, l), " "]), "A trace opens in ui.perfetto.dev or chrome://tracing, a memory snapshot in pytorch.org/memory_viz."] : []));
  $("profile").hidden = !D.profile; $("profile").textContent = D.profile;
}

// ---- all of it -------------------------------------------------------------------------------------------------------
function draw() { loss(); scores(); training(); time(); accounts(); drawnRow(); }
themed(() => draw());
head(); differences(); answers(); machine(); profile(); draw();
