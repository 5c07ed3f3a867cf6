// Paired differences as a picture: a row for each pair of arms, a point and its interval, beside zero.

import { h, svg } from "./dom.js";

const WIDTH = 600, ROW = 26, TOP = 6, FOOT = 22; // of a picture, in its own units

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
  const x = (value) => WIDTH / 2 + (value / reach) * (WIDTH / 2 - 8);
  const way = family.better === "lower" ? "lower is better" : family.better === "higher" ? "higher is better" : "";
  return h("figure", { class: "forest" },
    h("figcaption", {}, h("b", {}, label), way && `, ${way}`),
    h("div", { class: "rows" },
      h("div", { class: "axis" }, h("span", {}), picture(axis(x, reach, pairs.length)), h("span", {})),
      pairs.map((pair) => line(pair, family.better, x))));
}

/** Zero, and a tick on each side. */
function axis(x, reach, rows) {
  const step = nice(reach / 1.5);
  const mark = (value) => svg("text", { x: x(value), y: 14, "text-anchor": "middle", class: value === 0 ? "zero" : "" }, value === 0 ? "0" : `${value > 0 ? "+" : "−"}${Number(Math.abs(value).toPrecision(2))}`);
  return [20, [mark(-step), mark(0), mark(step)]];
}

const nice = (value) => {
  const size = 10 ** Math.floor(Math.log10(value));
  return [5, 2, 1].map((m) => m * size).find((v) => v <= value) ?? size;
};

function picture([height, inside], label) {
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: "none", class: "lane", style: null, ...(label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" }) }, inside);
}

function line(pair, better, x) {
  const good = better && pair.significant ? (pair.mean < 0) === (better === "lower") : null;
  const kind = !pair.significant ? "open" : good === true ? "good" : good === false ? "bad" : "clear";
  const winner = good === null ? "" : good ? `${pair.a} is better` : `${pair.b} is better`;
  const verdict = winner || (pair.significant ? "they differ" : "no difference shown");
  const middle = ROW / 2;
  const lane = svg("svg", { viewBox: `0 0 ${WIDTH} ${ROW}`, preserveAspectRatio: "none", class: `lane ${kind}`, role: "img", "aria-label": `${pair.a} minus ${pair.b}: ${pair.text}; ${verdict}` },
    svg("line", { x1: x(0), x2: x(0), y1: 0, y2: ROW, class: "zero" }),
    svg("line", { x1: x(pair.low), x2: x(pair.high), y1: middle, y2: middle, class: "interval" }),
    svg("line", { x1: x(pair.mean), x2: x(pair.mean), y1: middle - 7, y2: middle + 7, class: "mean" }));
  return h("div", { class: "pair" },
    h("span", { class: "arms" }, pair.a, h("i", {}, " − "), pair.b), lane,
    h("span", { class: "figures" }, pair.text, h("small", { class: kind }, `${verdict}${pair.p === null || pair.p === undefined ? "" : `, p ${pair.p < 0.001 ? "< 0.001" : `= ${pair.p.toFixed(3)}`}`}`)));
}
