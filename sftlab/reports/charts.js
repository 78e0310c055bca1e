"use strict";
// Numbers to words, scales, ticks, SVG elements, colours: what every plot of the page shares.

const NS = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, parent = null, text = null) {
  const e = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== null) e.textContent = text;
  if (parent) parent.append(e);
  return e;
}

function html(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k === "class" ? (e.className = v) : k.startsWith("--") ? e.style.setProperty(k, v) : e.setAttribute(k, v);
  e.append(...children.filter(c => c !== null && c !== undefined));
  return e;
}

function fig(v, digits = 5) {
  if (v === null || v === undefined) return "";
  if (v === 0) return "0";
  const a = Math.abs(v);
  if (a >= 1e5 || a < 1e-4) return v.toExponential(Math.min(digits - 1, 3)).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(+v.toPrecision(digits));
}
const fixed = (v, digits) => v === null || v === undefined ? "" : v.toFixed(digits);
const num = t => t !== "" && isFinite(+t) ? +t : null;
function span(s) {
  if (s === null || s === undefined) return "";
  if (s < 90) return `${Math.round(s)} s`;
  const m = Math.round(s / 60);
  return m < 90 ? `${m} min` : `${Math.floor(m / 60)} h ${m % 60} min`;
}

function scale(d0, d1, r0, r1, log = false) {
  const f = log ? Math.log : x => x, a = f(d0), b = f(d1);
  const to = v => a === b ? (r0 + r1) / 2 : r0 + (f(v) - a) / (b - a) * (r1 - r0);
  return Object.assign(to, { d0, d1, r0, r1, log, ticks: n => log ? logTicks(d0, d1, n) : ticks(d0, d1, n) });
}
function ticks(lo, hi, n) {
  if (!(hi > lo)) return [lo];
  const raw = (hi - lo) / n, base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(k => k * base).find(s => s >= raw * .999);
  const out = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi * (1 + 1e-12) + 1e-12; i++) out.push(+(i * step).toPrecision(12));
  return out;
}
function logTicks(lo, hi, n) {
  const all = [];
  for (let p = Math.floor(Math.log10(lo)); p <= Math.ceil(Math.log10(hi)); p++)
    for (const k of [1, 1.5, 2, 3, 4, 5, 7]) all.push(+(k * 10 ** p).toPrecision(3));
  const inside = keep => all.filter(t => t >= lo * .999 && t <= hi * 1.001 && keep.includes(+(t / 10 ** Math.floor(Math.log10(t) + 1e-9)).toPrecision(3)));
  for (const keep of [[1, 1.5, 2, 3, 4, 5, 7], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
    const found = inside(keep);
    if (found.length <= n + 2 && found.length >= 2) return found;
  }
  const few = ticks(lo, hi, Math.max(2, n - 1)).filter(t => t > 0);
  return few.length > 1 ? few : [lo, hi];
}
const padded = (lo, hi, log, by = .06) => {
  if (lo === hi) return log ? [lo / 1.2, hi * 1.2] : [lo - (Math.abs(lo) || 1) * .1, hi + (Math.abs(hi) || 1) * .1];
  if (log) { const k = (hi / lo) ** by; return [lo / k, hi * k]; }
  return [lo - (hi - lo) * by, hi + (hi - lo) * by];
};

const CATEGORICAL = { light: ["#2f62c9", "#d9622b", "#1f8a66", "#b8408a", "#7d5bd0", "#a67c00", "#1690b0", "#6b7480", "#c63d4f", "#4f7a1d"],
                      dark: ["#82aaff", "#ff9e64", "#5fd0a0", "#f28fc4", "#b9a1ff", "#e3c15b", "#62cfe8", "#a6b0bd", "#ff8b94", "#a5d165"] };
const RAMP = { light: ["#f0a24b", "#e0653f", "#bd3770", "#7a2c8f", "#2b2a78"], dark: ["#fde08a", "#fca35f", "#ee6a83", "#b76ad8", "#7f8bff"] };
const dark = () => document.documentElement.classList.contains("dark");
const categorical = i => CATEGORICAL[dark() ? "dark" : "light"][i % 10];
function ramp(t) {
  const stops = RAMP[dark() ? "dark" : "light"], x = Math.min(.9999, Math.max(0, t)) * (stops.length - 1), i = Math.floor(x), f = x - i;
  const rgb = h => [1, 3, 5].map(k => parseInt(h.slice(k, k + 2), 16));
  const [a, b] = [rgb(stops[i]), rgb(stops[i + 1])];
  return `rgb(${a.map((v, k) => Math.round(v + (b[k] - v) * f)).join(" ")})`;
}

const tip = document.getElementById("tip");
function showTip(event, ...children) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const w = tip.offsetWidth, h = tip.offsetHeight, x = event.clientX, y = event.clientY;
  tip.style.left = `${Math.max(6, x + 16 + w > innerWidth ? x - w - 14 : x + 16)}px`;
  tip.style.top = `${Math.max(6, y + 16 + h > innerHeight ? y - h - 12 : y + 16)}px`;
}
const hideTip = () => { tip.hidden = true; };
const tipLine = (colour, label, value, hot = false) => html("div", { "--c": colour, class: hot ? "hot" : "" }, label, html("span", {}, value));

// An empty chart of the width of its box, redrawn by the caller when that changes.
function canvas(box, height) {
  box.replaceChildren();
  const width = Math.max(240, box.clientWidth);
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  box.append(root);
  return { root, width, height };
}
function yAxis(root, y, x0, x1, label, words = fig) {
  for (const t of y.ticks(6)) {
    svg("line", { x1: x0, x2: x1, y1: y(t), y2: y(t), class: "grid" }, root);
    svg("text", { x: x0 - 8, y: y(t) + 4, "text-anchor": "end" }, root, words(t));
  }
  svg("text", { x: x0 - 8, y: 12, "text-anchor": "start", class: "title", dx: 8 - x0 + 2 }, root, label);
}

// A prompt as (context, what is asked): what is asked comes last.
function asked(prompt) {
  const at = prompt.lastIndexOf("Question:");
  return at > 0 ? { context: prompt.slice(0, at).replace(/^Context:\s*/, ""), ask: prompt.slice(at).replace(/^Question:\s*|\s*Answer:\s*$/g, "") } : { context: "", ask: prompt };
}

// Light or dark as the system or `#theme=` says; `redraw` is called when that or the width changes.
function themed(redraw) {
  const wanted = new URLSearchParams(location.hash.slice(1)).get("theme"), root = document.documentElement;
  root.classList.toggle("dark", wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  document.getElementById("theme").onclick = () => { root.classList.toggle("dark"); redraw(false); };
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(true); } });
  root.dataset.ready = "true";
}
