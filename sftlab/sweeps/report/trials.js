"use strict";
// Plots of the points as trials: best so far, two hyperparameters at once, what a score costs, when each point ran.

const pointTip = (p, ...more) => [html("b", {}, `point ${p.label}`), ...HYPER.map(k => tipLine(colour(p), short(k), p.settings[k] || "-")), tipLine(colour(p), D.metric, shown(p.score), true), ...more];
function dotFor(root, p, x, y, r = 4.4) {
  const on = visible(p), dot = svg("circle", { cx: x, cy: y, r: p.num === D.winner ? r + 1.8 : r, fill: on ? colour(p) : "var(--line)", "fill-opacity": .85, stroke: "var(--card)", "stroke-width": 1.2, ...(on ? { "data-key": keyOf(p) } : {}) }, root);
  dot.onpointermove = event => showTip(event, ...pointTip(p, tipLine(colour(p), "hours", fig(p.hours, 3)), ...(p.memory === null ? [] : [tipLine(colour(p), "GiB", fig(p.memory, 3))])));
  dot.onpointerleave = hideTip;
  return dot;
}
function frame(box, height, xs, ys, titles, logX = false) {
  const { root, width } = canvas(box, height), x = scale(...padded(Math.min(...xs), Math.max(...xs), logX, .04), 54, width - 14, logX), y = scale(...padded(Math.min(...ys), Math.max(...ys), false, .08), height - 40, 26);
  yAxis(root, y, 54, width - 14, titles[1]);
  for (const t of x.ticks(width < 420 ? 4 : 6)) svg("text", { x: x(t), y: height - 21, "text-anchor": "middle" }, root, fig(t));
  svg("text", { x: (40 + width) / 2, y: height - 4, "text-anchor": "middle", class: "title" }, root, titles[0] + (logX ? ", log scale" : ""));
  svg("line", { x1: 54, x2: width - 14, y1: height - 40, y2: height - 40, class: "axis" }, root);
  return { root, x, y, width };
}

function trials() {
  const ended = FINISHED.filter(visible);
  $("s-trials").hidden = ended.length < 3;
  if (ended.length < 3) { $("trials").replaceChildren(); return; }
  const { root, x, y, width } = frame($("trials"), 250, ended.map(p => p.num), ended.map(p => p.score), ["point", D.metric]);
  let best = null, d = "";
  for (const p of ended) {
    if (best === null || better(p.score, best) < 0) { d += best === null ? `M${x(p.num)} ${y(p.score)}` : `H${x(p.num)}V${y(p.score)}`; best = p.score; }
  }
  svg("path", { d: `${d}H${width - 14}`, fill: "none", stroke: "var(--accent)", "stroke-width": 2.2 }, root);
  for (const p of ended) dotFor(root, p, x(p.num), y(p.score));
}

// Between the points the colour is the mean of all scores, weighted by 1 / distance^3.
function contour() {
  const numeric = HYPER.filter(h => levels(h).length > 1 && levels(h).every(l => num(l) !== null)), shares = D.importance.shares.map(s => s.name).filter(n => numeric.includes(n));
  const [a, b] = [...shares, ...numeric.filter(n => !shares.includes(n))];
  $("s-contour").hidden = !b || FINISHED.length < 4;
  if ($("s-contour").hidden) return;
  $("contour-note").textContent = `${short(a)} and ${short(b)}, the two that explain most of the scores. A dot is a run; the colour between them is an estimate, the mean of the scores weighted by their nearness.`;
  const spread = h => { const v = levels(h).map(num); return Math.min(...v) > 0 && Math.max(...v) / Math.min(...v) >= 8; };
  const { root, width, height } = canvas($("contour"), innerWidth < 640 ? 300 : 380), left = 74, right = width - 96;
  const axis = (h, r0, r1) => { const v = levels(h).map(num), log = spread(h); return scale(...padded(Math.min(...v), Math.max(...v), log, .1), r0, r1, log); };
  const x = axis(a, left, right), y = axis(b, height - 40, 22), scores = FINISHED.map(p => p.score).sort(better), best = scores[0], worst = scores[scores.length - 1];
  const shade = s => ramp(best === worst ? 1 : (s - worst) / (best - worst));
  const dots = FINISHED.map(p => ({ p, px: x(num(p.settings[a])), py: y(num(p.settings[b])) }));
  const cells = 44, w = (right - left) / cells, h = (height - 62) / (cells / 2);
  const field = svg("g", { opacity: .62, "shape-rendering": "crispEdges" }, root);
  for (let i = 0; i < cells; i++) for (let j = 0; j < cells / 2; j++) {
    const cx = left + (i + .5) * w, cy = 22 + (j + .5) * h;
    let sum = 0, weight = 0;
    for (const d of dots) { const k = 1 / (((d.px - cx) / (right - left)) ** 2 + ((d.py - cy) / (height - 62)) ** 2 + 1e-4) ** 1.5; sum += k * d.p.score; weight += k; }
    svg("rect", { x: left + i * w, y: 22 + j * h, width: w + .6, height: h + .6, fill: shade(sum / weight) }, field);
  }
  for (const l of levels(a).length <= 8 ? levels(a).map(num) : x.ticks(6)) svg("text", { x: x(l), y: height - 22, "text-anchor": "middle" }, root, fig(l));
  for (const l of levels(b).length <= 8 ? levels(b).map(num) : y.ticks(6)) svg("text", { x: left - 8, y: y(l) + 4, "text-anchor": "end" }, root, fig(l));
  svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle", class: "title" }, root, a);
  svg("text", { x: 2, y: 12, class: "title" }, root, b);
  for (let i = 0; i < 40; i++) svg("rect", { x: right + 18, y: 22 + i * (height - 62) / 40, width: 12, height: (height - 62) / 40 + .6, fill: ramp(1 - i / 39), opacity: .8 }, root);
  svg("text", { x: right + 36, y: 32 }, root, shown(best)); svg("text", { x: right + 36, y: height - 42 }, root, shown(worst));
  for (const { p, px, py } of dots) dotFor(root, p, px, py, 4).setAttribute("fill", shade(p.score));
}

function costs() {
  const wanted = [["hours", D.gpus ? "GPU-hours" : "process-hours"], ["memory", "GiB at most"]].map(([key, title]) => [key, title, FINISHED.filter(p => p[key] > 0)]).filter(([, , points]) => points.length > 1);
  $("s-costs").hidden = !wanted.length;
  const grid = $("costs");
  grid.replaceChildren(...wanted.map(() => html("div", { class: "chart" })));
  wanted.forEach(([key, title, points], i) => {
    const values = points.map(p => p[key]), log = Math.max(...values) / Math.min(...values) > 20, { root, x, y } = frame(grid.children[i], 260, values, points.map(p => p.score), [title, D.metric], log);
    const front = [];
    for (const p of [...points].sort((a, b) => a[key] - b[key] || better(a.score, b.score))) if (!front.length || better(p.score, front[front.length - 1].score) < 0) front.push(p);
    svg("path", { d: front.map((p, k) => `${k ? "L" : "M"}${x(p[key])} ${y(p.score)}`).join(""), fill: "none", stroke: "var(--accent)", "stroke-width": 1.8, "stroke-dasharray": "5 4" }, root);
    for (const p of points) dotFor(root, p, x(p[key]), y(p.score), front.includes(p) ? 5 : 3.8);
  });
}

const CAUSES = { finished: "var(--good)", running: "var(--accent)", pruned: "var(--faint)", oom: "#d9622b", timeout: "#a67c00", node: "#b8408a", preempted: "#7d5bd0", stopped: "#1690b0", code: "var(--bad)" };
function timeline() {
  const ran = D.points.filter(p => p.began_s && p.ended_s);
  $("s-timeline").hidden = ran.length < 2;
  if (ran.length < 2) return;
  const lo = Math.min(...ran.map(p => p.began_s)), hi = Math.max(...ran.map(p => p.ended_s), lo + 1), tall = ran.length > 40 ? 9 : 18, { root, width } = canvas($("timeline"), ran.length * tall + 34);
  const x = scale(0, hi - lo, 44, width - 10), unit = hi - lo > 7200 ? [3600, "hours"] : hi - lo > 180 ? [60, "minutes"] : [1, "seconds"];
  for (const t of ticks(0, (hi - lo) / unit[0], 6)) {
    svg("line", { x1: x(t * unit[0]), x2: x(t * unit[0]), y1: 0, y2: ran.length * tall, class: "grid" }, root);
    svg("text", { x: x(t * unit[0]), y: ran.length * tall + 16, "text-anchor": "middle" }, root, fig(t));
  }
  svg("text", { x: width - 10, y: ran.length * tall + 31, "text-anchor": "end" }, root, `${unit[1]} since the first point began`);
  ran.forEach((p, i) => {
    const what = p.cause || p.state;
    if (tall > 10 || i % 5 === 0) svg("text", { x: 36, y: i * tall + tall - 5, "text-anchor": "end" }, root, p.num);
    const bar = svg("rect", { x: x(p.began_s - lo), y: i * tall + 2, width: Math.max(2, x(p.ended_s - lo) - x(p.began_s - lo)), height: tall - 4, rx: 3, fill: CAUSES[what] ?? "var(--bad)", opacity: .85 }, root);
    bar.onpointermove = event => showTip(event, ...pointTip(p, tipLine(CAUSES[what] ?? "var(--bad)", what, span(p.ended_s - p.began_s)), ...(p.error ? [html("span", {}, p.error.slice(0, 200))] : [])));
    bar.onpointerleave = hideTip;
  });
  const seen = [...new Set(ran.map(p => p.cause || p.state))], hours = ran.reduce((s, p) => s + (p.hours ?? 0), 0);
  $("timeline-note").replaceChildren(`${fig(hours, 3)} ${D.gpus ? "GPU-hours" : "process-hours"} in all. `, ...seen.map(s => html("span", { class: "key", "--c": CAUSES[s] ?? "var(--bad)" }, `${s} (${ran.filter(p => (p.cause || p.state) === s).length})`)));
}

// ---- the table as a file ---------------------------------------------------------------------------------------------
function csv() {
  const metrics = [...new Set(D.points.flatMap(p => Object.keys(p.last)))], cell = v => { const t = v === null || v === undefined ? "" : String(v), safe = /^[=+@\t\r]|^-(?![\d.])/.test(t) ? `'${t}` : t; return /[",\n]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe; };
  const rows = [["point", ...D.params, "state", "cause", "step", "time_s", "hours", "peak_gib", ...metrics], ...D.points.filter(visible).map(p => [p.label, ...D.params.map(k => p.settings[k]), p.state, p.cause, p.step, p.time_s, p.hours, p.memory, ...metrics.map(m => p.last[m])])];
  return rows.map(r => r.map(cell).join(",")).join("\r\n") + "\r\n";
}
$("csv").onclick = () => html("a", { href: `data:text/csv;charset=utf-8,${encodeURIComponent(csv())}`, download: `${D.name.replace(/[^\w-]+/g, "_")}.csv` }).click();
