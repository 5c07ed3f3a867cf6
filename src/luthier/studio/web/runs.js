// All runs of this place, the curves of some of them laid over each other, and comparing their recipes.

import { announce, ask, button, complaint, every, field, fill, h } from "./dom.js";
import { overlay } from "./overlay.js";

export const STATES = { starting: "starting", running: "running", finished: "finished", stopped: "stopped", failed: "failed" };

export async function runs(rest, signal) {
  const list = h("ul", { class: "runs" }), chosen = new Set(rest.split(",").filter(Boolean)), problems = complaint();
  const compare = comparing(chosen), over = overlay(() => [...chosen], signal);
  const choose = (name, on) => {
    on ? chosen.add(name) : chosen.delete(name);
    history.replaceState(null, "", `#runs${chosen.size ? "/" : ""}${[...chosen].map(encodeURIComponent)}`); // a reload finds them again
    compare.show();
    over.show().catch((error) => { if (error.name !== "AbortError") problems.say(error.message); });
  };
  let before = "";
  const show = (all) => {
    const mark = JSON.stringify(all);
    if (mark === before) return;
    before = mark;
    const focused = document.activeElement?.dataset?.run;
    fill(list, all.length ? all.map((r) => card(r, chosen, choose)) : h("li", { class: "empty" }, "No run yet. ", h("a", { href: "#new" }, "Start one"), ": the built-in models and rows need no network."));
    if (focused) list.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
  };
  const first = await ask("/api/runs");
  for (const name of chosen) if (!first.some((r) => r.name === name && r.kind === "run")) chosen.delete(name);
  compare.show();
  show(first);
  every(3, signal, async () => {
    try { show(await ask("/api/runs", undefined, { signal })); await over.show(); problems.say(""); } catch (error) { if (error.name !== "AbortError") problems.say(error.message); }
  });
  return [h("header", {}, h("h1", {}, "Runs"), h("p", { class: "note" }, "Each is a folder under runs/, started here or in a shell. Select some to see their curves in one chart, and to compare their recipes on the same data, seeds and budget.")), problems.box, over.box, compare.box, list];
}

function card(r, chosen, choose) {
  const tick = r.kind === "run" && h("input", { type: "checkbox", "data-run": r.name, "aria-label": `Choose ${r.name}`, checked: chosen.has(r.name), onchange: (e) => choose(r.name, e.target.checked) });
  return h("li", {}, tick || h("span", { class: "tick" }),
    h("a", { href: `#run/${encodeURIComponent(r.name)}` }, h("b", {}, r.name), h("span", { class: "what" }, r.kind === "comparison" ? `comparison: ${r.what}` : r.what)),
    badge(r), progress(r), r.why && h("p", { class: "why" }, r.why), h("time", { datetime: new Date(r.changed * 1000).toISOString() }, ago(r.changed)));
}

export function badge(r) {
  return h("span", { class: `badge ${r.state}` }, STATES[r.state] ?? r.state);
}

export function progress(r) {
  if (!r.steps || r.kind === "comparison") return null;
  return h("span", { class: "steps" }, h("progress", { max: r.steps, value: r.step, "aria-label": `Steps of ${r.name}` }), `${r.act ? `${r.act}, ` : ""}${r.step.toLocaleString("en")} of ${r.steps.toLocaleString("en")}`);
}

function ago(when) {
  const seconds = Date.now() / 1000 - when;
  for (const [size, word] of [[86400, "day"], [3600, "hour"], [60, "minute"]]) {
    const n = Math.floor(seconds / size);
    if (n >= 1) return `${n} ${word}${n > 1 ? "s" : ""} ago`;
  }
  return "just now";
}

function comparing(chosen) {
  const problems = complaint();
  const name = h("input", { type: "text", value: `compare-${new Date().toISOString().slice(0, 10)}`, autocomplete: "off", spellcheck: "false" });
  const seeds = h("input", { type: "number", min: 1, value: 1 });
  const budget = h("input", { type: "text", placeholder: "as the recipes say" }), metric = h("input", { type: "text", placeholder: "loss" });
  const title = h("h2");
  const box = h("section", { class: "panel work", hidden: true }, title,
    h("div", { class: "fields" }, field("Name", name, "Its folder: runs/NAME"), field("Seeds", seeds, "Runs of each recipe"), field("Budget of each run", budget, "A time (30m), steps (500 steps) or tokens (200k tokens)"), field("Metric", metric, "Ranks the runs")),
    h("p", { class: "buttons" }, button("Compare them", async () => {
      await ask("/api/compare", { name: name.value, runs: [...chosen], seeds: Number(seeds.value) || 1, budget: budget.value, metric: metric.value || "loss" });
      announce(`comparison ${name.value} started`);
      location.hash = `#run/${name.value}`;
    }, problems, { class: "main" })), problems.box);
  return { box, show() { box.hidden = chosen.size < 2; fill(title, `Compare ${[...chosen].join(" and ")}`); } };
}
