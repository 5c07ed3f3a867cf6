// Paired differences as a picture: a row for each pair of arms, a point and its interval, beside zero.

import { h, svg } from "./dom.js";

const MIDDLE = 13; // pixels: of a line of the picture

/** families: [{label, better, pairs: [{a, b, mean, low, high, text, p, significant}]}]; the first is open, the others folded. */
export function forests(families) {
  if (!families.length) return null;
  const [first, ...rest] = families;
  return h("section", {}, h("h2", {}, "Paired differences"),
    h("p", { class: "note" }, "Both arms of a pair were trained on the same rows with the same seeds. A bar is the 95% interval of their difference; where it crosses zero, nothing is shown. p is corrected for the number of pairs."),
    forest(first),
    rest.length > 0 && h("details", {}, h("summary", {}, `Other metrics (${rest.length})`), rest.map(forest)));
}

function forest(family) {
  const { label, pairs } = family;
  const ends = pairs.flatMap((p) => [p.low, p.high, p.mean]).filter(Number.isFinite);
  const reach = Math.max(...ends.map(Math.abs), 1e-9) * 1.08;
  const x = (value) => `${(50 + (value / reach) * 49).toFixed(2)}%`; // of the picture's width: nothing is stretched
  const way = family.better === "lower" ? "lower is better" : family.better === "higher" ? "higher is better" : "";
  return h("figure", { class: "forest" },
    h("figcaption", {}, h("b", {}, label), way && `, ${way}`),
    h("div", { class: "rows" }, h("div", { class: "axis" }, h("span", {}), axis(x, reach), h("span", {})), pairs.map((pair) => line(pair, family.better, x))));
}

/** Zero, and a tick on each side. */
function axis(x, reach) {
  const step = nice(reach / 1.5);
  const text = (value) => (value === 0 ? "0" : `${value > 0 ? "+" : "−"}${Number(Math.abs(value).toPrecision(2))}`);
  return svg("svg", { class: "lane", "aria-hidden": "true" }, [-step, 0, step].map((value) => svg("text", { x: x(value), y: 14, "text-anchor": "middle" }, text(value))));
}

const nice = (value) => {
  const size = 10 ** Math.floor(Math.log10(value));
  return [5, 2, 1].map((m) => m * size).find((v) => v <= value) ?? size;
};

function line(pair, better, x) {
  const good = better && pair.significant ? (pair.mean < 0) === (better === "lower") : null;
  const kind = !pair.significant ? "open" : good === true ? "good" : good === false ? "bad" : "clear";
  const winner = good === null ? "" : good ? `${pair.a} is better` : `${pair.b} is better`;
  const verdict = winner || (pair.significant ? "they differ" : "no difference shown");
  const p = pair.p === null || pair.p === undefined ? "" : `, p ${pair.p < 0.001 ? "< 0.001" : `= ${pair.p.toFixed(3)}`}`;
  const lane = svg("svg", { class: `lane ${kind}`, role: "img", "aria-label": `${pair.a} minus ${pair.b}: ${pair.text}; ${verdict}` },
    svg("line", { x1: x(0), x2: x(0), y1: 0, y2: "100%", class: "zero" }),
    svg("line", { x1: x(pair.low), x2: x(pair.high), y1: MIDDLE, y2: MIDDLE, class: "interval" }),
    svg("line", { x1: x(pair.mean), x2: x(pair.mean), y1: MIDDLE - 7, y2: MIDDLE + 7, class: "mean" }));
  return h("div", { class: "pair" },
    h("span", { class: "arms" }, pair.a, h("i", {}, " − "), pair.b), lane,
    h("span", { class: "figures" }, pair.text, h("small", { class: kind }, verdict, p)));
}
