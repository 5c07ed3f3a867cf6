// Choosing a method, a model or a file from all there are: a dialog with a search box, everything in groups with a plain sentence.

import { ask, bytes, complaint, dialog, fill, h } from "./dom.js";

const FAMILIES = {
  low_rank: "Low-rank updates", full: "All weights", subset: "Some of the weights as they are", adapters: "Small modules between the layers", prompts: "Vectors before the text",
  sparse: "Single entries", quantized: "Quantized weights", pruned: "Pruned networks", mixture: "Several at once",
  supervised: "From answers", preference: "From preferences", listwise: "From rankings", policy_gradient: "From rewards", distillation: "From a teacher", reward: "Reward models", representation: "From representations", metric: "From a metric",
  first_order: "With a gradient", zeroth_order: "Without a gradient", sharpness: "Towards flat minima", multi_objective: "Several goals", bilevel: "Two levels",
  uniform: "Evenly spaced levels", normal_float: "Levels of a normal distribution", codebook: "Code books", text: "Text",
};

const ORDER = Object.keys(FAMILIES);
export const familyOrder = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);
export const familyTitle = (name) => FAMILIES[name] ?? name.replaceAll("_", " ");

/** groups: [[title, [{name, says, extra, note, off}]], ...]. free: what a text that names none means, as {says, use}, or null.
    Calls `use` with the name that was chosen. */
export function pick(title, groups, now, use, free = null) {
  const list = h("div", { class: "options" });
  const search = h("input", { type: "search", placeholder: "Search", "aria-label": `Search: ${title}`, autocomplete: "off", spellcheck: "false", autocapitalize: "off" });
  const choose = (name) => { box.close(); use(name); };
  const option = (o) => h("button", { type: "button", class: "option", "aria-current": o.name === now ? "true" : null, disabled: o.off, onclick: () => choose(o.name) },
    h("span", { class: "line" }, h("b", {}, o.title ?? o.name), o.extra && h("span", { class: "extra" }, o.extra)),
    o.says && h("span", { class: "says" }, o.says), o.note && h("span", { class: "warn" }, o.note));

  function show() {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (o, group) => words.every((w) => `${o.title ?? ""} ${o.name} ${o.says ?? ""} ${o.more ?? ""} ${group}`.toLowerCase().includes(w));
    const first = (o) => (words.length && o.name.toLowerCase().startsWith(words[0]) ? 0 : 1);
    const found = groups.map(([group, options]) => [group, options.filter((o) => fits(o, group)).sort((a, b) => first(a) - first(b))]).filter(([, options]) => options.length);
    const typed = free?.(search.value.trim());
    fill(list, found.map(([group, options]) => h("section", {}, group && h("h3", {}, group), options.map(option))),
      typed && h("section", {}, h("h3", {}, "As typed"), option({ name: search.value.trim(), says: typed })),
      !found.length && !typed && h("p", { class: "note" }, "Nothing of this name."));
  }
  search.addEventListener("input", show);
  search.addEventListener("keydown", (e) => {
    if (e.key !== "Enter") return;
    e.preventDefault();
    list.querySelector(".option:not(:disabled)")?.click();
  });
  show();
  const box = dialog(title, h("div", { class: "picker" }, search, list), { class: "tall" });
  search.focus();
  list.querySelector("[aria-current]")?.scrollIntoView({ block: "center" });
  return box;
}

/** A folder of this machine to choose from: a file of rows (files), or a folder that holds a model. */
export async function browse(title, from, files, use) {
  const problems = complaint(), list = h("div", { class: "options" }), where = h("p", { class: "note where" });
  const box = dialog(title, h("div", { class: "picker" }, where, problems.box, list), { class: "tall" });
  const choose = (path) => { box.close(); use(path); };

  async function open(folder) {
    problems.say("");
    try {
      const at = await ask(`/api/browse?folder=${encodeURIComponent(folder)}`);
      const entry = (name, extra, onclick, kind = "") => h("button", { type: "button", class: `option ${kind}`, onclick }, h("span", { class: "line" }, h("b", {}, name), h("span", { class: "extra" }, extra)));
      fill(where, at.folder);
      fill(list,
        at.parent !== null && entry("..", "the folder above", () => open(at.parent), "folder"),
        at.folders.map((f) => (!files && f.model ? entry(f.name, "a model", () => choose(f.path)) : entry(`${f.name}/`, "", () => open(f.path), "folder"))),
        files && at.files.map((f) => entry(f.name, bytes(f.bytes), () => choose(f.path))),
        files && !at.files.length && h("p", { class: "note" }, "No file of rows lies here."),
        files && at.files.length > 1 && entry("All files of this folder", `${at.files.length} files`, () => choose(at.path)));
      list.querySelector("button")?.focus();
    } catch (error) { problems.say(error.message); }
  }
  await open(from);
}
