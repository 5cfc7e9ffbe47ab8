// Sorts tables by their heads, filters long ones, copies what a button names. The page is complete without it.
"use strict";

const FILTER_FROM = 20; // rows from which a table gets a filter

const make = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

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
    const button = make("button", {}, ...head.childNodes);
    button.addEventListener("click", () => sort(table, column, order));
    head.append(button);
  });
}

// Changes of one letter that make one name of the other.
function distance(a, b) {
  let row = [...Array(b.length + 1).keys()];
  for (const c of a) {
    const next = [row[0] + 1];
    for (let j = 1; j <= b.length; j += 1) next[j] = Math.min(next[j - 1], row[j], row[j - 1] - (c === b[j - 1])) + 1;
    row = next;
  }
  return row[b.length];
}

const plain = (name) => name.toLowerCase().replace(/[^a-z0-9.]+/g, "_").replace(/^_|_$/g, "");
const amount = (text) => (text.trim() === "" ? NaN : Number(text.replace(/%$/, ""))) / (text.endsWith("%") ? 100 : 1);
const ORDER = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b };

// Whether a cell's text fulfils `= a`, `= a,b` (either), `= a..b` (from, to), `!=`, `<` and so on.
function condition(operator, operand) {
  if (operator in ORDER) {
    if (Number.isNaN(amount(operand))) throw new Error(`${operand} is no number`);
    return (text, value) => value !== null && ORDER[operator](value, amount(operand));
  }
  const either = operand.split(",").map((part) => {
    const [low, high] = part.split("..").map(amount);
    if (part.includes("..")) return (text, value) => value !== null && !(value < low) && !(value > high);
    return (text, value) => (value === null || Number.isNaN(low) ? text === part : value === low);
  });
  return (text, value) => either.some((holds) => holds(text, value)) === (operator === "=");
}

// What a filter asks: `tests` of columns, `words` that a row must hold, `problems` of what is misspelt.
function parsed(text, names) {
  const asked = { tests: [], words: [], problems: [] };
  for (const token of text.toLowerCase().match(/(?:[^\s"]+|"[^"]*"?)+/g) || []) {
    const [, name, operator, operand] = /^([^=!<>]+)(!=|<=|>=|=|<|>)(.*)$/.exec(token.replaceAll('"', "")) || [];
    if (!name) asked.words.push(token.replaceAll('"', ""));
    else if (!names.has(plain(name))) {
      const near = [...names.keys()].sort((a, b) => distance(plain(name), a) - distance(plain(name), b)).slice(0, 3);
      asked.problems.push(`No column is called ${name}: ${near.join(", ")}?`);
    } else if (operand) { // else it is still being typed
      try {
        asked.tests.push({ column: names.get(plain(name)), token, holds: condition(operator, operand) });
      } catch (error) { asked.problems.push(`${token}: ${error.message}.`); }
    }
  }
  return asked;
}

// A table with a filter is told `filtered` of every change; what it asks is in table.asked.
function addFilter(table) {
  const rows = [...table.tBodies[0].rows];
  const cells = rows.map((row) => [...row.cells].map((cell) => (cell.dataset.text ?? cell.textContent).trim().toLowerCase()));
  const values = cells.map((texts) => texts.map((text) => (typeof key(text) === "number" ? key(text) / (text.endsWith("%") ? 100 : 1) : null)));
  const heads = [...table.tHead.rows[0].cells];
  const names = new Map(heads.flatMap((head, i) => (head.dataset.names || plain(head.textContent)).split(" ").map((name) => [name, i])));
  const input = make("input", { type: "search", placeholder: "words, or column = value" });
  const count = make("output", {});
  const apply = () => {
    const { tests, words, problems } = table.asked = parsed(input.value, names);
    rows.forEach((row, i) => {
      row.hidden = !(words.every((word) => cells[i].some((text) => text.includes(word)))
        && tests.every(({ column, holds }) => holds(cells[i][column], values[i][column])));
    });
    const shown = tests.length || words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
    count.textContent = [shown, ...problems].filter(Boolean).join(". ");
    count.classList.toggle("wrong", problems.length > 0);
    table.dispatchEvent(new Event("filtered"));
  };
  input.addEventListener("input", apply);
  const label = make("label", { className: "filter" }, "Filter ", input, " ", count);
  (document.getElementById(table.dataset.filter) || table.parentElement).before(label);
  Object.assign(table, { ask: (text) => { input.value = text; apply(); }, filter: input, asked: parsed("", names), columns: names });
}

for (const table of document.querySelectorAll("table")) {
  const rows = table.tBodies[0].rows.length;
  if (rows > 1) addSorting(table);
  if (rows >= FILTER_FROM || table.dataset.filter) addFilter(table);
}

// <button data-copy="text"> or data-copy="#id": the text of that element.
document.addEventListener("click", async ({ target }) => {
  const button = target.closest("[data-copy]");
  if (!button) return;
  const { copy } = button.dataset;
  const text = copy.startsWith("#") ? document.querySelector(copy).textContent : copy;
  await navigator.clipboard.writeText(text);
  const words = button.textContent;
  button.textContent = "copied";
  setTimeout(() => { button.textContent = words; }, 1500);
});
