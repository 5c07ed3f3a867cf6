// The columns that the table of runs can have: what a cell shows, and by what its column is sorted.

import { bytes, count, duration, h, number } from "./dom.js";

/** A column: {key, title, group, better, value(run), cell(run)}. value: for sorting and for `loss<2`; cell: elements, text by default. */
const text = (key, title, value, more = {}) => ({ key, title, group: "recipe", value, cell: (r) => value(r) || "", ...more });
const method = (key, title) => text(key, title, (r) => r.methods[key]);
const measure = (key, title, value, show) => ({ key, title, group: "cost", numeric: true, value, cell: (r) => show(value(r)) });
const known = (value, show) => (value === undefined || value === null ? "" : show(value));

const FIXED = [
  text("model", "model", (r) => (r.kind === "run" ? r.methods.model : `${r.kind}: ${r.what}`), { cell: modelCell }),
  method("tuner", "tuner"),
  method("objective", "objective"),
  method("optim", "optimizer"),
  method("data", "data"),
  { key: "learning_rate", title: "learning rate", group: "recipe", numeric: true, value: (r) => asNumber(r.methods.learning_rate), cell: (r) => r.methods.learning_rate ?? "" },
  { key: "seed", title: "seed", group: "recipe", numeric: true, value: (r) => asNumber(r.methods.seed), cell: (r) => r.methods.seed ?? "" },
  measure("steps", "steps", (r) => r.steps ?? undefined, (v) => known(v, count)),
  measure("seconds", "training time", (r) => r.stats.seconds, (v) => known(v, duration)),
  measure("tokens_per_second", "tokens/s", (r) => r.stats.tokens_per_second, (v) => known(v, (x) => count(Math.round(x)))),
  measure("peak_memory_mb", "peak memory", (r) => r.stats.peak_memory_mb, (v) => known(v, (x) => bytes(x * 2 ** 20))),
  measure("moving", "trainable", (r) => (r.stats.all ? r.stats.moving / r.stats.all : undefined), (v) => known(v, (x) => `${number(100 * x)}%`)),
  measure("held_out_rows", "held-out rows", (r) => r.stats.held_out_rows, (v) => known(v, count)),
  text("note", "note", (r) => r.note, { group: "recipe", cell: (r) => h("span", { class: "clip", title: r.note }, r.note.split("\n", 1)[0]) }),
  { key: "changed", title: "changed", group: "recipe", numeric: true, value: (r) => r.changed, cell: (r) => h("time", { datetime: new Date(r.changed * 1000).toISOString(), title: new Date(r.changed * 1000).toLocaleString("en") }, ago(r.changed)) },
];
const DEFAULT = ["model", "tuner", "objective", "learning_rate", "seconds", "changed"];
const METRICS = [["loss"], ["generated_reward", "exact_match", "preference_accuracy", "accuracy"], ["retention_accuracy", "retention_loss"]]; // columns until somebody picks: of each the first that was measured

const asNumber = (value) => (value === undefined || value === "" || Number.isNaN(Number(value)) ? undefined : Number(value));

function modelCell(r) {
  if (r.kind === "run") return h("span", { class: "clip", title: r.methods.model }, r.methods.model ?? "");
  return h("span", { class: "clip", title: r.what }, h("i", {}, r.kind), ` ${r.what}`);
}

/** Every column that these runs can have, metrics in the order in which the runs name them. */
export function allColumns(runs) {
  const labels = new Map();
  for (const run of runs) for (const [name, cell] of Object.entries(run.metrics)) labels.has(name) || labels.set(name, cell.label);
  const metrics = [...labels].map(([name, label]) => ({
    key: `metric:${name}`, title: label.split(" (")[0], group: "metric", numeric: true, value: (r) => r.metrics[name]?.value, cell: (r) => metricCell(r, r.metrics[name]),
  }));
  return [...FIXED.slice(0, 7), ...metrics, ...FIXED.slice(7)];
}

/** Which columns are shown where nobody has picked any. */
export function defaultColumns(all) {
  const metrics = METRICS.map((names) => names.map((name) => `metric:${name}`).find((key) => all.some((c) => c.key === key))).filter(Boolean);
  return [...DEFAULT.slice(0, 4), ...metrics, ...DEFAULT.slice(4)];
}

function metricCell(run, cell) {
  if (!cell) return "";
  const judged = cell.better === true ? "good" : cell.better === false ? "bad" : "same";
  const change = cell.change && cell.change !== "same" ? h("small", { class: judged }, cell.change.replace(" points", "")) : null;
  const ownRows = !cell.name.startsWith("retention"); // that is measured on rows of other tasks
  const onTraining = ownRows && run.measured_on === "training rows" && h("abbr", { class: "onrows", title: "measured on the training rows: no rows were held out" }, "train");
  return h("span", { title: `before ${cell.before || "–"}, after ${cell.after || "–"}${cell.change.includes("points") ? `, ${cell.change}` : ""}` }, onTraining, cell.after || cell.before, change);
}

export function ago(when) {
  const seconds = Date.now() / 1000 - when;
  for (const [size, word] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    const n = Math.floor(seconds / size);
    if (n >= 1) return `${n} ${word} ago`;
  }
  return "just now";
}

/** Sorted by a column; runs without a value come last, whichever way. */
export function sorted(runs, column, down) {
  const order = (a, b) => {
    const [x, y] = [column.value(a), column.value(b)];
    const none = (v) => v === undefined || v === null || v === "";
    if (none(x) || none(y)) return none(x) - none(y);
    const way = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return down ? -way : way;
  };
  return [...runs].sort(order);
}

/** Does a run match a filter? Words are looked for in name, methods, tags and note; `tuner:lora`, `tag:best`, `state:failed` and
    `loss<2` in one column. Every word must match. */
export function matches(run, filter, columns) {
  return filter.trim().toLowerCase().split(/\s+/).filter(Boolean).every((word) => {
    const compared = /^([^<>:]+)(<=|>=|<|>)(-?[\d.]+(?:e-?\d+)?)(%?)$/.exec(word);
    if (compared) {
      const [, name, sign, limit, percent] = compared;
      const column = columns.find((c) => c.key === name || c.key === `metric:${name}` || c.title.replaceAll(" ", "_") === name);
      const value = column?.value(run), bound = Number(limit) / (percent ? 100 : 1);
      if (typeof value !== "number") return false;
      return { "<": value < bound, ">": value > bound, "<=": value <= bound, ">=": value >= bound }[sign];
    }
    const [, key, wanted] = /^(\w+):(.*)$/.exec(word) ?? [];
    if (key === "tag") return run.tags.some((tag) => tag.toLowerCase().includes(wanted));
    if (key === "state") return run.state.includes(wanted);
    if (key && key in run.methods) return String(run.methods[key]).toLowerCase().includes(wanted);
    const all = [run.name, run.what, run.state, run.note, ...run.tags, ...Object.values(run.methods)];
    return all.join(" ").toLowerCase().includes(word);
  });
}
