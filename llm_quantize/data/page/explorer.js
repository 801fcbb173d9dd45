// Draws the frames of an explorer's page and follows its controls. No library, no request; see nbs/53_explorer.ipynb.
"use strict";
(() => {
const page = JSON.parse(document.getElementById("explorer-data").textContent);
const COLORS = page.colors, SVG = "http://www.w3.org/2000/svg";
const VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"].map(h => [0, 2, 4].map(i => parseInt(h.slice(i, i + 2), 16)));

const fill = (node, attributes, children) => {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  for (const child of children) node.append(child);
  return node;
};
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const text = (x, y, words, more = {}) => svg("text", { x, y, "font-size": 12, ...more }, String(words));
const short = v => v === null ? "none" : v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5) ? v.toExponential(1).replace("e+", "e") : String(+v.toPrecision(3));
const picture = (width, height, alt, parts) => svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": alt }, svg("title", {}, alt), ...parts);
const viridis = t => {
  const at = Math.min(Math.max(t, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return `rgb(${VIRIDIS[i].map((c, k) => Math.round(c + (at - i) * (VIRIDIS[i + 1][k] - c))).join()})`;
};

// ---- controls: the state is the index of an option, or of several --------------------------------------------------
const state = {}, control = {};
for (const c of page.controls) { state[c.name] = c.value; control[c.name] = c; }
const inputs = name => document.querySelectorAll(`.lq-${name} select, .lq-${name} input`);
const show = name => {
  const c = control[name];
  for (const [i, input] of inputs(name).entries()) {
    if (c.kind === "many") input.checked = state[name].includes(i); else input.value = state[name];
    if (c.kind === "slide") { input.setAttribute("aria-valuetext", c.options[state[name]]); document.querySelector(`.lq-${name} output`).textContent = c.options[state[name]]; }
  }
};
const choose = (name, value) => { state[name] = value; show(name); for (const p of page.panels) if (p.depends.includes(name) || p.follows.includes(name)) draw(p); };
for (const c of page.controls) {
  for (const input of inputs(c.name)) input.addEventListener(c.kind === "slide" ? "input" : "change", () =>
    choose(c.name, c.kind === "many" ? [...inputs(c.name)].flatMap((box, i) => box.checked ? [i] : []) : +input.value));
}

// ---- panels --------------------------------------------------------------------------------------------------------
const merge = frames => {
  if (!frames.length) return { kind: "html", html: '<p class="note">Nothing is chosen.</p>' };
  const drawn = frames.filter(f => f.kind !== "html");
  if (!drawn.length) return { kind: "html", html: frames.map(f => f.html).join("") };
  const alt = [...new Set(drawn.map(f => f.alt).filter(a => a))].join("; ");
  if (drawn[0].kind === "heat") return { ...drawn[0], alt, grids: drawn.flatMap(f => f.grids) };
  return { ...drawn[0], alt, series: [...new Map(drawn.flatMap(f => f.series.map(s => [s.name, s]))).values()] };
};
const frameOf = p => {
  let keys = [""];
  for (const name of p.depends) keys = keys.flatMap(k => [state[name]].flat().map(i => k + "," + i));
  const frames = keys.map(k => p.pool[p.frames[k.slice(1)]]);
  return p.depends.some(n => control[n].kind === "many") ? merge(frames) : frames[0];
};
const draw = p => {
  const frame = frameOf(p), place = document.querySelector(`.lq-panel.lq-${p.name} .lq-picture`);
  if (frame.kind === "html") { place.innerHTML = frame.html; wander(place); return; }
  place.replaceChildren(...(frame.kind === "heat" ? heat(frame) : chart(frame)));
};

// ---- heat maps -----------------------------------------------------------------------------------------------------
const heat = frame => {
  const known = frame.grids.flatMap(g => g.values.flat()).filter(v => v !== null), low = Math.min(...known), high = Math.max(...known);
  const share = v => high > low ? (v - low) / (high - low) : 0.5, [rowName, columnName] = frame.follows;
  const chosen = rowName ? [frame.rows.indexOf(control[rowName].options[state[rowName]]), state[columnName]] : [-1, -1];
  const maps = frame.grids.map(g => {
    const n = g.values[0].length, left = 92, cell = Math.min(46, Math.max(7, (frame.grids.length > 1 ? 330 : 640) / n)), tall = g.texts ? 26 : 22, width = left + n * cell + 8, parts = [text(left, 14, g.name, { "font-weight": 600 })];
    g.values.forEach((row, r) => {
      parts.push(text(left - 8, 22 + (r + 0.68) * tall, frame.rows[r], { "text-anchor": "end" }));
      row.forEach((v, c) => {
        if (v === null) return;
        const word = g.texts && g.texts[r][c], mark = g.marks.find(m => m[0] === r && m[1] === c);
        const box = svg("rect", { x: left + c * cell, y: 22 + r * tall, width: cell - 1, height: tall - 1, fill: viridis(share(v)) },
          svg("title", {}, `${frame.rows[r]}, ${frame.xlabel} ${c}: ${word ? word + ", " : ""}${short(v)}${mark ? "; " + mark[2] : ""}`));
        if (rowName) { box.setAttribute("class", "pick"); box.addEventListener("click", () => { choose(rowName, control[rowName].options.indexOf(frame.rows[r])); choose(columnName, c); }); }
        parts.push(box);
        if (word && cell >= 30) parts.push(text(left + (c + 0.5) * cell, 22 + (r + 0.66) * tall, word, { "font-size": 9.5, "text-anchor": "middle", class: "over", fill: share(v) > 0.55 ? "#1a1a1a" : "#ffffff" }));
        if (mark) parts.push(svg("path", { d: star(left + (c + 0.5) * cell, 22 + (r + 0.5) * tall), fill: "#ffffff", stroke: "#d55e00", class: "over" }));
        if (r === chosen[0] && c === chosen[1]) parts.push(svg("rect", { x: left + c * cell + 1, y: 23 + r * tall, width: cell - 3, height: tall - 3, fill: "none", stroke: "#d55e00", "stroke-width": 3, class: "over" }));
      });
    });
    const base = 22 + g.values.length * tall;
    for (let c = 0; c < n; c += 1 + Math.floor(n / 16)) parts.push(text(left + (c + 0.5) * cell, base + 14, c, { "text-anchor": "middle", "font-size": 11 }));
    return picture(width, base + 34, `${g.name} ${frame.alt}`.trim(), [...parts, text(left, base + 30, frame.xlabel, { "font-size": 11 })]);
  });
  const bar = el("p", { class: "scale" }, `${frame.label}: ${short(low)} `, el("span", { style: `background: linear-gradient(to right, ${VIRIDIS.map(c => `rgb(${c})`).join()})` }), ` ${short(high)}`);
  return [el("div", { class: "maps" }, ...maps), bar];
};
const star = (x, y) => "M" + [...Array(10)].map((_, i) => { const r = i % 2 ? 3 : 7.5, a = Math.PI * (i / 5 - 0.5); return `${(x + r * Math.cos(a)).toFixed(1)} ${(y + r * Math.sin(a)).toFixed(1)}`; }).join("L") + "z";

// ---- charts --------------------------------------------------------------------------------------------------------
const axis = (values, log, room) => {
  const own = values.filter(v => v !== null && (!log || v > 0)).map(v => log ? Math.log10(v) : v);
  let low = Math.min(...own), high = Math.max(...own);
  if (!own.length) [low, high] = [0, 1];
  const pad = (high - low || 1) * room;
  [low, high] = [low - pad, high + pad];
  const ticks = [], span = high - low;
  if (log && span > 2.2) for (let e = Math.ceil(low), step = Math.ceil(span / 6); e <= high; e += step) ticks.push([e, short(10 ** e)]);
  else if (log) for (let e = Math.floor(low); e <= high; e++) for (const d of span > 0.5 ? [1, 2, 3, 5, 7] : [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9]) { const at = e + Math.log10(d); if (at >= low && at <= high) ticks.push([at, short(d * 10 ** e)]); }
  else { const raw = span / 6, unit = 10 ** Math.floor(Math.log10(raw)), step = unit * [1, 2, 5, 10].find(k => k * unit >= raw); for (let v = Math.ceil(low / step) * step; v <= high; v += step) ticks.push([v, short(v)]); }
  return { at: v => ((log ? Math.log10(v) : v) - low) / (high - low), ticks: ticks.map(([v, word]) => [(v - low) / (high - low), word]), ok: v => v !== null && (!log || v > 0) };
};
const shape = (k, x, y) => [`M${x - 4} ${y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0`, `M${x - 4} ${y - 4}h8v8h-8z`, `M${x} ${y - 5}l5 9h-10z`, `M${x} ${y - 5}l5 5l-5 5l-5 -5z`, `M${x} ${y + 5}l5 -9h-10z`][k % 5];
const chart = frame => {
  const W = 740, H = 300, L = 66, R = 16, T = 12, B = 46, labelled = frame.series.some(s => s.labels);
  const X = axis(frame.ticks ? frame.ticks.map((_, i) => i) : frame.series.flatMap(s => s.x), frame.log.includes("x"), labelled ? 0.12 : frame.ticks ? 0.03 : 0.01);
  const Y = axis(frame.series.flatMap(s => s.y), frame.log.includes("y"), 0.06);
  const px = v => L + X.at(v) * (W - L - R), py = v => H - B - Y.at(v) * (H - B - T), parts = [];
  for (const [at, word] of Y.ticks) { const y = H - B - at * (H - B - T); parts.push(svg("path", { d: `M${L} ${y}H${W - R}`, class: "grid" }), text(L - 8, y + 4, word, { "text-anchor": "end", "font-size": 11 })); }
  for (const [at, word] of frame.ticks ? frame.ticks.map((word, i) => [X.at(i), word]) : X.ticks) { const x = L + at * (W - L - R); parts.push(svg("path", { d: `M${x} ${T}V${H - B}`, class: "grid" }), text(x, H - B + 16, word, { "text-anchor": "middle", "font-size": 11 })); }
  parts.push(text((L + W - R) / 2, H - 8, frame.xlabel, { "text-anchor": "middle" }), text(0, 0, frame.ylabel, { "text-anchor": "middle", transform: `translate(14 ${(H - B + T) / 2}) rotate(-90)` }));
  frame.series.forEach(s => {
    const color = COLORS[s.color % COLORS.length], points = s.x.map((x, i) => [x, s.y[i], i]).filter(([x, y]) => X.ok(x) && Y.ok(y));
    if (s.line) parts.push(svg("path", { d: points.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join(""), fill: "none", stroke: color, "stroke-width": 1.6, ...(s.dash ? { "stroke-dasharray": "6 4" } : {}) }));
    for (const [x, y, i] of points) {
      if (s.marker) parts.push(svg("path", { d: shape(s.color, px(x), py(y)), fill: color }, svg("title", {}, `${s.labels ? s.labels[i] : s.name}: ${short(x)}, ${short(y)}`)));
      if (s.labels) parts.push(text(px(x) + 8, py(y) - 6, s.labels[i]));
    }
  });
  const key = frame.series.length < 2 ? [] : [el("p", { class: "key" }, ...frame.series.map(s => el("span", {}, svg("svg", { viewBox: "0 0 26 12", width: 26, height: 12, "aria-hidden": "true" },
    ...(s.line ? [svg("path", { d: "M0 6H26", stroke: COLORS[s.color % COLORS.length], "stroke-width": 2, ...(s.dash ? { "stroke-dasharray": "6 4" } : {}) })] : []),
    ...(s.marker ? [svg("path", { d: shape(s.color, 13, 6), fill: COLORS[s.color % COLORS.length] })] : [])), ` ${s.name}`)))];
  return [picture(W, H, frame.alt, parts), ...key];
};

// ---- tokens: one stop of the Tab key for all of them, arrow keys inside ----------------------------------------------
const wander = place => {
  const all = [...place.querySelectorAll(".t[tabindex]")];
  all.forEach((token, i) => {
    token.tabIndex = i ? -1 : 0;
    token.addEventListener("keydown", event => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key], next = step && all[Math.min(Math.max(i + step, 0), all.length - 1)];
      if (!next) return;
      event.preventDefault();
      token.tabIndex = -1; next.tabIndex = 0; next.focus();
    });
  });
};

for (const c of page.controls) show(c.name);
for (const p of page.panels) draw(p);
})();
