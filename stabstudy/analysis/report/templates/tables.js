// Sorts tables by their heads and filters long ones. The page is complete without it.
"use strict";

const make = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

const FILTER_FROM = 20; // rows from which a table gets a filter

// "over 12" is 12, "2.35 ± 0.1" is 2.35; a dash is nothing; all else is text.
function key(text) {
  if (text === "–" || text === "") return null;
  const number = /^(?:over )?(-?(?:∞|\d[\d.]*(?:e-?\d+)?))(?![\w])/.exec(text);
  return number ? Number(number[1].replace("∞", "Infinity")) : text;
}

// Numbers before text, nothing last, whichever the direction.
function compare(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return direction * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

function sort(table, column, order) {
  const heads = table.tHead.rows[0].cells;
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  const state = next[heads[column].getAttribute("aria-sort") || "none"];
  for (const head of heads) head.removeAttribute("aria-sort");
  if (state !== "none") heads[column].setAttribute("aria-sort", state);
  const direction = state === "descending" ? -1 : 1;
  const keyed = order.map((row) => [key(row.cells[column].textContent.trim()), row]);
  if (state !== "none") keyed.sort((a, b) => compare(a[0], b[0], direction));
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

function addSorting(table) {
  const order = [...table.tBodies[0].rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, column, order));
    head.append(button);
  });
}

function addFilter(table) {
  const rows = [...table.tBodies[0].rows];
  const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
  const label = document.createElement("label");
  const input = document.createElement("input");
  const found = document.createElement("output");
  label.className = "filter";
  input.type = "search";
  input.placeholder = "all words must occur in a row";
  label.append("Filter ", input, " ", found);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
    found.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
  });
  table.parentElement.before(label);
}

for (const table of document.querySelectorAll("table")) {
  const rows = table.tBodies[0].rows.length;
  if (rows > 1) addSorting(table);
  if (rows >= FILTER_FROM) addFilter(table);
}
