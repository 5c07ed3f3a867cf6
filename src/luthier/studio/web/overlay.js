// Curves of several runs in one chart, with what they come to in a table for who cannot see them.

import { ask, field, fill, h, number } from "./dom.js";
import { curves } from "./charts.js";
import { positive, series, smoothed } from "./curves.js";

const OWN = ["step", "tokens", "seconds", "epoch", "eval_loss"];
const MOST = 8; // colours that can be told apart

/** names: the runs that are chosen now. rows: on which rows a run is evaluated. `show` reads what is new of each and draws. */
export function overlay(names, rows, signal) {
  const logs = new Map(); // run -> what was read of it
  const what = h("select", { onchange: () => draw() });
  const drawn = h("div"), box = h("section", { class: "panel", hidden: true, "aria-labelledby": "o-title" }, h("h2", { id: "o-title" }, "Curves"), h("div", { class: "fields" }, field("Curve", what)), drawn);
  let before = "";

  async function read(name) {
    const at = logs.get(name) ?? { since: 0, mark: "", lines: [] };
    logs.set(name, at);
    for (let full = true; full;) {
      const result = await ask(`/api/runs/${encodeURIComponent(name)}/live?since=${at.since}&mark=${encodeURIComponent(at.mark)}`, undefined, { signal });
      if (result.anew) at.lines = [];
      at.lines.push(...result.lines);
      at.since = result.next;
      at.mark = result.mark;
      full = result.lines.length > 2000;
    }
  }

  const points = (name, key) => series(logs.get(name).lines, key);
  const plot = h("div", { class: "plot" });
  let chart = null;

  function draw() {
    const some = names().slice(0, MOST).filter((name) => logs.get(name)?.lines.length);
    const keys = ["loss", ...new Set(some.flatMap((n) => logs.get(n).lines.flatMap((x) => Object.keys(x))).filter((k) => !OWN.includes(k) && k !== "loss"))];
    const mark = JSON.stringify([some.map((n) => [n, logs.get(n).lines.length, logs.get(n).mark]), keys, what.value]);
    if (mark === before) return;
    before = mark;
    const key = keys.includes(what.value) ? what.value : "loss";
    fill(what, keys.map((k) => h("option", { value: k }, k.replaceAll("_", " "))));
    what.value = key;
    const heldOut = (name) => key === "loss" ? points(name, "eval_loss") : [];
    const lossLike = key === "loss";
    const drawnCurves = some.flatMap((name, i) => [
      { name, colour: `c${i}`, points: lossLike ? smoothed(points(name, key)) : points(name, key) },
      { name: `${name}, ${rows(name)}`, colour: `c${i}`, dash: true, points: heldOut(name) },
    ]).filter((one) => one.points.length);
    const label = `${key.replaceAll("_", " ")} by step of ${some.join(", ")}`;
    fill(drawn, some.length === 0 ? h("p", { class: "note" }, "Nothing is logged yet.") : [
      names().length > MOST && h("p", { class: "note" }, `The first ${MOST} of ${names().length} are drawn.`),
      plot,
      h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "The curves in numbers" }, h("table", {}, h("caption", {}, `${key.replaceAll("_", " ")}, in numbers`),
        h("thead", {}, h("tr", {}, ["run", "steps", "first", "last", "lowest", "at step", "evaluated", "lowest evaluated"].map((t) => h("th", { scope: "col" }, t)))),
        h("tbody", {}, some.map((name) => {
          const line = points(name, key), out = heldOut(name), low = lowest(line);
          return h("tr", {}, h("th", { scope: "row" }, name), [line.at(-1)?.[0], line[0]?.[1], line.at(-1)?.[1], low?.[1], low?.[0], out.at(-1)?.[1], lowest(out)?.[1]].map((x) => h("td", {}, number(x) || "–")));
        })))),
    ]);
    if (drawnCurves.length === 0) return;
    const spec = { label, log: positive(...drawnCurves.map((one) => one.points)), series: drawnCurves };
    if (chart) chart.update(spec);
    else chart = curves(plot, spec);
  }

  async function show() {
    box.hidden = names().length === 0;
    await Promise.all(names().slice(0, MOST).map(read));
    draw();
  }
  return { box, show };
}

function lowest(points) {
  return points.reduce((a, b) => (a && a[1] <= b[1] ? a : b), undefined);
}
