// A new run: where to begin, model and rows, what the model will see, methods, settings, and the recipe that comes of it.

import { ask, announce, button, complaint, count, field, fill, h, percent, suggested, tabStore } from "./dom.js";
import { browse, familyOrder, familyTitle, pick } from "./pickers.js";
import { apply, presetCards } from "./presets.js";
import { recipe } from "./sheet.js";

const KINDS = [ // key of a recipe, kind of method, what it is called here
  ["tuner", "tuner", "Tuner", "what is trained"],
  ["objective", "objective", "Objective", "the loss"],
  ["optim", "optimizer", "Optimizer", "how a gradient becomes a step"],
];
const MORE = [
  ["estimator", "estimator", "Gradient estimator", "how the gradient is computed"], ["quantization", "quantizer", "Quantization", "how frozen weights are stored"],
  ["architecture", "architecture", "Architecture", "what kind of model it is"],
];
const DEFAULTS = { tuner: "lora", objective: "sft", optim: "adamw", estimator: "backprop", quantization: "", architecture: "auto" };
const USUAL = { // what most runs take; everything else stands below by its family
  tuner: ["lora", "full", "ia3", "bitfit", "prompt"],
  objective: ["sft", "dpo", "orpo", "kto", "grpo", "distill", "reward"],
};
const MAIN = ["learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "max_length", "eval_data", "eval_steps", "seed"];
const ELSEWHERE = ["model", "data", "output_dir", "overwrite", "tuner", "objective", "optim", "estimator", "quantization", "architecture"];
const READ = ["model", "data", "chat_template", "max_length", "architecture"]; // what decides how rows are read

/** Take over a run's recipe as the draft. */
export async function clone(text) {
  const fields = await ask("/api/fields", { text });
  delete fields.output_dir;
  tabStore.set("draft", fields);
  location.hash = "#new";
}

export async function begin(_, signal) {
  const [start, methods] = await Promise.all([ask("/api/start"), ask("/api/methods")]);
  const draft = tabStore.get("draft", null) ?? firstDraft(start.presets);
  const page = { check() {}, look() {}, draw: [], rate: null, feeds: {} }; // what the parts of the page tell each other
  let timer = 0, looking = 0;
  const put = (key, value) => {
    value = value.trim();
    if (value === (draft[key] ?? "")) return;
    if (value) draft[key] = value; else delete draft[key];
    tabStore.set("draft", draft);
    clearTimeout(timer);
    timer = setTimeout(() => page.check(), 350);
    if (!READ.includes(key)) return;
    clearTimeout(looking);
    looking = setTimeout(() => page.look(0), 500);
    if (key === "model") presets.cost(draft.model ?? "toy:lm");
  };
  signal.addEventListener("abort", () => { clearTimeout(timer); clearTimeout(looking); });
  const presets = presetCards(start.presets, draft, (preset) => {
    apply(draft, preset);
    tabStore.set("draft", draft);
    page.draw.forEach((draw) => draw());
    page.check();
    page.look(0);
    announce(`${preset.title} chosen`);
  });
  page.draw.push(presets.show);
  const general = ask("/api/settings/recipe/recipe");
  const side = recipe(draft, page, signal);
  const view = h("div", { class: "bench" },
    h("div", { class: "form" },
      h("header", {}, h("p", { class: "what" }, start.home), h("h1", {}, "A new run")),
      presets.box,
      rows(draft, put, start, page, signal),
      choosing(draft, put, methods, page),
      training(draft, put, general, page)),
    side);
  presets.cost(draft.model ?? "toy:lm");
  page.check();
  return view;
}

/** Where nobody has begun yet: the first preset on a model that needs no network. */
function firstDraft(presets) {
  const draft = { model: "toy:lm-small" };
  apply(draft, presets[0]);
  return draft;
}

// ------------------------------------------------------------------------------------------------ model and rows

function rows(draft, put, start, page, signal) {
  const problems = complaint(), view = h("div", { class: "shown" });
  const [model, models] = suggested([...start.near, ...start.cached, ...start.models], { value: draft.model ?? "", placeholder: "toy:lm", onchange: () => put("model", model.value) });
  const [data, files] = suggested([...start.data, ...start.tasks], { value: draft.data ?? "", placeholder: "rows.jsonl", onchange: () => put("data", data.value) });
  const file = h("input", { type: "file", class: "hidden", id: "upload", accept: [...start.ends, ".gz"].join(","), onchange: () => file.files[0] && upload(file.files[0]) });
  const drop = h("label", { class: "button quiet", for: "upload" }, "Upload a file");
  const set = (input, key) => (value) => { input.value = value; put(key, value); };

  const chooseModel = h("button", { type: "button", class: "quiet", onclick: () => pick("Choose a model", modelGroups(start), draft.model, (name) => (name === "/browse" ? browse("A folder with a model", ".", false, set(model, "model")) : set(model, "model")(name)), (text) => (text ? "a folder or a name on the hub" : null)) }, "Choose …");
  const chooseData = h("button", { type: "button", class: "quiet", onclick: () => pick("Choose rows", dataGroups(start), draft.data, (name) => (name === "/browse" ? browse("A file of rows", ".", true, set(data, "data")) : set(data, "data")(name)), (text) => (text ? "a path or a name on the hub" : null)) }, "Choose …");

  async function upload(one) {
    problems.say("");
    announce(`uploading ${one.name}`);
    drop.textContent = "Uploading …";
    try {
      const { path } = await ask(`/api/upload?name=${encodeURIComponent(one.name)}`, null, { body: one, headers: { "content-type": "application/octet-stream" } });
      set(data, "data")(path);
    } catch (error) { problems.say(error.message); } finally { drop.textContent = "Upload a file"; file.value = ""; }
  }

  let turns = 0;
  async function look(offset) {
    const mine = ++turns;
    problems.say("");
    if (!draft.data) { fill(view); return; }
    view.setAttribute("aria-busy", "true");
    if (!view.firstChild) fill(view, h("p", { class: "note" }, "Reading the rows as this model will …"));
    try {
      const result = await ask("/api/look", { changes: { ...draft, model: draft.model || "toy:lm" }, offset }, { signal });
      if (mine !== turns) return;
      fill(view, preview(result, look));
      page.feeds = result.feeds;
      page.feed?.();
      announce(`${count(result.rows)} rows read, ${result.bad} unusable`);
    } catch (error) {
      if (mine === turns && error.name !== "AbortError") { problems.say(error.message); fill(view); }
    } finally { if (mine === turns) view.removeAttribute("aria-busy"); }
  }

  page.look = look;
  page.draw.push(() => { model.value = draft.model ?? ""; data.value = draft.data ?? ""; });
  const section = h("section", { "aria-labelledby": "s-rows" }, h("h2", { id: "s-rows" }, "Model and data"),
    h("div", { class: "fields two" },
      h("div", { class: "chooser" }, field("Model", model, "A folder, a hub name, or toy:NAME"), chooseModel), models,
      h("div", { class: "chooser" }, field("Data", data, "A path on this machine, a hub name, or toy:TASK; or drop a file here"), chooseData), files),
    h("p", { class: "buttons" }, file, drop),
    problems.box, view);
  for (const kind of ["dragover", "drop"]) section.addEventListener(kind, (e) => {
    if (!e.dataTransfer?.types.includes("Files")) return;
    e.preventDefault();
    if (kind === "drop" && e.dataTransfer.files[0]) upload(e.dataTransfer.files[0]);
  });
  if (draft.data) look(0);
  return section;
}

function modelGroups(start) {
  const plain = (says) => (name) => ({ name, says });
  return [
    ["", [{ name: "/browse", title: "Browse this machine …", says: "any folder with a model in it" }]],
    ["In this folder", start.near.map(plain(""))],
    ["Of the hub, on this machine already", start.cached.map(plain(""))],
    ["Of the hub, downloaded when first used", start.hub.filter(([name]) => !start.cached.includes(name)).map(([name, says]) => ({ name, says }))],
    ["Built in, for trying things out", start.models.map(plain("no network needed"))],
  ];
}

function dataGroups(start) {
  return [
    ["", [{ name: "/browse", title: "Browse this machine …", says: "any file of rows, or a folder of them" }]],
    ["In this folder", start.data.map((name) => ({ name }))],
    ["Built in, for trying things out", start.tasks.map((name) => ({ name }))],
  ];
}

/** Rows as the model reads them; what is learned is coloured AND underlined. */
function preview(result, look) {
  const about = result.counted < result.rows ? `, counted on the first ${count(result.counted)}` : "";
  const notes = [`${count(result.rows)} rows read as ‘${result.format}’`, `${count(result.tokens)} tokens, ${percent(result.share)} of them supervised${about}`, result.longest ? `the longest row has ${count(result.longest)}` : "", result.cut ? `${count(result.cut)} are truncated to max_length` : ""].filter(Boolean).join("; ");
  const page = result.shown.length || 1;
  return [
    h("p", { class: "note" }, `${notes}.`),
    h("p", { class: "note template" }, "As ", h("b", {}, result.model), " reads them", result.template ? `; turns are written with ${result.template}.` : ".", result.note && ` ${result.note}`),
    h("p", { class: "key" }, h("mark", {}, "supervised"), " tokens count in the loss (underlined); the others are context"),
    result.shown.map((row) => h("article", { class: "row" }, h("h3", {}, row.id), h("pre", {}, row.parts.map(([text, learned]) => learned ? h("mark", {}, text) : text)))),
    h("p", { class: "buttons pager" },
      h("button", { type: "button", class: "quiet", disabled: result.offset === 0, onclick: () => look(Math.max(0, result.offset - 4)) }, "Earlier rows"),
      h("button", { type: "button", class: "quiet", disabled: result.offset + page >= result.usable, onclick: () => look(result.offset + page) }, "Later rows"),
      h("span", { class: "note" }, result.shown.length ? `${result.offset + 1} to ${result.offset + result.shown.length}` : "")),
    result.bad > 0 && h("details", { class: "aside" }, h("summary", {}, `${count(result.bad)} unusable rows, with reasons`),
      h("ul", {}, result.reasons.map((r) => h("li", {}, `${count(r.rows)}: ${r.reason} (first: ${r.first})`))),
      h("ol", { class: "quarantine" }, result.aside.map((a) => h("li", {}, h("b", {}, a.where), ` ${a.reason}`, h("pre", {}, a.raw))))),
  ];
}

// ------------------------------------------------------------------------------------------------ methods

function choosing(draft, put, methods, page) {
  const picks = [...KINDS, ...MORE].map((line) => picker(line, draft, put, methods.filter((m) => m.kind === line[1]), page));
  const more = MORE.some(([key]) => key in draft);
  return h("section", { "aria-labelledby": "s-methods" }, h("h2", { id: "s-methods" }, "Methods"), picks.slice(0, KINDS.length),
    h("details", { open: more }, h("summary", {}, "Estimator, quantization, architecture"), picks.slice(KINDS.length)));
}

function picker([key, kind, title, meaning], draft, put, methods, page) {
  const about = h("div", { class: "about" }), settings = h("div");
  const chosen = h("button", { type: "button", class: "chosen", "aria-haspopup": "dialog", onclick: open });
  const now = () => draft[key] ?? DEFAULTS[key];
  const known = (name) => methods.find((m) => m.name === name);

  function open() {
    pick(`${title}: ${meaning}`, groups(), now(), use, key === "objective" ? (text) => (/[+*]/.test(text) ? "a sum of several objectives, with their weights" : null) : null);
  }

  function groups() {
    const option = (m) => {
      const lacks = key === "objective" ? page.feeds[m.name] : null;
      const missing = lacks ? lacks[1].split("; ").map((part) => part.split(":")[0]).join(" and ") : "";
      const note = !lacks || lacks[0] === "yes" ? "" : lacks[0] === "no" ? `Your rows lack what it needs: it ${lacks[1]}.` : `Your rows have no ${missing}; a stage can make them.`;
      const says = m.use_when ? `When ${sentence(m.use_when)}` : plain(m.summary, m.name);
      return { name: m.name, says, extra: m.rate ? `learning rate ${m.rate}` : "", more: `${m.summary} ${m.use_when} ${m.titles.join(" ")}`, note };
    };
    const byFamily = new Map(), usual = (USUAL[key] ?? []).map(known).filter(Boolean);
    for (const m of methods) if (!usual.includes(m)) byFamily.set(m.family, [...(byFamily.get(m.family) ?? []), m]);
    const suits = (m) => (page.feeds[m.name]?.[0] ?? "yes") === "no";
    const families = [...byFamily].sort(([a], [b]) => familyOrder(a) - familyOrder(b));
    const all = families.map(([family, some]) => [familyTitle(family), [...some].sort((a, b) => suits(a) - suits(b)).map(option)]);
    if (usual.length) all.unshift(["The usual ones", usual.map(option)]);
    if (DEFAULTS[key] === "") all.unshift(["", [{ name: "", title: "none", says: "weights as they are" }]]);
    if (DEFAULTS[key] === "auto") all.unshift(["", [{ name: "auto", says: "as the model's configuration says" }]]);
    return all;
  }

  function use(value) {
    for (const k of Object.keys(draft)) if (k.startsWith(`${key}.`)) delete draft[k];
    put(key, value === DEFAULTS[key] ? "" : value);
    page.draw.forEach((draw) => draw());
  }

  let turn = 0;
  async function show() {
    const mine = ++turn, m = known(now());
    fill(chosen, h("b", {}, now() || "none"), h("span", { class: "extra" }, "Change"));
    chosen.setAttribute("aria-label", `${title}: ${now() || "none"}. Change`);
    const feeds = key === "objective" && m ? page.feeds[m.name] : null;
    fill(about, m && h("p", {}, plain(m.summary, m.name)),
      m?.use_when && h("p", { class: "note" }, `Use it when ${m.use_when}`),
      m && h("p", { class: "note" }, papers(m)),
      feeds && feeds[0] !== "yes" && h("p", { class: "warn" }, feeds[0] === "no" ? `Your rows lack what it needs: it ${feeds[1]}.` : `Your rows need a stage for it. ${feeds[1]}.`));
    if (!m) { fill(settings); return; }
    const fields = await ask(`/api/settings/${kind}/${m.name}`).catch(() => []);
    if (mine !== turn) return;
    const set = Object.keys(draft).filter((k) => k.startsWith(`${key}.`)).length;
    const unfolded = settings.querySelector("details")?.open || set > 0;
    fill(settings, fields.length > 0 && h("details", { open: unfolded }, h("summary", {}, `Settings of ${m.name} (${fields.length}${set ? `, ${set} set` : ""})`), h("div", { class: "fields" }, fields.map((f) => entry(`${key}.${f.name}`, f, draft, put)))));
  }

  if (key === "objective") page.feed = show;
  page.draw.push(show);
  show();
  return h("div", { class: "pick" }, h("div", { class: "line" }, h("h3", {}, title, h("span", { class: "note" }, ` ${meaning}`)), chosen), about, settings);
}

/** The first sentence of a text. */
const sentence = (text) => text.split(/(?<=[.:;])\s/)[0].replace(/[:;]$/, ".");

/** The first sentence of what a method's file says of itself, without its name in front. */
function plain(summary, name) {
  const [first] = summary.split(/(?<=\.)\s/);
  const rest = first.includes(": ") && first.indexOf(": ") < 40 ? first.slice(first.indexOf(": ") + 2) : first;
  return rest ? rest[0].toUpperCase() + rest.slice(1) : name;
}

function papers(m) {
  const link = m.paper?.startsWith("arXiv:") ? h("a", { href: `https://arxiv.org/abs/${m.paper.slice(6)}`, target: "_blank", rel: "noreferrer noopener" }, m.paper) : m.paper;
  const rows = m.titles.length ? m.titles.join("; ") : "";
  return link ? [link, rows && `. ${rows}.`] : rows;
}

/** A setting as a field: its default stands in it as a hint, its help below. */
function entry(key, f, draft, put) {
  const value = draft[key] ?? "";
  const input = f.choices.length
    ? h("select", { onchange: (e) => put(key, e.target.value) }, h("option", { value: "" }, `${f.default} (default)`), f.choices.filter((c) => c !== f.default).map((c) => h("option", { value: c }, c)))
    : h("input", { type: "text", value, placeholder: f.default === "null" ? "none" : f.default, autocomplete: "off", spellcheck: "false", autocapitalize: "off", oninput: (e) => put(key, e.target.value) });
  if (f.choices.length) {
    if (value && ![...input.options].some((o) => o.value === value)) input.append(h("option", { value }, value));
    input.value = value === f.default ? "" : value;
  }
  const made = field(f.name, input, f.help);
  made.dataset.key = key;
  return made;
}

function training(draft, put, general, page) {
  const title = () => h("h2", { id: "s-training" }, "Training");
  const box = h("section", { "aria-labelledby": "s-training" }, title(), h("p", { class: "note" }, "Loading the settings …"));
  let fields = [];
  function show() {
    const by = Object.fromEntries(fields.map((f) => [f.name, f]));
    const main = teaches() ? [...MAIN, "roles"] : MAIN;
    const rest = fields.filter((f) => !main.includes(f.name) && !ELSEWHERE.includes(f.name));
    const set = rest.filter((f) => f.name in draft).length, unfolded = box.querySelector("details")?.open || set > 0;
    fill(box, title(), h("div", { class: "fields" }, main.map((name) => entry(name, by[name], draft, put))),
      h("details", { open: unfolded }, h("summary", {}, `Every other setting (${rest.length}${set ? `, ${set} set` : ""})`), h("p", { class: "note" }, "Lists and mappings as a line of YAML, such as [{name: rollout, n: 8}]."), h("div", { class: "fields" }, rest.map((f) => entry(f.name, f, draft, put)))));
    rate();
  }
  /** Does the objective learn from a teacher, which somebody has to name? */
  function teaches() {
    const words = (draft.objective ?? "").match(/\w+/g) ?? [];
    return words.some((name) => name.startsWith("distill") || page.feeds[name]?.[1].includes("teacher"));
  }
  /** The learning rate that this tuner and objective declare, in the field that leaves it out. */
  function rate() {
    const place = box.querySelector("[data-key=learning_rate]");
    if (!place || !page.rate) return;
    place.querySelector("input").placeholder = page.rate.value;
    place.querySelector("small").textContent = `Peak learning rate. Left out: ${page.rate.value} (${page.rate.reason})`;
  }
  page.told = rate;
  general.then((list) => { fields = list; show(); page.draw.push(show); })
    .catch((error) => fill(box, title(), h("p", { class: "complaint", role: "alert" }, error.message)));
  return box;
}
