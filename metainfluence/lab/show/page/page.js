"use strict";
const table = document.getElementById("ranking");
const body = table.tBodies[0];
const rows = Array.from(body.rows);
const headings = Array.from(table.tHead.rows[0].cells);

function valueOf(cell) {
  const text = cell.dataset.value === undefined ? cell.textContent : cell.dataset.value;
  const number = Number(text);
  return text.trim() === "" || Number.isNaN(number) ? text : number;
}

// Numbers go before words, and what is missing comes last in either order.
function compare(left, right, direction) {
  const missing = (left === "–") - (right === "–");
  if (missing) return missing;
  if (typeof left !== typeof right) return direction * (typeof left === "number" ? -1 : 1);
  return direction * (typeof left === "number" ? left - right : left.localeCompare(right));
}

function sortBy(column) {
  const heading = headings[column];
  const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  headings.forEach((other) => { if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none"); });
  heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const keyed = rows.map((row) => [valueOf(row.cells[column]), row]);
  keyed.sort((left, right) => compare(left[0], right[0], direction));
  body.append(...keyed.map((pair) => pair[1]));
}

const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

function filter(wanted) {
  const needle = wanted.trim().toLowerCase();
  let count = 0;
  for (const row of rows) {
    row.hidden = !texts.get(row).includes(needle);
    count += !row.hidden;
  }
  document.getElementById("count").textContent = `${count} of ${rows.length} rows`;
}

headings.forEach((heading, column) => {
  const button = heading.querySelector("button");
  if (button) button.addEventListener("click", () => sortBy(column));
});
document.getElementById("filter").addEventListener("input", (event) => filter(event.target.value));
filter("");
