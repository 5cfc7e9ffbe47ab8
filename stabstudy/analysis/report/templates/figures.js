// Reads figures: the values of the mark under the pointer, or chosen with the arrow keys. Every figure is complete
// without it.
"use strict";
{
  const REACH = 40; // CSS pixels: a mark further away is not meant
  const tip = make("div", { className: "tip", role: "status" });
  const spot = make("div", { className: "spot", hidden: true }, tip); // a ring around the mark
  document.body.append(spot);

  const hide = () => { spot.hidden = true; };
  document.addEventListener("scroll", hide, { capture: true, passive: true });

  // The marks of all series in one list, each with what it says and the page that it leads to.
  function marksOf({ marks, trials, runs }) {
    const page = (series, i) => {
      if (trials === undefined) return null;
      if (series.trials) return `${trials}${series.trials[i]}.html`;
      return series.filter && `${runs}#${new URLSearchParams({ filter: series.filter[i] })}`;
    };
    const mark = (series, i) => {
      const name = series.name && `${series.name}: `, id = series.trials ? ` (trial ${series.trials[i]})` : "";
      const values = [`${series.x} ${series.a[i]}`, `${series.y} ${series.b[i]}`].map((text) => text.trim());
      const [x, y] = series.at.slice(2 * i, 2 * i + 2);
      return { series, x: x / 1e4, y: y / 1e4, text: `${name}${values.join(", ")}${id}`, page: page(series, i) };
    };
    return JSON.parse(marks).flatMap((series) => series.a.map((_, i) => mark(series, i)));
  }

  function readable(figure) {
    const marks = marksOf(figure.dataset);
    const image = figure.querySelector("img"), region = figure.querySelector(".scroll");
    let chosen = null;
    const place = ({ x, y }) => {
      const box = image.getBoundingClientRect();
      return [box.left + x * box.width, box.top + y * box.height];
    };
    const choose = (mark) => {
      chosen = mark;
      spot.hidden = !mark;
      if (!mark) return;
      tip.textContent = mark.text;
      place(mark).forEach((at, i) => spot.style.setProperty(["--x", "--y"][i], `${at}px`));
    };
    const follow = () => { if (chosen?.page) location.href = chosen.page; };
    const point = ({ clientX, clientY }) => {
      const far = marks.map((mark) => {
        const [x, y] = place(mark);
        return Math.hypot(x - clientX, y - clientY) - (mark.page ? 1e-6 : 0); // of two at one place it can be followed
      });
      const nearest = far.indexOf(Math.min(...far));
      choose(far[nearest] < REACH ? marks[nearest] : null);
    };
    Object.assign(image, { onpointermove: point, onpointerdown: point, onpointerleave: hide });
    image.onclick = ({ detail }) => { if (detail === 1) follow(); };
    region.onblur = hide;
    region.onkeydown = (event) => {
      const at = marks.indexOf(chosen), others = (mark) => mark.series !== chosen?.series;
      const to = {
        ArrowRight: marks[at + 1], ArrowLeft: marks[at - 1], Home: marks[0], End: marks.at(-1),
        ArrowDown: marks.slice(at + 1).find(others), ArrowUp: marks.slice(0, at).findLast(others),
      };
      if (event.key === "Enter") follow();
      else if (event.key === "Escape") choose(null);
      else if (event.key in to) choose(to[event.key] || chosen);
      else return;
      event.preventDefault();
    };
  }

  document.querySelectorAll("figure[data-marks]").forEach(readable);

  // Downloads of a trial's figures: the picture is in the page already.

  function png(image) {
    const canvas = make("canvas", { width: 2 * image.naturalWidth, height: 2 * image.naturalHeight });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL();
  }

  for (const link of document.querySelectorAll("a[data-picture]")) {
    const image = link.closest("figure").querySelector("img");
    link.onclick = () => { link.href = link.dataset.picture === "png" ? png(image) : image.src; };
  }
}
