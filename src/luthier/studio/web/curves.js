// Curves as SVG that stretches to any width, its labels in HTML so that they stay readable on a phone. As in report.html.

import { h, number, svg } from "./dom.js";

const SIDE = 1000;
const MOST = 800; // points of a curve drawn

/** series: [[name, class, [[step, value], ...]], ...] */
export function chart(series, label, low = null) {
  const drawn = series.map(([name, kind, points]) => [name, kind, thinned(points)]).filter(([, , points]) => points.length);
  const every = drawn.flatMap(([, , points]) => points);
  if (!every.length) return null;
  const xs = every.map((p) => p[0]), ys = every.map((p) => p[1]);
  const left = Math.min(...xs), right = Math.max(...xs, left + 1);
  const marks = ticks(low === null ? Math.min(...ys) : Math.min(low, ...ys), Math.max(...ys));
  const bottom = marks[0], top = marks[marks.length - 1];
  const across = (x) => (x - left) / (right - left) * SIDE;
  const down = (y) => SIDE - (y - bottom) / (top - bottom || 1) * SIDE;
  const grid = marks.map((y) => svg("line", { class: "grid", x1: 0, x2: SIDE, y1: down(y), y2: down(y) }));
  const lines = drawn.map(([, kind, points]) => {
    const some = points.length === 1 ? [[left, points[0][1]], [right, points[0][1]]] : points;
    return svg("polyline", { class: kind, points: some.map(([x, y]) => `${across(x).toFixed(1)},${down(y).toFixed(1)}`).join(" ") });
  });
  const last = drawn.map(([name, , points]) => `${name} ${number(points[points.length - 1][1])}`).join(", ");
  return h("div", { class: "chart", role: "img", "aria-label": `${label}; at step ${right}: ${last}` },
    svg("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, preserveAspectRatio: "none", "aria-hidden": "true" }, grid, lines, columns(drawn, across)),
    marks.map((y) => placed(h("span", { class: "y" }, short(y)), "top", down(y))),
    ticks(left, right, 5).filter((x) => x >= left && x <= right && Number.isInteger(x)).map((x) => placed(h("span", { class: "x" }, x.toLocaleString("en")), "left", across(x))));
}

function placed(element, side, at) {
  element.style[side] = `${at / SIDE * 100}%`;
  return element;
}

/** Invisible columns whose tooltip says the values of a step. */
function columns(series, across) {
  const steps = [...new Set(series.flatMap(([, , points]) => points.map((p) => p[0])))].sort((a, b) => a - b);
  const some = steps.filter((_, i) => i % Math.ceil(steps.length / 120) === 0);
  const known = series.map(([name, , points]) => [name, new Map(points)]);
  const width = SIDE / Math.max(1, some.length);
  return some.map((x) => {
    const said = known.filter(([, values]) => values.has(x)).map(([name, values]) => `${name} ${number(values.get(x))}`).join(", ");
    const from = Math.max(0, across(x) - width / 2), to = Math.min(SIDE, across(x) + width / 2); // what reaches out would let the page scroll
    return svg("rect", { x: from, y: 0, width: to - from, height: SIDE }, svg("title", {}, `step ${x}: ${said}`));
  });
}

/** Round numbers from below `low` to above `high`. */
export function ticks(low, high, about = 4) {
  const span = high - low || Math.abs(high) || 1;
  const size = 10 ** Math.floor(Math.log10(span / about));
  const step = size * [1, 2, 2.5, 5, 10].find((m) => size * m >= span / about * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.max(Math.ceil(high / step - 1e-9), first + 1);
  return Array.from({ length: last - first + 1 }, (_, i) => Number((step * (first + i)).toPrecision(12)));
}

/** The mean of what lies around each point, about a twentieth of the run: even-handed, so that no lag is drawn. */
export function smoothed(points) {
  const half = Math.floor(points.length / 40) || Math.min(1, Math.floor(points.length / 8));
  const sums = [0];
  for (const [, y] of points) sums.push(sums[sums.length - 1] + y);
  return points.map(([x], i) => {
    const reach = Math.min(half, i, points.length - 1 - i);
    return [x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)];
  });
}

/** Of each stretch its lowest and highest, so that no spike disappears. */
function thinned(points) {
  if (points.length <= MOST) return points;
  const size = Math.ceil(2 * points.length / MOST), out = [];
  for (let i = 0; i < points.length; i += size) {
    const some = points.slice(i, i + size);
    const low = some.reduce((a, b) => (b[1] < a[1] ? b : a)), high = some.reduce((a, b) => (b[1] > a[1] ? b : a));
    out.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low]));
  }
  return out;
}

function short(y) {
  if (y && Math.abs(y) < 1e-3) return String(Number(y.toPrecision(3)).toExponential()).replace("e-", "e-");
  return Math.abs(y) >= 1000 ? Math.round(y).toLocaleString("en") : String(y);
}
