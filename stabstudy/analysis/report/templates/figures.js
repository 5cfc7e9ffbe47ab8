// Reads figures: the values of the mark under the pointer, or chosen with the arrow keys. Every figure is complete
// without it.
"use strict";

// Hands a file to the reader.
function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

{
  const REACH = 40; // CSS pixels: a mark further away is not meant

  const tip = make("div", { className: "tip", hidden: true });
  tip.setAttribute("role", "status");
  const ring = make("div", { className: "ring", hidden: true });
  document.body.append(ring, tip);

  const hide = () => { tip.hidden = ring.hidden = true; };

  // Both stand where (x, y) of the window is; the words stay inside it.
  function show(x, y, text) {
    tip.textContent = text;
    tip.hidden = ring.hidden = false;
    ring.style.left = `${x}px`;
    ring.style.top = `${y}px`;
    const { width, height } = tip.getBoundingClientRect();
    const right = document.documentElement.clientWidth;
    tip.style.left = `${Math.max(4, Math.min(right - width - 4, x - width / 2))}px`;
    tip.style.top = `${y - height - 14 < 4 ? y + 14 : y - height - 14}px`;
  }

  function said(series, i) {
    const first = series.x ? `${series.x} ${series.a[i]}` : series.a[i];
    const second = series.y ? `${series.y} ${series.b[i]}` : series.b[i];
    const trial = series.trials ? ` (trial ${series.trials[i]})` : "";
    return `${series.name ? `${series.name}: ` : ""}${first}, ${second}${trial}`;
  }

  function readable(figure) {
    const all = JSON.parse(figure.dataset.marks).filter((series) => series.at.length);
    if (!all.length) return false;
    const image = figure.querySelector("img");
    const region = figure.querySelector(".scroll");
    const { trials: folder, runs } = figure.dataset;
    let chosen = null; // [series, mark]

    const place = (series, i) => {
      const box = image.getBoundingClientRect();
      return [box.left + series.at[2 * i] * box.width / 1e4, box.top + series.at[2 * i + 1] * box.height / 1e4];
    };
    const choose = (s, i) => {
      chosen = [s, i];
      show(...place(all[s], i), said(all[s], i));
    };
    const follow = () => {
      const [trial, filter] = ["trials", "filter"].map((name) => chosen && all[chosen[0]][name]?.[chosen[1]]);
      if (trial && folder !== undefined) location.href = `${folder}${trial}.html`;
      else if (filter && runs) location.href = `${runs}#${new URLSearchParams({ filter })}`;
    };
    const nearest = (event) => {
      let best = [REACH, -1, -1];
      all.forEach((series, s) => {
        for (let i = 0; i < series.a.length; i += 1) {
          const [x, y] = place(series, i);
          const far = Math.hypot(x - event.clientX, y - event.clientY);
          // of marks at one place a trial is the one that can be followed
          if (far < best[0] || (far === best[0] && series.trials)) best = [far, s, i];
        }
      });
      if (best[1] < 0) { chosen = null; hide(); } else choose(best[1], best[2]);
    };
    image.addEventListener("pointermove", nearest);
    image.addEventListener("pointerdown", nearest);
    image.addEventListener("pointerleave", hide);
    image.addEventListener("click", (event) => { if (event.detail === 1) follow(); });
    region.addEventListener("blur", hide);
    region.addEventListener("keydown", (event) => {
      const [s, i] = chosen || [0, -1];
      const last = all[s].a.length - 1;
      const other = (by) => {
        const to = (s + by + all.length) % all.length;
        return [to, Math.max(0, Math.min(i, all[to].a.length - 1))];
      };
      const to = {
        ArrowRight: () => [s, Math.min(last, i + 1)], ArrowLeft: () => [s, Math.max(0, i - 1)],
        ArrowDown: () => other(1), ArrowUp: () => other(-1), Home: () => [s, 0], End: () => [s, last],
      }[event.key];
      if (to) { event.preventDefault(); choose(...to()); }
      if (event.key === "Enter") follow();
      if (event.key === "Escape") { chosen = null; hide(); }
    });
    return true;
  }

  document.addEventListener("scroll", hide, { capture: true, passive: true });

  const drawn = [...document.querySelectorAll("figure[data-marks]")].filter(readable);
  const shown = drawn.filter(({ dataset }) => dataset.steps === undefined); // that of the steps is folded away below
  if (shown.length) {
    const opens = shown.some(({ dataset }) => dataset.trials !== undefined && dataset.marks.includes('"trials"'));
    const hint = "Point at a mark to read its values, or focus a figure and use the arrow keys."
      + (opens ? " A click, or Enter, on the mark of a trial opens its page, on a field or a legend the runs there." : "");
    const spot = document.querySelector("p.glossary");
    const before = shown[0].previousElementSibling || shown[0];
    const words = make("p", { className: "hint" }, hint);
    if (spot) spot.after(words); else before.before(words);
  }

  // Downloads of a trial's figures: the picture is in the page already.

  function downloads(figure) {
    const image = figure.querySelector("img");
    const name = `${figure.dataset.file}`;
    const png = () => {
      const canvas = make("canvas", { width: 2 * image.naturalWidth, height: 2 * image.naturalHeight });
      const pen = canvas.getContext("2d");
      pen.drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, `${name}.png`));
    };
    const files = make("span", { className: "files" },
      make("a", { href: image.src, download: `${name}.svg` }, "SVG"), " ",
      make("button", { type: "button", onclick: png }, "PNG"));
    figure.querySelector("figcaption").append(" ", files);
  }

  for (const figure of document.querySelectorAll("figure[data-file]")) downloads(figure);
}
