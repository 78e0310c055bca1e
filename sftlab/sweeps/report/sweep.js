"use strict";
// The page: what it shows of the data, and the plots.

const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const LEAVES = D.params.map(p => p.split(".").pop());
const short = p => { const leaf = p.split(".").pop(); return LEAVES.filter(l => l === leaf).length > 1 ? p : leaf; };
const HYPER = D.params.filter(p => !D.seeds.includes(p));
const FINISHED = D.points.filter(p => p.state === "finished" && p.score !== null);
const BAD = p => !["finished", "running", "pending", "pruned", "configuring", "completing"].includes(p.state);
const better = (a, b) => D.lower ? a - b : b - a;
const describe = settings => Object.entries(settings).filter(([k]) => HYPER.includes(k)).map(([k, v]) => `${short(k)} ${v || "-"}`).join(", ") || "default";
const scoreDigits = (() => { const s = FINISHED.map(p => Math.abs(p.score)); return s.length && Math.max(...s) < 10 ? 4 : 2; })();
const shown = v => v === null || v === undefined ? "" : Math.abs(v) < 1e5 && Math.abs(v) >= 1e-3 || v === 0 ? fixed(v, scoreDigits) : fig(v, 3);

// ---- colours: one legend for all plots -------------------------------------------------------------------------------
const state = { by: "settings", off: new Set(), hot: null, metric: null, log: null, brushes: {}, find: "", order: [...D.params, "score"] };
const levels = name => [...new Set(D.points.map(p => p.settings[name] ?? ""))].sort((a, b) => num(a) !== null && num(b) !== null ? num(a) - num(b) : a < b ? -1 : 1);
state.by = D.groups.length <= 10 ? "settings" : HYPER[0] ?? "settings";

function keyOf(p) {
  if (state.by === "settings") return p.group;
  if (state.by === "score") return p.num;
  return p.settings[state.by] ?? "";
}
function keys() {
  if (state.by === "settings") return D.groups.map((g, i) => ({ key: i, label: describe(g.settings) }));
  if (state.by === "score") return [];
  return levels(state.by).map(l => ({ key: l, label: `${short(state.by)} ${l || "-"}` }));
}
function colour(p) {
  if (state.by === "settings") return D.groups.length <= 10 ? categorical(p.group) : ramp(p.group / (D.groups.length - 1));
  if (state.by === "score") {
    const s = FINISHED.map(q => q.score).sort(better);
    return p.score === null ? "var(--faint)" : ramp(1 - s.findIndex(v => better(v, p.score) >= 0) / Math.max(1, s.length - 1));
  }
  const all = levels(state.by), i = all.indexOf(p.settings[state.by] ?? "");
  return all.every(l => num(l) !== null) ? ramp(all.length > 1 ? i / (all.length - 1) : .5) : categorical(i);
}
const found = p => state.find.toLowerCase().split(/\s+/).every(word => [`point ${p.label}`, p.state, p.cause, ...Object.entries(p.settings).map(([k, v]) => `${k}=${v}`)].join(" ").toLowerCase().includes(word));
const visible = p => !state.off.has(keyOf(p)) && found(p) && Object.entries(state.brushes).every(([k, [a, b]]) => { const v = place[k]?.(p); return v === undefined || (v !== null && v >= a && v <= b); });
const place = {};

function legend() {
  const box = $("legend");
  box.replaceChildren();
  const pick = html("select", { "aria-label": "colour by" });
  for (const [value, label] of [["settings", "settings"], ...HYPER.map(h => [h, short(h)]), ["score", "score"]]) pick.append(html("option", { value }, label));
  pick.value = state.by;
  pick.onchange = () => { state.by = pick.value; state.off.clear(); draw(); };
  box.append(html("label", {}, "colour by ", pick));
  const find = html("input", { type: "search", id: "find", placeholder: "find: lr=1e-5 failed", "aria-label": "filter points", value: state.find });
  find.oninput = () => { state.find = find.value; draw(); const again = $("find"); if (again) { again.focus(); again.setSelectionRange(find.value.length, find.value.length); } };
  box.append(find);
  const all = keys();
  if (all.length > 24) { box.append(html("span", { class: "note" }, `${all.length} settings, best to worst`)); return; }
  for (const { key, label } of all) {
    const p = D.points.find(q => keyOf(q) === key);
    const b = html("button", { class: state.off.has(key) ? "key off" : "key", "--c": colour(p), title: "click to hide or show" }, label);
    b.onclick = () => { state.off.has(key) ? state.off.delete(key) : state.off.add(key); draw(); };
    b.onmouseenter = () => { state.hot = key; heat(); };
    b.onmouseleave = () => { state.hot = null; heat(); };
    box.append(b);
  }
}
function heat() {
  for (const e of document.querySelectorAll("[data-key]")) e.style.opacity = state.hot === null || e.dataset.key === String(state.hot) ? "" : ".12";
}

// ---- head ------------------------------------------------------------------------------------------------------------
function head() {
  document.title = `${D.name}: ${D.kind} report`;
  $("kind").textContent = D.kind;
  $("s-advice").hidden = !D.advice.length;
  $("advice").replaceChildren(...D.advice.map(a => html("li", {}, a.text, ...(a.command ? [html("code", {}, a.command)] : []))));
  $("name").textContent = D.name;
  const about = [D.command && html("code", {}, D.command), D.commit && `commit ${D.commit}`, D.folder].filter(Boolean);
  $("about").replaceChildren(...about.flatMap((a, i) => i ? [" \u00b7 ", a] : [a]));
  const best = D.groups[0], finished = D.points.filter(p => p.state === "finished").length, failed = D.points.filter(BAD).length;
  const tile = (value, label, cls = "") => html("div", { class: `tile ${cls}` }, html("b", {}, ...value), html("span", {}, label));
  const seeds = best && best.scored.length > 1, t = D.points.reduce((s, p) => s + (p.time_s ?? 0), 0);
  const boxes = [];
  if (best && best.mean !== null) {
    boxes.push(tile([shown(best.mean), best.deviation !== null ? html("i", {}, ` \u00b1 ${shown(best.deviation)}`) : ""], seeds ? `best ${D.metric}, mean of ${best.scored.length} seeds` : `best ${D.metric}`));
    boxes.push(tile([describe(best.settings)], "the winner's settings", "wide"));
  }
  boxes.push(tile([`${finished}`, html("i", {}, ` of ${D.points.length}`)], failed ? `points finished, ${failed} missing or failed` : "points finished"));
  boxes.push(tile([span(t)], "of training, all points"));
  const hours = D.points.reduce((s, p) => s + (p.hours ?? 0), 0);
  if (D.gpus) boxes.push(tile([fig(hours, 3)], "GPU-hours in all"));
  $("tiles").replaceChildren(...boxes);
  $("verdict").textContent = [`Ranked by the ${D.score === "last" ? "last" : "best"} ${D.metric} of finished runs, ${D.lower ? "lower" : "higher"} is better.`, D.verdict].join(" ");
  $("footer").textContent = `Written ${D.written}. Every figure is from the runs' metrics.jsonl; means and deviations (n - 1) are over seeds.`;
  $("s-again").hidden = !D.best_yaml; $("again").textContent = D.best_yaml;
}

// ---- tables ----------------------------------------------------------------------------------------------------------
function table(element, columns, rows) {
  const body = html("tbody"), header = html("tr");
  let by = null, down = false;
  const fill = () => body.replaceChildren(...rows.map(r => r.row));
  columns.forEach((c, i) => {
    const th = html("th", { class: c.right ? "n" : "", scope: "col" }, c.label);
    th.onclick = () => {
      down = by === i ? !down : false; by = i;
      const v = r => r.values[i], empty = x => x === null || x === undefined || x === "";
      rows.sort((a, b) => empty(v(a)) - empty(v(b)) || (typeof v(a) === "number" && typeof v(b) === "number" ? v(a) - v(b) : String(v(a)).localeCompare(String(v(b)), undefined, { numeric: true })) * (down ? -1 : 1));
      for (const o of header.children) o.classList.remove("up", "down");
      th.classList.add(down ? "down" : "up");
      fill();
    };
    header.append(th);
  });
  fill();
  element.replaceChildren(html("thead", {}, header), body);
}
const cell = (text, right = false, value = null) => html("td", { class: right ? "n" : "", ...(value !== null ? { "data-value": value } : {}) }, text);
const sortable = text => num(text) ?? text;

function rankingTable() {
  const scores = FINISHED.map(p => p.score), lo = Math.min(...scores), hi = Math.max(...scores);
  const columns = [{ label: "rank", right: true }, ...HYPER.map(h => ({ label: short(h), right: levels(h).every(l => num(l) !== null) })), { label: `mean ${D.metric}`, right: true }, { label: "deviation", right: true },
    { label: "seeds", right: true }, { label: "scores" }, { label: "points" }];
  const rows = D.groups.map((g, i) => {
    const p = D.points.find(q => q.num === g.points[0]);
    const strip = html("td", { class: "spread" });
    if (scores.length) {
      const s = svg("svg", { viewBox: "0 0 200 26", preserveAspectRatio: "none" });
      const x = scale(...padded(lo, hi, false, .03), 0, 200);
      svg("line", { x1: 0, x2: 200, y1: 13, y2: 13, class: "grid" }, s);
      for (const q of g.scored) svg("line", { x1: x(D.points.find(o => o.num === q).score), x2: x(D.points.find(o => o.num === q).score), y1: 6, y2: 20, stroke: colour(p), "stroke-width": 2, "vector-effect": "non-scaling-stroke", opacity: .55 }, s);
      if (g.mean !== null) svg("line", { x1: x(g.mean), x2: x(g.mean), y1: 2, y2: 24, stroke: colour(p), "stroke-width": 3.5, "vector-effect": "non-scaling-stroke" }, s);
      strip.append(s);
    }
    const lacking = g.scored.length < g.points.length;
    const row = html("tr", { class: i === 0 && g.mean !== null ? "win" : "", "data-group": i }, cell(g.mean === null ? "-" : i + 1, true),
      ...HYPER.map((h, k) => cell(g.settings[h] || "-", columns[k + 1].right)), cell(shown(g.mean), true, g.mean), cell(shown(g.deviation), true, g.deviation),
      html("td", { class: lacking ? "n bad" : "n", "data-value": g.scored.length }, lacking ? `${g.scored.length} of ${g.points.length}` : g.scored.length), strip, cell(g.points.map(n => D.points.find(q => q.num === n).label).join(" ")));
    return { row, values: [i + 1, ...HYPER.map(h => sortable(g.settings[h])), g.mean, g.deviation, g.scored.length, g.mean, g.points[0]] };
  });
  table($("ranking"), columns, rows);
}

function pointsTable() {
  const metrics = [...new Set([D.metric, ...D.points.flatMap(p => Object.keys(p.last))])];
  const columns = [{ label: "point", right: true }, ...D.params.map(h => ({ label: short(h), right: levels(h).every(l => num(l) !== null) })), { label: "state" }, { label: "step", right: true },
    ...metrics.map(m => ({ label: m, right: true })), { label: "time", right: true }, { label: D.gpus ? "GPU-hours" : "hours", right: true }];
  const rows = D.points.filter(visible).map(p => {
    const point = html("td", { class: "n" }, html("span", { class: "swatch", "--c": colour(p) }), p.report ? html("a", { href: p.report }, p.label) : p.label);
    const row = html("tr", { class: p.num === D.winner ? "win" : "", "data-point": p.num }, point, ...D.params.map((h, k) => cell(p.settings[h] || "-", columns[k + 1].right)),
      html("td", { class: `state ${BAD(p) ? "bad" : p.state}` }, p.cause && p.cause !== p.state ? `${p.state}: ${p.cause}` : p.state), cell(p.step === null ? "" : p.max_steps ? `${p.step}/${p.max_steps}` : p.step, true, p.step),
      ...metrics.map(m => cell(fig(p.last[m]), true, p.last[m] ?? null)), cell(span(p.time_s), true, p.time_s), cell(fig(p.hours, 3), true, p.hours));
    return { row, values: [p.num, ...D.params.map(h => sortable(p.settings[h] ?? "")), p.state, p.step, ...metrics.map(m => p.last[m] ?? null), p.time_s, p.hours] };
  });
  table($("points"), columns, rows);
}

// ---- curves: a mean and a band over seeds, or one line a run ---------------------------------------------------------
function curveTools(metrics) {
  const box = $("curve-tools");
  box.replaceChildren();
  for (const m of metrics) {
    const b = html("button", { class: m === state.metric ? "on" : "" }, m);
    b.onclick = () => { state.metric = m; state.log = null; draw(); };
    box.append(b);
  }
  const log = html("button", { class: state.log ? "on" : "" }, "log scale");
  log.onclick = () => { state.log = !state.log; draw(); };
  box.append(log);
}
function bundles(metric) {
  const runs = D.points.filter(p => visible(p) && (p.curves[metric] ?? []).length > 0), groups = new Map();
  for (const p of runs) groups.set(p.group, [...(groups.get(p.group) ?? []), p]);
  return [...groups.values()].map(points => {
    const ended = points.filter(p => p.state === "finished"), whole = ended.length ? ended : points, at = new Map();
    for (const p of whole) for (const [s, v] of p.curves[metric]) at.set(s, [...(at.get(s) ?? []), v]);
    const steps = [...at.keys()].sort((a, b) => a - b).filter(s => at.get(s).length === whole.length);
    const mean = steps.map(s => [s, at.get(s).reduce((a, b) => a + b) / whole.length]);
    const band = steps.map(s => [s, Math.min(...at.get(s)), Math.max(...at.get(s))]);
    return { points, rest: points.filter(p => !whole.includes(p)), mean: steps.length > 1 || whole.every(p => p.curves[metric].length < 2) ? mean : whole[0].curves[metric], band: whole.length > 1 ? band : [], label: describe(D.groups[points[0].group].settings) };
  });
}
function curves() {
  const metrics = Object.keys(D.points[0]?.curves ?? {}).filter(m => D.points.some(p => p.curves[m].length));
  $("s-curves").hidden = !metrics.length;
  if (!metrics.length) return;
  state.metric ??= D.shown_curve;
  if (!metrics.includes(state.metric)) state.metric = metrics[0];
  const all = bundles(state.metric), values = all.flatMap(b => [...b.mean.map(m => m[1]), ...b.band.flatMap(m => [m[1], m[2]]), ...b.rest.flatMap(p => p.curves[state.metric].map(m => m[1]))]);
  if (!values.length) { $("curves").replaceChildren(); curveTools(metrics); return; }
  const lo = Math.min(...values), hi = Math.max(...values);
  state.log ??= lo > 0 && hi / lo > 3;
  if (lo <= 0) state.log = false;
  curveTools(metrics);
  const { root, width, height } = canvas($("curves"), innerWidth < 640 ? 300 : 380);
  const steps = all.flatMap(b => [...b.mean, ...b.rest.flatMap(p => p.curves[state.metric])].map(m => m[0])), x = scale(Math.min(...steps), Math.max(...steps), 54, width - 14), y = scale(...padded(lo, hi, state.log, .04), height - 40, 26, state.log);
  yAxis(root, y, 54, width - 14, state.metric + (state.log ? ", log scale" : ""));
  for (const t of x.ticks(width < 500 ? 4 : 8)) svg("text", { x: x(t), y: height - 20, "text-anchor": "middle" }, root, fig(t));
  svg("text", { x: (54 + width - 14) / 2, y: height - 3, "text-anchor": "middle" }, root, "step");
  svg("line", { x1: 54, x2: width - 14, y1: height - 40, y2: height - 40, class: "axis" }, root);
  const path = pairs => pairs.map(([s, v], i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  const runs = svg("g", {}, root), lines = svg("g", {}, root);
  for (const b of all) {
    const c = colour(b.points[0]), key = keyOf(b.points[0]);
    if (b.band.length > 1) svg("path", { d: path(b.band.map(m => [m[0], m[2]])) + path(b.band.map(m => [m[0], m[1]]).reverse()).replace("M", "L") + "Z", fill: c, "fill-opacity": .13, "data-key": key }, runs);
    for (const p of b.rest) svg("path", { d: path(p.curves[state.metric]), fill: "none", stroke: c, "stroke-width": 1.3, "stroke-dasharray": "2 4", "data-key": key }, lines);
    svg("path", { d: path(b.mean), fill: "none", stroke: c, "stroke-width": 2.1, "stroke-linejoin": "round", "stroke-linecap": "round", "data-key": key }, lines);
    if (b.mean.length <= 12) for (const [s, v] of b.mean) svg("circle", { cx: x(s), cy: y(v), r: 3, fill: c, "data-key": key }, lines);
  }
  const hair = svg("line", { y1: 26, y2: height - 40, class: "axis", "stroke-dasharray": "3 3", visibility: "hidden" }, root), dots = svg("g", {}, root);
  const distinct = [...new Set(steps)].sort((a, b) => a - b);
  root.onpointermove = event => {
    const box = root.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
    const s = distinct.reduce((a, b) => Math.abs(x(b) - px) < Math.abs(x(a) - px) ? b : a);
    const here = all.map(b => ({ b, v: b.mean.find(m => m[0] === s)?.[1] })).filter(h => h.v !== undefined).sort((a, b) => a.v - b.v);
    if (!here.length) return;
    const near = here.reduce((a, b) => Math.abs(y(b.v) - py) < Math.abs(y(a.v) - py) ? b : a);
    hair.setAttribute("x1", x(s)); hair.setAttribute("x2", x(s)); hair.setAttribute("visibility", "visible");
    dots.replaceChildren();
    for (const p of near.b.points) if (near.b.points.length > 1) svg("path", { d: path(p.curves[state.metric]), fill: "none", stroke: colour(p), "stroke-width": 1, "stroke-dasharray": "2 3" }, dots);
    for (const h of here) svg("circle", { cx: x(s), cy: y(h.v), r: h === near ? 5 : 3.2, fill: colour(h.b.points[0]), stroke: "var(--card)", "stroke-width": 1.5 }, dots);
    const at = here.indexOf(near), from = Math.max(0, Math.min(at - 4, here.length - 9)), rows = here.slice(from, from + 9);
    showTip(event, html("b", {}, `${state.metric} at step ${s}`), ...rows.map(h => tipLine(colour(h.b.points[0]), h.b.label, fig(h.v), h === near)));
  };
  root.onpointerleave = () => { hideTip(); hair.setAttribute("visibility", "hidden"); dots.replaceChildren(); };
}

// ---- parallel coordinates --------------------------------------------------------------------------------------------
function axisFor(name, r0, r1) {
  if (name === "score") {
    const s = FINISHED.map(p => p.score), y = scale(...(D.lower ? [Math.max(...s), Math.min(...s)] : [Math.min(...s), Math.max(...s)]), r0, r1);
    return { at: p => p.score === null ? null : y(p.score), ticks: ticks(Math.min(...s), Math.max(...s), 6).concat([Math.min(...s)]).filter((t, i, a) => i === a.length - 1 || Math.abs(y(t) - y(a[a.length - 1])) > 16).map((t, i, a) => [y(t), i === a.length - 1 ? shown(t) : fig(t)]) };
  }
  const all = levels(name), numbers = all.map(num);
  if (numbers.includes(null) || all.length <= 8) {
    const y = i => all.length === 1 ? (r0 + r1) / 2 : r0 + (r1 - r0) * (.04 + .92 * i / (all.length - 1));
    return { at: p => y(all.indexOf(p.settings[name] ?? "")), ticks: all.map((l, i) => [y(i), l || "-"]) };
  }
  const lo = Math.min(...numbers), hi = Math.max(...numbers), y = scale(lo, hi, r0, r1, lo > 0 && hi / lo >= 10);
  return { at: p => y(num(p.settings[name])), ticks: y.ticks(6).map(t => [y(t), fig(t)]) };
}
function parallel() {
  $("s-parallel").hidden = FINISHED.length < 2 || !HYPER.length;
  if ($("s-parallel").hidden) return;
  const { root, width, height } = canvas($("parallel"), innerWidth < 640 ? 300 : 360);
  const names = state.order, left = 64, right = 70, x = i => left + (width - left - right) * i / (names.length - 1);
  const axes = names.map(n => axisFor(n, height - 18, 40));
  names.forEach((n, i) => { place[n] = p => axes[i].at(p); });
  const lines = svg("g", { fill: "none" }, root);
  const drawn = [...FINISHED].sort((a, b) => -better(a.score, b.score)).map(p => {
    const at = axes.map(a => a.at(p));
    const d = at.map((v, i) => i ? `C${(x(i - 1) + x(i)) / 2} ${at[i - 1]} ${(x(i - 1) + x(i)) / 2} ${v} ${x(i)} ${v}` : `M${x(0)} ${v}`).join("");
    const on = visible(p);
    const e = svg("path", { d, stroke: on ? colour(p) : "var(--line)", "stroke-width": p.num === D.winner ? 3 : 1.7, "stroke-opacity": on ? .8 : .5, ...(on ? { "data-key": keyOf(p) } : {}) }, lines);
    return { p, e, at };
  });
  names.forEach((n, i) => {
    const g = svg("g", { style: "cursor: ns-resize" }, root);
    svg("line", { x1: x(i), x2: x(i), y1: 40, y2: height - 18, class: "axis" }, g);
    svg("text", { x: x(i), y: 18, style: "cursor: ew-resize", "text-anchor": i === 0 ? "start" : i === names.length - 1 ? "end" : "middle", class: "title", dx: i === 0 ? -left + 2 : i === names.length - 1 ? right - 2 : 0 }, g, n === "score" ? D.metric : short(n)).onpointerdown = down => {
      down.preventDefault();
      const end = up => {
        removeEventListener("pointerup", end);
        const at = Math.round((up.clientX - root.getBoundingClientRect().left - left) / Math.max(1, width - left - right) * (names.length - 1));
        state.order = names.filter(m => m !== n);
        state.order.splice(Math.max(0, Math.min(names.length - 1, at)), 0, n);
        draw();
      };
      addEventListener("pointerup", end);
    };
    for (const [y, label] of axes[i].ticks) {
      svg("line", { x1: x(i) - 4, x2: x(i) + 4, y1: y, y2: y, class: "axis" }, g);
      const outward = i === names.length - 1;
      svg("text", { x: x(i) + (outward ? 9 : -9), y: y + 4, "text-anchor": outward ? "start" : "end", style: "paint-order: stroke; stroke: var(--card); stroke-width: 4px" }, g, label);
    }
    const hit = svg("rect", { x: x(i) - 14, y: 34, width: 28, height: height - 46, fill: "transparent" }, g);
    if (state.brushes[n]) svg("rect", { x: x(i) - 7, y: state.brushes[n][0], width: 14, height: state.brushes[n][1] - state.brushes[n][0], fill: "var(--accent)", "fill-opacity": .25, stroke: "var(--accent)", "pointer-events": "none" }, g);
    hit.onpointerdown = down => {
      down.preventDefault();
      const top = root.getBoundingClientRect().top, y0 = down.clientY - top;
      const end = up => {
        removeEventListener("pointerup", end);
        const y1 = up.clientY - root.getBoundingClientRect().top;
        if (Math.abs(y1 - y0) < 5) delete state.brushes[n]; else state.brushes[n] = [Math.min(y0, y1), Math.max(y0, y1)];
        draw();
      };
      addEventListener("pointerup", end);
    };
  });
  for (const { p, e } of drawn) {
    const wide = svg("path", { d: e.getAttribute("d"), fill: "none", stroke: "transparent", "stroke-width": 9 });
    lines.append(wide);
    wide.onpointermove = event => {
      for (const o of drawn) o.e.style.opacity = o.p === p ? "1" : ".15";
      showTip(event, html("b", {}, `point ${p.label}`), ...D.params.map(k => tipLine(colour(p), short(k), p.settings[k] || "-")), tipLine(colour(p), D.metric, shown(p.score), true));
    };
    wide.onpointerleave = () => { for (const o of drawn) o.e.style.opacity = ""; hideTip(); };
  }
}

// ---- score against each hyperparameter -------------------------------------------------------------------------------
function effects() {
  $("s-effects").hidden = FINISHED.length < 2 || !HYPER.length;
  if ($("s-effects").hidden) return;
  const grid = $("effects"), scores = FINISHED.map(p => p.score);
  while (grid.children.length < HYPER.length) grid.append(html("div", { class: "chart" }));
  HYPER.forEach((name, k) => {
    const { root, width, height } = canvas(grid.children[k], 250);
    const y = scale(...padded(Math.min(...scores), Math.max(...scores), false, .08), height - 42, 26), all = levels(name), numbers = all.map(num);
    yAxis(root, y, 50, width - 10, D.metric);
    svg("line", { x1: 50, x2: width - 10, y1: height - 42, y2: height - 42, class: "axis" }, root);
    const continuous = !numbers.includes(null) && all.length > 8;
    const lo = Math.min(...numbers), hi = Math.max(...numbers), log = continuous && lo > 0 && hi / lo >= 10;
    const line = continuous ? scale(...padded(lo, hi, log, .04), 50, width - 10, log) : null;
    const x = l => line ? line(num(l)) : 50 + (width - 60) * (all.indexOf(l) + .5) / all.length;
    for (const [at, label] of line ? line.ticks(5).map(t => [line(t), fig(t)]) : all.map(l => [x(l), l || "-"])) svg("text", { x: at, y: height - 23, "text-anchor": "middle" }, root, label.length > 22 ? label.slice(0, 20) + "\u2026" : label);
    svg("text", { x: (50 + width - 10) / 2, y: height - 4, "text-anchor": "middle", class: "title" }, root, name + (log ? ", log scale" : ""));
    if (!continuous) {
      const means = all.map(l => FINISHED.filter(p => (p.settings[name] ?? "") === l).map(p => p.score)).map(v => v.length ? v.reduce((a, b) => a + b) / v.length : null);
      const w = Math.min(26, (width - 60) / all.length / 3);
      means.forEach((m, i) => { if (m !== null) svg("line", { x1: x(all[i]) - w, x2: x(all[i]) + w, y1: y(m), y2: y(m), stroke: "var(--ink)", "stroke-width": 2, opacity: .75 }, root); });
    }
    const peers = new Map();
    for (const p of FINISHED) {
      const l = p.settings[name] ?? "", seen = (peers.get(l) ?? 0); peers.set(l, seen + 1);
      const jitter = continuous ? 0 : ((seen * .618034) % 1 - .5) * Math.min(30, (width - 60) / all.length / 2.2), on = visible(p);
      const dot = svg("circle", { cx: x(l) + jitter, cy: y(p.score), r: p.num === D.winner ? 6 : 4.4, fill: on ? colour(p) : "var(--line)", "fill-opacity": .82, stroke: "var(--card)", "stroke-width": 1.2, ...(on ? { "data-key": keyOf(p) } : {}) }, root);
      dot.onpointermove = event => showTip(event, html("b", {}, `point ${p.label}`), ...D.params.map(q => tipLine(colour(p), short(q), p.settings[q] || "-")), tipLine(colour(p), D.metric, shown(p.score), true));
      dot.onpointerleave = hideTip;
    }
  });
}

// ---- what mattered ---------------------------------------------------------------------------------------------------
function importance() {
  const found = D.importance;
  $("s-importance").hidden = !found.shares.length;
  if (!found.shares.length) return;
  $("importance-note").textContent = `The share of the variance of ${found.num_scores} scores that lies between a hyperparameter's levels, each taken alone. The mark is the share that chance alone would give: near it, a bar says nothing. In a full grid what is left over is interaction; elsewhere shares overlap.`;
  const rows = [...found.shares.map(s => [short(s.name), s.share, s.chance]), ...(found.noise === null ? [] : [["seeds (noise)", found.noise, null]])];
  const { root, width } = canvas($("importance"), rows.length * 34 + 26), left = Math.min(190, width * .36), x = scale(0, 1, left, width - 56);
  for (const t of [0, .25, .5, .75, 1]) {
    svg("line", { x1: x(t), x2: x(t), y1: 0, y2: rows.length * 34, class: "grid" }, root);
    svg("text", { x: x(t), y: rows.length * 34 + 18, "text-anchor": "middle" }, root, `${t * 100} %`);
  }
  rows.forEach(([name, share, chance], i) => {
    const y = i * 34 + 7;
    svg("text", { x: left - 10, y: y + 14, "text-anchor": "end", class: "title" }, root, name);
    svg("rect", { x: x(0), y, width: Math.max(1, x(share) - x(0)), height: 20, rx: 4, fill: chance === null ? "var(--faint)" : "var(--accent)", opacity: .88 }, root);
    if (chance !== null) svg("line", { x1: x(chance), x2: x(chance), y1: y - 4, y2: y + 24, stroke: "var(--warn)", "stroke-width": 2.5 }, root);
    svg("text", { x: (chance !== null && x(chance) - x(share) > -6 && x(chance) - x(share) < 64 ? x(chance) : x(share)) + 8, y: y + 14, class: "title", style: "paint-order: stroke; stroke: var(--card); stroke-width: 3px" }, root, `${(share * 100).toFixed(1)} %`);
  });
}

// ---- failed points, samples ------------------------------------------------------------------------------------------
function failed() {
  const bad = D.points.filter(BAD);
  $("s-failed").hidden = !bad.length;
  $("failed").replaceChildren(...bad.map(p => html("div", { class: "card" }, html("p", {}, html("span", { class: "state bad" }, p.state), ` \u00b7 point ${p.label} \u00b7 `, html("code", {}, D.params.map(k => `${k}=${p.settings[k] ?? ""}`).join(" ")), p.step !== null ? ` \u00b7 step ${p.step}` : ""),
    p.error ? html("p", {}, p.error) : null, ...p.tracebacks.map(([log, text]) => html("details", {}, html("summary", {}, `traceback in ${log}`), html("pre", {}, text))))));
  if (D.kind === "comparison") return;
  if (D.search) $("failed").append(html("p", { class: "note" }, "A search continues by its own command with ", html("code", {}, `hydra.sweep.dir=${D.folder}`)));
  else $("failed").append(html("p", { class: "note", style: "margin: 10px 0 0" }, "Run them again with ", html("code", {}, `python -m sftlab.sweep dir=${D.folder} retry=failed`)));
}
function samples() {
  $("s-samples").hidden = !D.samples.length;
  if (!D.samples.length) return;
  $("samples-note").textContent = `Point ${D.points.find(p => p.num === D.winner).label} at step ${D.samples[0].step}: greedy answers on validation examples, spread over those recorded. Green is one of the accepted answers, word for word.`;
  const plain = t => t.trim().toLowerCase().replace(/[^\p{L}\p{N} ]/gu, "").replace(/\b(a|an|the)\b/g, " ").replace(/\s+/g, " ").trim();
  $("samples").replaceChildren(...D.samples.map(s => {
    const { context, ask } = asked(s.prompt);
    const right = s.references.some(r => plain(r) === plain(s.answer));
    return html("div", { class: "card" }, context ? html("p", { class: "context", title: "hover to read it all" }, context) : null, html("p", { class: "ask" }, ask),
      html("dl", {}, html("dt", {}, "answer"), html("dd", { class: right ? "right" : "wrong" }, s.answer || "(nothing)"), html("dt", {}, "expected"), html("dd", {}, [...new Set(s.references)].join(" / ")),
        ...(s.before === null ? [] : [html("dt", {}, "untrained"), html("dd", { class: "context" }, s.before || "(nothing)")])));
  }));
}
