// Sorts tables by their heads, filters long ones, copies what stands beside a button. The page is complete without it.
"use strict";

const FILTER_FROM = 20; // rows from which a table gets a filter
const ORDERS = { null: "ascending", ascending: "descending", descending: null }; // what follows what at a click
const COMPARE = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b };

const make = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

// The number that a text starts with: "over 12" is 12, "2.35 ± 0.1" is 2.35; NaN where it is none.
function number(text) {
  const [, digits] = /^(?:over )?(-?(?:∞|\d*\.?\d+(?:e[+-]?\d+)?))(?!\w)/.exec(text) || [];
  return digits ? Number(digits.replace("∞", "Infinity")) : NaN;
}

// Numbers before text, nothing last, whichever the direction.
function sorted(rows, column, direction) {
  const keyed = rows.map((row) => {
    const text = row.cells[column].textContent.trim(), value = number(text);
    return { row, text, value, group: /^–?$/.test(text) ? 2 : Number(Number.isNaN(value)) };
  });
  const between = (a, b) => (a.group ? a.text.localeCompare(b.text, "en", { numeric: true }) : a.value - b.value);
  return keyed.sort((a, b) => a.group - b.group || direction * between(a, b)).map(({ row }) => row);
}

function addSorting(table) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", {}, ...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const order = ORDERS[head.ariaSort];
      for (const other of heads) other.ariaSort = null;
      head.ariaSort = order;
      body.append(...(order ? sorted(rows, column, order === "ascending" ? 1 : -1) : rows));
    };
  });
}

const plain = (name) => name.toLowerCase().replace(/[^a-z0-9.]+/g, "_").replace(/^_|_$/g, "");
const amount = (text) => number(text) / (text.endsWith("%") ? 100 : 1);

// How alike two names are: the pairs of letters of one that the other has too.
const alike = (a, b) => [...a].filter((_, i) => i && b.includes(a.slice(i - 1, i + 1))).length / (a.length + b.length);

// Whether a text fulfils `=a`, `=a,b` (either), `=a..b` (from, to; an end may be left out), `!=a`, `<a` and so on.
function condition(operator, operand) {
  const compare = COMPARE[operator], wanted = amount(operand);
  if (compare && Number.isNaN(wanted)) throw new Error(`${operand} is no number`);
  if (compare) return (text) => compare(amount(text), wanted);
  const either = operand.split(",").map((part) => {
    const [low, high] = part.split("..").map(amount); // NaN, which no number is beyond, where left out
    if (part.includes("..")) return (value) => !(Number.isNaN(value) || value < low || value > high);
    return (value, text) => value === low || text === part;
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
  const input = make("input", { type: "search", placeholder: "words, or column = value" }), count = make("output", {});
  const named = (head) => (head.dataset.names || plain(head.textContent)).split(" ");
  table.names = new Map([...table.tHead.rows[0].cells].flatMap((head, i) => named(head).map((name) => [name, i])));
  table.ask = (text) => {
    const wrong = [];
    input.value = text;
    table.asked = (text.toLowerCase().match(/(?:[^\s"]|"[^"]*"?)+/g) || []).flatMap((token) => {
      try { return [term(token, table.names)]; } catch (error) { wrong.push(error.message); return []; }
    });
    rows.forEach((row, i) => { row.hidden = !table.asked.every(({ holds }) => holds(cells[i])); });
    const shown = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    count.textContent = [...(table.asked.length ? [shown] : []), ...wrong].join("; ");
    count.className = wrong.length ? "wrong" : "";
    table.dispatchEvent(new Event("filtered"));
  };
  input.oninput = () => table.ask(input.value);
  const place = document.getElementById(table.dataset.filter) || table.parentElement;
  place.before(make("label", { className: "filter" }, "Filter ", input, " ", count));
  table.ask("");
}

for (const table of document.querySelectorAll("table")) {
  const rows = table.tBodies[0].rows.length;
  if (rows > 1) addSorting(table);
  if (rows >= FILTER_FROM || table.dataset.filter) addFilter(table);
}

for (const button of document.querySelectorAll(".copy button")) {
  button.onclick = async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };
}
