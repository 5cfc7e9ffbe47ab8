// Sorts tables by their heads, filters long ones, copies what a button names. The page is complete without it.
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
  const number = /^(?:over )?(-?(?:∞|\d*\.?\d+(?:e[+-]?\d+)?))(?![\w])/.exec(text);
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

// How alike two names are: the pairs of letters of one that the other has too.
const alike = (a, b) => [...a].filter((_, i) => i && b.includes(a.slice(i - 1, i + 1))).length / (a.length + b.length);

const plain = (name) => name.toLowerCase().replace(/[^a-z0-9.]+/g, "_").replace(/^_|_$/g, "");
const ORDER = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b };

// The number that a text starts with, "3 %" as 0.03; null where it is none.
function amount(text) {
  const value = key(text);
  return typeof value !== "number" ? null : text.endsWith("%") ? value / 100 : value;
}

// Whether a text fulfils `=a`, `=a,b` (either), `=a..b` (from, to; an end may be left out), `!=a`, `<a` and so on.
function condition(operator, operand) {
  const wanted = amount(operand);
  if (ORDER[operator] && wanted === null) throw new Error(`${operand} is no number`);
  if (ORDER[operator]) return (text) => amount(text) !== null && ORDER[operator](amount(text), wanted);
  const either = operand.split(",").map((part) => {
    const [low, high] = part.split("..").map(amount);
    const within = (value) => value !== null && value >= (low ?? -Infinity) && value <= (high ?? Infinity);
    if (part.includes("..")) return within;
    return (value, text) => (value === null || low === null ? text === part : value === low);
  });
  return (text) => either.some((holds) => holds(amount(text), text)) === (operator === "=");
}

// One part of a filter: a word, which is in the row, or what a column fulfils. Throws where the column is misspelt.
function term(token, names) {
  const bare = token.replaceAll('"', "");
  const [, called, operator, operand] = /^([^=!<>]+)(!=|<=|>=|=|<|>)(.*)$/.exec(bare) || [];
  if (!called) return { token, holds: (cells) => cells.some((cell) => cell.includes(bare)) };
  const name = plain(called), column = names.get(name);
  if (column === undefined) {
    const nearest = [...names.keys()].sort((a, b) => alike(name, b) - alike(name, a)).slice(0, 3);
    throw new Error(`no column is called ${called}; the nearest are ${nearest.join(", ")}`);
  }
  const test = operand ? condition(operator, operand) : () => true; // it is still being typed
  return { token, column, test, holds: (cells) => test(cells[column]) };
}

// Puts a filter before the table, or before the element that it names. table.ask(text) filters, and is told as an
// event `filtered`; table.asked are the terms, table.names the columns by every name.
function addFilter(table) {
  const rows = [...table.tBodies[0].rows];
  const cells = rows.map((row) => [...row.cells].map((cell) => cell.textContent.trim().toLowerCase()));
  const input = make("input", { type: "search", placeholder: "words, or column = value" });
  const count = make("output", {});
  table.names = new Map([...table.tHead.rows[0].cells].flatMap((head, i) => (
    (head.dataset.names || plain(head.textContent)).split(" ").map((name) => [name, i]))));
  table.ask = (text) => {
    const wrong = [];
    input.value = text;
    table.asked = (text.toLowerCase().match(/(?:[^\s"]|"[^"]*"?)+/g) || []).flatMap((token) => {
      try { return [term(token, table.names)]; } catch (error) { wrong.push(error.message); return []; }
    });
    rows.forEach((row, i) => { row.hidden = !table.asked.every(({ holds }) => holds(cells[i])); });
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = [...(table.asked.length ? [`${shown} of ${rows.length} rows`] : []), ...wrong].join("; ");
    count.classList.toggle("wrong", wrong.length > 0);
    table.dispatchEvent(new Event("filtered"));
  };
  input.addEventListener("input", () => table.ask(input.value));
  (document.getElementById(table.dataset.filter) || table.parentElement).before(
    make("label", { className: "filter" }, "Filter ", input, " ", count));
  table.ask("");
}

for (const table of document.querySelectorAll("table")) {
  const rows = table.tBodies[0].rows.length;
  if (rows > 1) addSorting(table);
  if (rows >= FILTER_FROM || table.dataset.filter) addFilter(table);
}

// <button data-copy="some text">, or data-copy="#id" for the text of that element. Hidden until now: it needs a script.
for (const button of document.querySelectorAll("[data-copy]")) {
  const { textContent: words, dataset: { copy } } = button;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(/^#[\w-]+$/.test(copy) ? document.querySelector(copy).textContent : copy);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = words; }, 1500);
  });
}
