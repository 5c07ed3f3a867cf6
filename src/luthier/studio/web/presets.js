// Where a run begins: the usual ways to fine-tune, each with what its rows must have and what it costs on the chosen model.

import { ask, fill, h } from "./dom.js";

const TAKEN = ["tuner", "objective", "quantization", "architecture", "online_stages", "roles"]; // what a preset decides

const owned = (key) => TAKEN.includes(key) || TAKEN.some((k) => key.startsWith(`${k}.`));

/** Is a draft what this preset makes it, in everything that presets decide? */
export function isFrom(draft, preset) {
  const own = Object.keys(draft).filter((key) => owned(key) && !isDefault(key, draft[key]));
  const fields = Object.entries(preset.fields).filter(([key, value]) => !isDefault(key, value));
  return own.length === fields.length && fields.every(([key, value]) => draft[key] === value);
}

const isDefault = (key, value) => key === "tuner" && value === "lora"; // what a recipe that names none gets

/** Put a preset's values into a draft in place of what another one put there. */
export function apply(draft, preset) {
  for (const key of Object.keys(draft).filter(owned)) delete draft[key];
  for (const [key, value] of Object.entries(preset.fields)) if (!isDefault(key, value)) draft[key] = value;
}

/** The cards. chosen: called with a preset. Returns {box, show, cost}: `cost` asks what each takes of a model. */
export function presetCards(presets, draft, chosen) {
  const grid = h("div", { class: "presets" }), more = h("p", { class: "note" }), about = h("p", { class: "note" });
  let costs = {}, turn = 0;
  function show() {
    fill(grid, presets.map((preset) => h("button", { type: "button", class: "preset", "aria-pressed": String(isFrom(draft, preset)), onclick: () => { chosen(preset); show(); } },
      h("b", {}, preset.title), h("span", { class: "says" }, preset.says), costs[preset.name] && h("span", { class: "cost" }, h("strong", {}, costs[preset.name].memory), `, ${costs[preset.name].trained}`))));
    const now = presets.find((preset) => isFrom(draft, preset));
    fill(more, now ? [h("b", {}, `${now.title}. `), `Rows: ${now.rows}. ${now.costs}`] : "Your own choice of methods; a preset above starts over.");
  }
  async function cost(model) {
    const mine = ++turn;
    try {
      const result = await ask("/api/costs", { model });
      if (mine !== turn) return;
      costs = result.costs;
      fill(about, `Memory of ${model} (${result.parameters} parameters): weights, gradients and optimizer; activations come on top and grow with batch and length.`);
    } catch {
      if (mine !== turn) return;
      costs = {};
      fill(about, "Memory is told here once the model can be read.");
    }
    show();
  }
  show();
  return { box: h("section", { "aria-labelledby": "s-start" }, h("h2", { id: "s-start" }, "How to fine-tune"), grid, more, about), show, cost };
}
