"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const roles = Object.fromEntries(data.roles.map((role) => [role.name, { ...role, worst: floats(role.worst) }]));
const PLURAL = { task: "tasks", support: "support examples", query: "query examples" };
const FIRST = 10, PAGE = 60, FEW = 10; // FEW as in page_data.py
const CARDS = matchMedia("(max-width: 44rem)").matches ? 3 : 6;
const lists = { task: asList(data.tasks), support: asList(data.examples.support), query: asList(data.examples.query) };
const shown = new Set(data.shown);
let role = "task", sorted = [], sortedBy = { column: 0, direction: 1 }, visible = FIRST;

const byId = (id) => document.getElementById(id);

function floats(packed) {
  return new Float32Array(Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)).buffer);
}

function asList(packed) {
  return { ...packed, scores: floats(packed.scores) };
}

// Text goes in as text, never as markup.
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function draw(parent, tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toExponential(2).replace("e-", "e−").replace("e+", "e")}`;
}

function cell(list, name, index) {
  const column = list.columns.find((each) => each.name === name);
  return column === undefined ? "–" : column.values[column.codes[index]];
}

function tags(list, index) {
  const found = [];
  for (const column of list.columns) {
    const value = column.values[column.codes[index]];
    if (column.name === "label" || value === "–" || value === "False") continue;
    if (column.name === "harm") {
      if (value !== "clean") found.push(make("span", "tag bad", value));
    } else if (value === "True") found.push(make("span", "tag bad", column.name.replaceAll("_", " ")));
    else found.push(make("span", "tag", `${column.name}: ${value}`));
  }
  return found;
}

// ---- charts

function box(id) {
  const svg = byId(id);
  svg.replaceChildren();
  const { width, height } = svg.getBoundingClientRect();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  return { svg, width, height };
}

function histogram(count) {
  const { svg, width, height } = box("histogram");
  const { edges, counts, worst } = roles[role];
  if (!counts.length) return;
  const low = edges[0], span = edges.at(-1) - low, most = Math.max(...counts), top = Math.log1p(most);
  const left = 4, bottom = height - 18, x = (value) => left + ((value - low) / span) * (width - 2 * left);
  const limit = count > 0 ? worst[count - 1] : -Infinity;
  counts.forEach((each, k) => {
    if (!each) return;
    const tall = Math.max((Math.log1p(each) / top) * (bottom - 14), 2);
    const kind = edges[k + 1] <= limit || (edges[k] <= limit && limit < edges[k + 1]) ? "bar taken" : edges[k + 1] <= 0 ? "bar harm" : "bar";
    const bar = draw(svg, "rect", { class: kind, x: x(edges[k]) + 0.5, width: Math.max(x(edges[k + 1]) - x(edges[k]) - 1, 1), y: bottom - tall, height: tall });
    draw(bar, "title", {}, `${each} between ${signed(edges[k])} and ${signed(edges[k + 1])}`);
  });
  const tallest = counts.indexOf(most), middle = x((edges[tallest] + edges[tallest + 1]) / 2);
  draw(svg, "text", { class: "most", x: Math.min(Math.max(middle, 12), width - 12), y: 10, "text-anchor": "middle" }, most);
  draw(svg, "line", { class: "axis", x1: 0, x2: width, y1: bottom, y2: bottom });
  draw(svg, "text", { x: left, y: height - 4 }, signed(low));
  draw(svg, "text", { x: width - left, y: height - 4, "text-anchor": "end" }, signed(edges.at(-1)));
  if (low < 0 && edges.at(-1) > 0) {
    draw(svg, "line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: bottom });
    const share = (x(0) - left) / (width - 2 * left);
    if (share > 0.25 && share < 0.75) draw(svg, "text", { x: x(0), y: height - 4, "text-anchor": "middle" }, "0");
  }
}

function curve(count) {
  const { svg, width, height } = box("curve");
  const { worst } = roles[role], sums = sumsOf(role);
  if (!worst.length) return;
  const found = measuredHere();
  const low = Math.min(0, ...ends(sums), found ? found.target : 0), high = Math.max(0, ...ends(sums), found ? found.target : 0);
  const top = 12, bottom = height - 16, x = (k) => 4 + (k / worst.length) * (width - 12);
  const y = (value) => top + ((high - value) / (high - low || 1)) * (bottom - top);
  draw(svg, "line", { class: "axis", x1: 0, x2: width, y1: y(0), y2: y(0) });
  const step = Math.max(1, Math.floor(worst.length / 400)), points = [];
  for (let k = 0; k < sums.length; k += step) points.push(`${x(k).toFixed(1)},${y(sums[k]).toFixed(1)}`);
  points.push(`${x(worst.length).toFixed(1)},${y(sums.at(-1)).toFixed(1)}`);
  draw(svg, "polyline", { class: "path", points: points.join(" ") });
  draw(svg, "line", { class: "cursor", x1: x(count), x2: x(count), y1: top - 6, y2: bottom });
  if (found) draw(draw(svg, "circle", { class: "dot", cx: x(found.removed), cy: y(found.target), r: 6 }), "title", {}, "measured");
  draw(svg, "text", { x: 4, y: height - 3 }, "none removed");
  draw(svg, "text", { x: width - 8, y: height - 3, "text-anchor": "end" }, `${worst.length} removed`);
}

// Without spreading thousands of numbers into one call.
function ends(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

const kept = {};
function sumsOf(name) {
  if (!kept[name]) {
    const sums = [0];
    for (const score of roles[name].worst) sums.push(sums.at(-1) + (Number.isFinite(score) ? score : 0));
    kept[name] = sums;
  }
  return kept[name];
}

function measuredHere() {
  return data.measured && data.measured.role === role ? data.measured : null;
}

function remove(count) {
  const { count: all } = roles[role], found = measuredHere();
  byId("count").textContent = `${count} of ${all} ${PLURAL[role]}`;
  byId("flagged").replaceChildren(
    make("span", "bad", `${roles[role].harmful} harm`), `, ${all - roles[role].harmful} help; dark: the worst ${count}; log heights`,
  );
  byId("predicted").textContent = `Target predicted to change by ${signed(sumsOf(role)[count])}`;
  byId("measured").textContent = found ? `Measured without the worst ${found.removed}: ${signed(found.target)}. ${found.after}` : "";
  histogram(count);
  curve(count);
}

// ---- tasks and their examples

function item(side, index, withScore) {
  const list = lists[side], label = cell(list, "label", index);
  const wrong = list.columns.some((column) => column.name === "label_flipped" && column.values[column.codes[index]] === "True");
  const picture = list.picture[index], text = list.text[index];
  const element = make("span", `item${wrong ? " wrong" : ""}${picture < 0 ? " text" : ""}`);
  if (picture >= 0) {
    const image = make("img");
    image.alt = `${side} example ${list.ids[index]}${label === "–" ? "" : `, labelled ${label}`}`;
    image.src = data.pictures[picture];
    element.append(image);
  } else element.append(make("span", "", text || `example ${list.ids[index]}`));
  if (label !== "–") element.append(make("b", wrong ? "bad" : "", label));
  if (withScore) element.append(make("span", `score ${list.scores[index] < 0 ? "bad" : "good"}`, signed(list.scores[index])));
  element.title = `${side} example ${list.ids[index]}, score ${signed(list.scores[index])}${wrong ? ", label flipped" : ""}`;
  return element;
}

const ofTask = {};
function examplesOf(side, task) {
  if (!ofTask[side]) {
    ofTask[side] = new Map();
    lists[side].task.forEach((each, index) => {
      if (!ofTask[side].has(each)) ofTask[side].set(each, []);
      ofTask[side].get(each).push(index);
    });
  }
  return ofTask[side].get(task) || [];
}

function side(name, task, most, withScores) {
  const indices = examplesOf(name, task);
  const items = make("div", "items", ...indices.slice(0, most).map((index) => item(name, index, withScores)));
  if (indices.length > most) items.append(make("span", "more", `and ${indices.length - most} more`));
  return make("div", "side", make("h3", "", `${name}${indices.length ? " · worst first" : ""}`), items);
}

function head(task, tag) {
  const list = lists.task, label = cell(list, "label", task), score = list.scores[task];
  const name = make(tag, "", `Task ${list.ids[task]}`);
  const parts = [name, make("span", `score ${score < 0 ? "bad" : "good"}`, signed(score)), ...tags(list, task)];
  if (label !== "–") parts.splice(1, 0, make("span", "soft", label));
  return make("div", "head", ...parts);
}

function card(task) {
  const element = make("button", "card", head(task, "b"), make("div", "sides", side("support", task, FEW), side("query", task, FEW)));
  element.type = "button";
  element.dataset.task = task;
  element.addEventListener("click", () => open(task));
  return element;
}

function cards(id, tasks) {
  const home = byId(id).querySelector(".cards");
  let count = 0;
  const grow = (wanted) => {
    home.append(...tasks.slice(count, count + wanted).map(card));
    count = Math.min(count + wanted, tasks.length);
    more.hidden = count >= tasks.length;
  };
  const more = make("p", "", make("button", "", "Show more"));
  more.firstChild.addEventListener("click", () => grow(CARDS));
  home.after(more);
  grow(CARDS);
  byId(id).hidden = tasks.length === 0;
}

function open(task) {
  const title = head(task, "h2");
  title.firstChild.id = "named";
  const parts = [title, make("p", "soft", `Rank ${task + 1} of ${lists.task.ids.length}, from the most harmful.`)];
  const listed = examplesOf("support", task).length + examplesOf("query", task).length;
  if (listed) parts.push(make("div", "sides", side("support", task, Infinity, true), side("query", task, Infinity, true)));
  if (!shown.has(task)) parts.push(make("p", "soft", `${listed ? "Pictures" : "Examples"} of this task are not in the page; metainfluence report --most ${lists.task.ids.length} puts in as many as fit.`));
  byId("detail").querySelector("div").replaceChildren(...parts);
  byId("detail").showModal();
  byId("detail").scrollTop = 0;
}

// ---- all of a role

function columnsOf() {
  const list = lists[role], own = list.columns.map((column) => ({ name: column.name.replaceAll("_", " "), at: (k) => column.values[column.codes[k]], own: true }));
  const score = { name: "score", at: (k) => list.scores[k], number: true };
  if (role === "task") return [{ name: "rank", at: (k) => k + 1 }, { name: "task", at: (k) => list.ids[k] }, score, ...own];
  const of = { name: "task", at: (k) => (list.task[k] < 0 ? "–" : lists.task.ids[list.task[k]]) };
  return [{ name: "rank", at: (k) => list.rank[k] + 1 }, { name: "example", at: (k) => list.ids[k], shows: true }, score, of, ...own];
}

// Numbers go before words, and what is missing comes last in either order.
function compare(left, right, direction) {
  const missing = (left === "–") - (right === "–");
  if (missing) return missing;
  const [a, b] = [left, right].map((each) => (typeof each === "string" && each.trim() !== "" && !Number.isNaN(Number(each)) ? Number(each) : each));
  if (typeof a !== typeof b) return direction * (typeof a === "number" ? -1 : 1);
  return direction * (typeof a === "number" ? a - b : a.localeCompare(b));
}

function headings() {
  const row = byId("ranking").tHead.rows[0];
  row.replaceChildren(...columnsOf().map((column, k) => {
    const button = make("button", "", column.name);
    button.type = "button";
    button.addEventListener("click", () => {
      sortedBy = { column: k, direction: sortedBy.column === k ? -sortedBy.direction : 1 };
      refresh();
    });
    const heading = make("th", "", button);
    heading.setAttribute("aria-sort", sortedBy.column !== k ? "none" : sortedBy.direction === 1 ? "ascending" : "descending");
    return heading;
  }));
}

function refresh() {
  const columns = columnsOf(), { column, direction } = sortedBy, needle = byId("filter").value.trim().toLowerCase();
  const total = lists[role].ids.length;
  sorted = Array.from({ length: total }, (_, k) => k);
  if (needle) sorted = sorted.filter((k) => columns.some((each) => String(each.number ? signed(each.at(k)) : each.at(k)).toLowerCase().includes(needle)));
  const keys = new Map(sorted.map((k) => [k, columns[column].at(k)]));
  sorted.sort((a, b) => compare(keys.get(a), keys.get(b), direction));
  visible = total <= 2 * FIRST ? total : FIRST;
  headings();
  byId("ranking").tBodies[0].replaceChildren();
  const all = roles[role].count;
  byId("rows").textContent = `${sorted.length} of ${total} rows${all > total ? `; ${all} in the file` : ""}`;
  rows(0);
}

function field(column, k, task) {
  const value = column.at(k), { picture, text } = lists[role], seen = picture && (picture[k] >= 0 || text[k]);
  const found = make("td", column.number ? `number ${value < 0 ? "bad" : "good"}` : typeof value === "number" ? "number" : "");
  if (column.name === "task" && task >= 0) found.append(Object.assign(make("button", "go", String(value)), { type: "button" }));
  else found.append(column.shows && seen ? item(role, k) : column.number ? signed(value) : String(value));
  // For narrow screens, where no heading stands above.
  if (column.own || column.name === "task") found.dataset.name = column.name;
  found.dataset.value = value;
  if (column.name === "label" && seen) found.className = "again";
  return found;
}

function rows(start) {
  const columns = columnsOf();
  byId("ranking").tBodies[0].append(...sorted.slice(start, visible).map((k) => {
    const task = role === "task" ? k : lists[role].task[k];
    const row = make("tr", "", ...columns.map((column) => field(column, k, task)));
    if (task >= 0) row.addEventListener("click", () => open(task));
    return row;
  }));
  byId("more").hidden = visible >= sorted.length;
}

function choose(name) {
  role = name;
  sortedBy = { column: 0, direction: 1 };
  byId("ranked").textContent = PLURAL[role];
  const slider = byId("worst"), found = measuredHere();
  slider.max = roles[role].worst.length;
  slider.value = found ? found.removed : Math.min(roles[role].harmful, roles[role].worst.length);
  remove(Number(slider.value));
  refresh();
}

for (const { name, count } of data.roles) {
  if (!count) continue;
  const option = make("option", "", `${count} ${PLURAL[name]}`);
  option.value = name;
  byId("role").append(option);
}
byId("role").addEventListener("change", (event) => choose(event.target.value));
byId("worst").addEventListener("input", (event) => remove(Number(event.target.value)));
byId("filter").addEventListener("input", refresh);
byId("more").addEventListener("click", () => { visible += PAGE; rows(visible - PAGE); });
byId("close").addEventListener("click", () => byId("detail").close());
byId("detail").addEventListener("click", (event) => { if (event.target === byId("detail")) byId("detail").close(); });
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
addEventListener("resize", () => remove(Number(byId("worst").value)));

const ordered = data.shown.toSorted((a, b) => a - b);
cards("harmful", ordered.filter((task) => lists.task.scores[task] < 0));
cards("helpful", ordered.filter((task) => lists.task.scores[task] >= 0).reverse());
choose(data.roles.find(({ count }) => count)?.name ?? "task");
