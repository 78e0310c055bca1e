// Run a report's own scripts on a page without a browser: the least of a DOM that they ask for, nothing drawn.
// Prints as JSON the text of every element with an id, the rows of every table, where the labels of the
// parallel coordinates lie, and how two scores compare.
"use strict";
const page = require("fs").readFileSync(process.argv[2], "utf8");

class Element {
  constructor(tag) { Object.assign(this, { tag, children: [], attributes: {}, dataset: {}, style: { setProperty() {} }, hidden: false, className: "" }); this.classList = { add() {}, remove() {}, toggle() {}, contains: () => false }; }
  setAttribute(k, v) { this.attributes[k] = String(v); if (k.startsWith("data-")) this.dataset[k.slice(5)] = String(v); }
  getAttribute(k) { return this.attributes[k] ?? null; }
  append(...nodes) { this.children.push(...nodes.map(n => (n instanceof Element ? n : String(n)))); }
  replaceChildren(...nodes) { this.children = []; this.append(...nodes); }
  querySelectorAll() { return []; }
  getBoundingClientRect() { return { left: 0, top: 0 }; }
  addEventListener() {}
  remove() {}
  get clientWidth() { return 900; }
  get offsetWidth() { return 100; }
  get offsetHeight() { return 100; }
  get lastChild() { return this.children[this.children.length - 1]; }
  get textContent() { return this.children.map(c => (c instanceof Element ? c.textContent : c)).join(""); }
  set textContent(t) { this.children = [String(t)]; }
}

const byId = {};
for (const [, id] of page.matchAll(/ id="([^"]+)"/g)) byId[id] = new Element("div");
byId.data.textContent = page.match(/id="data">([\s\S]*?)<\/script>/)[1];
globalThis.document = { createElement: t => new Element(t), createElementNS: (_, t) => new Element(t), getElementById: id => byId[id] ?? null, querySelectorAll: () => [], documentElement: new Element("html"), title: "" };
Object.assign(globalThis, { innerWidth: 1200, innerHeight: 800, location: { hash: "" }, matchMedia: () => ({ matches: false }), addEventListener() {} });

const scripts = [...page.matchAll(/<script>([\s\S]*?)<\/script>/g)].map(m => m[1]).join("\n");
const see = !byId.ranking ? "" : `;globalThis.seen = { csv: csv(), better: better(D.points[D.winner].score, FINISHED.map(p => p.score).find(s => s !== D.points[D.winner].score)) };`;
new Function(scripts.replace(/"use strict";/g, "") + see)();

const all = e => [e, ...e.children.filter(c => c instanceof Element).flatMap(all)];
const rows = e => all(e).filter(n => n.tag === "tr").map(r => r.children.map(c => c.textContent));
const tables = Object.fromEntries(Object.keys(byId).map(id => [id, rows(byId[id])]).filter(([, found]) => found.length));
const winners = all(byId.points ?? new Element("div")).filter(n => n.tag === "tr" && n.className === "win").map(r => r.dataset.point);
const text = Object.fromEntries(Object.entries(byId).filter(([id]) => id !== "data").map(([id, e]) => [id, e.textContent]));
const hidden = Object.keys(byId).filter(id => byId[id].hidden === true);
const axis = all(byId.parallel ?? new Element("div")).filter(n => n.tag === "text").map(n => [n.textContent, +n.attributes.x, +n.attributes.y]);
console.log(JSON.stringify({ text, tables, axis, hidden, winner_rows: winners, ...globalThis.seen }));
