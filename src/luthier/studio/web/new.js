// A new run: model and rows, what the model will see, methods, settings, what it will cost, and the recipe that comes of it.

import { announce, ask, button, complaint, count, field, fill, h, tabStore, percent, suggested } from "./dom.js";

const KINDS = [ // key of a recipe, kind of method, what it is called here
  ["tuner", "tuner", "Tuner"],
  ["objective", "objective", "Objective"],
  ["optim", "optimizer", "Optimizer"],
];
const MORE = [["estimator", "estimator", "Gradient estimator"], ["quantization", "quantizer", "Quantization"], ["architecture", "architecture", "Architecture"]];
const DEFAULTS = { tuner: "lora", objective: "sft", optim: "adamw", estimator: "backprop", quantization: "", architecture: "auto" };
const MAIN = ["learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "max_length", "eval_data", "eval_steps", "seed"];
const ELSEWHERE = ["model", "data", "output_dir", "overwrite", "tuner", "objective", "optim", "estimator", "quantization", "architecture"];

/** Take over a run's recipe as the draft. */
export async function clone(text) {
  const fields = await ask("/api/fields", { text });
  delete fields.output_dir;
  tabStore.set("draft", fields);
  location.hash = "#new";
}

export async function begin(_, signal) {
  const [start, methods] = await Promise.all([ask("/api/start"), ask("/api/methods")]);
  const draft = tabStore.get("draft", { model: "toy:lm-small" });
  const asides = { check() {}, feeds: {} };
  let timer = 0;
  const put = (key, value) => {
    value = value.trim();
    if (value) draft[key] = value; else delete draft[key];
    tabStore.set("draft", draft);
    clearTimeout(timer);
    timer = setTimeout(() => asides.check(), 350);
  };
  signal.addEventListener("abort", () => clearTimeout(timer));
  const general = ask("/api/settings/recipe/recipe");
  const side = recipe(draft, asides, signal);
  const view = h("div", { class: "bench" },
    h("div", { class: "form" },
      h("header", {}, h("p", { class: "what" }, start.home), h("h1", {}, "A new run")),
      rows(draft, put, start, asides, signal),
      choosing(draft, put, methods, asides),
      training(draft, put, general)),
    side);
  asides.check();
  return view;
}

// ------------------------------------------------------------------------------------------------ model and rows

function rows(draft, put, start, asides, signal) {
  const problems = complaint();
  const [model, models] = suggested(start.models, { value: draft.model ?? "", placeholder: "toy:lm", onchange: (e) => { put("model", e.target.value); } });
  const [data, files] = suggested(start.data, { value: draft.data ?? "", placeholder: "rows.jsonl", onchange: (e) => { put("data", e.target.value); if (e.target.value) look(0); } });
  const view = h("div", { class: "shown" });
  const file = h("input", { type: "file", class: "hidden", id: "upload", accept: [...start.ends, ".gz"].join(","), onchange: () => file.files[0] && upload(file.files[0]) });
  const pick = h("label", { class: "button quiet", for: "upload" }, "Upload a file");

  async function upload(one) {
    problems.say("");
    announce(`uploading ${one.name}`);
    pick.textContent = "Uploading …";
    try {
      const { path } = await ask(`/api/upload?name=${encodeURIComponent(one.name)}`, null, { body: one, headers: { "content-type": "application/octet-stream" } });
      data.value = path;
      put("data", path);
      await look(0);
    } catch (error) { problems.say(error.message); } finally { pick.textContent = "Upload a file"; file.value = ""; }
  }

  let turns = 0;
  async function look(offset) {
    const mine = ++turns;
    problems.say("");
    view.setAttribute("aria-busy", "true");
    try {
      const result = await ask("/api/look", { changes: { ...draft, model: model.value || "toy:lm" }, offset }, { signal });
      if (mine !== turns) return;
      fill(view, preview(result, look));
      asides.feeds = result.feeds;
      asides.feed?.();
      announce(`${count(result.rows)} rows read, ${result.bad} unusable`);
    } catch (error) {
      if (mine === turns && error.name !== "AbortError") { problems.say(error.message); fill(view); }
    } finally { if (mine === turns) view.removeAttribute("aria-busy"); }
  }

  const section = h("section", { "aria-labelledby": "s-rows" }, h("h2", { id: "s-rows" }, "Model and data"),
    h("div", { class: "fields two" },
      field("Model", model, "A folder, a hub name, or toy:NAME"), models,
      field("Data", data, "A path on this machine, a hub name, or toy:TASK"), files),
    h("p", { class: "buttons" }, button("Preview the data", () => look(0), problems, { class: "quiet" }), file, pick),
    problems.box, view);
  for (const kind of ["dragover", "drop"]) section.addEventListener(kind, (e) => {
    if (!e.dataTransfer?.types.includes("Files")) return;
    e.preventDefault();
    if (kind === "drop" && e.dataTransfer.files[0]) upload(e.dataTransfer.files[0]);
  });
  if (draft.data) look(0);
  return section;
}

/** Rows as the model reads them; what is learned is coloured AND underlined. */
function preview(result, look) {
  const about = result.counted < result.rows ? `, counted on the first ${count(result.counted)}` : "";
  const notes = [`${count(result.rows)} rows read as ‘${result.format}’`, `${count(result.tokens)} tokens, ${percent(result.share)} of them supervised${about}`, result.longest ? `the longest row has ${count(result.longest)}` : "", result.cut ? `${count(result.cut)} are truncated to max_length` : ""].filter(Boolean).join("; ");
  const page = result.shown.length || 1;
  return [
    h("p", { class: "note" }, `${notes}.`),
    result.note && h("p", { class: "note" }, result.note),
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

function choosing(draft, put, methods, asides) {
  const picks = [...KINDS, ...MORE].map(([key, kind, title]) => picker(key, kind, title, draft, put, methods.filter((m) => m.kind === kind), asides));
  return h("section", { "aria-labelledby": "s-methods" }, h("h2", { id: "s-methods" }, "Methods"), picks.slice(0, KINDS.length),
    h("details", {}, h("summary", {}, "Estimator, quantization, architecture"), picks.slice(KINDS.length)));
}

function picker(key, kind, title, draft, put, methods, asides) {
  const names = methods.map((m) => m.name);
  const about = h("div", { class: "about" }), settings = h("div");
  const other = h("input", { type: "text", value: draft[key] ?? "", "aria-label": `${title}, in words`, placeholder: "dpo + 0.1*sft", onchange: () => chosen(other.value) });
  const select = h("select", { onchange: () => (select.value === "*" ? (other.hidden = false, other.focus()) : chosen(select.value)) });
  const now = () => draft[key] ?? DEFAULTS[key];

  function offer() {
    const option = (m, note = "") => h("option", { value: m.name }, m.name + note);
    const empty = DEFAULTS[key] === "" ? h("option", { value: "" }, "none") : DEFAULTS[key] === "auto" ? h("option", { value: "auto" }, "auto") : null;
    const groups = key === "objective" && Object.keys(asides.feeds).length ? [["yes", "the data has what it needs"], ["through a stage", "through a stage"], ["no", "the data lacks what it needs"]] : null;
    fill(select, empty,
      groups ? groups.map(([how, label]) => h("optgroup", { label }, methods.filter((m) => (asides.feeds[m.name]?.[0] ?? "no") === how).map((m) => option(m)))) : methods.map((m) => option(m)),
      key === "objective" && h("option", { value: "*" }, "a sum of several …"));
    const listed = names.includes(now()) || now() === "" || now() === "auto";
    select.value = listed ? now() : "*";
    if (!listed && key !== "objective") { select.append(h("option", { value: now() }, now())); select.value = now(); }
    other.hidden = listed || key !== "objective";
  }

  function chosen(value) {
    for (const k of Object.keys(draft)) if (k.startsWith(`${key}.`)) delete draft[k];
    put(key, value === DEFAULTS[key] ? "" : value);
    tell();
  }

  let turn = 0;
  async function tell() {
    const mine = ++turn;
    offer();
    const m = methods.find((x) => x.name === now());
    const feeds = key === "objective" && m ? asides.feeds[m.name] : null;
    fill(about, m && h("p", {}, m.summary),
      m && h("p", { class: "note" }, papers(m), m.requires.length > 0 && ` Requires ${m.requires.join(", ")}.`, m.provides.length > 0 && ` Provides ${m.provides.join(", ")}.`),
      feeds && feeds[0] !== "yes" && h("p", { class: "warn" }, feeds[0] === "no" ? `The data lacks what it needs: it ${feeds[1]}.` : `Through a stage: ${feeds[1]}.`));
    fill(settings);
    if (!m) return;
    const fields = await ask(`/api/settings/${kind}/${m.name}`).catch(() => []);
    if (mine !== turn || !fields.length) return;
    const set = Object.keys(draft).filter((k) => k.startsWith(`${key}.`)).length;
    fill(settings, h("details", { open: set > 0 }, h("summary", {}, `Settings of ${m.name} (${fields.length})`), h("div", { class: "fields" }, fields.map((f) => entry(`${key}.${f.name}`, f, draft, put)))));
  }

  if (key === "objective") asides.feed = tell;
  tell();
  return h("div", { class: "pick" }, field(title, select), other, about, settings);
}

function papers(m) {
  const link = m.paper?.startsWith("arXiv:") ? h("a", { href: `https://arxiv.org/abs/${m.paper.slice(6)}`, target: "_blank", rel: "noreferrer noopener" }, m.paper) : m.paper;
  const rows = m.titles.length ? `In the catalogue: ${m.titles.join("; ")}.` : "";
  return link ? [link, ". ", rows] : rows || "No paper introduced it.";
}

/** A setting as a field: its default stands in it as a hint, its help below. */
function entry(key, f, draft, put) {
  const value = draft[key] ?? "";
  const input = f.choices.length
    ? h("select", { onchange: (e) => put(key, e.target.value) }, h("option", { value: "" }, `${f.default} (default)`), f.choices.filter((c) => c !== f.default).map((c) => h("option", { value: c }, c)))
    : h("input", { type: "text", value, placeholder: f.default, autocomplete: "off", spellcheck: "false", autocapitalize: "off", oninput: (e) => put(key, e.target.value) });
  if (f.choices.length) {
    if (value && ![...input.options].some((o) => o.value === value)) input.append(h("option", { value }, value));
    input.value = value === f.default ? "" : value;
  }
  return field(f.name, input, f.help);
}

function training(draft, put, general) {
  const box = h("section", { "aria-labelledby": "s-training" }, h("h2", { id: "s-training" }, "Training"), h("p", { class: "note" }, "Loading the settings …"));
  general.then((fields) => {
    const by = Object.fromEntries(fields.map((f) => [f.name, f]));
    const rest = fields.filter((f) => !MAIN.includes(f.name) && !ELSEWHERE.includes(f.name));
    const set = rest.some((f) => f.name in draft);
    fill(box, h("h2", { id: "s-training" }, "Training"), h("div", { class: "fields" }, MAIN.map((name) => entry(name, by[name], draft, put))),
      h("details", { open: set }, h("summary", {}, `Every other setting (${rest.length})`), h("p", { class: "note" }, "Lists and mappings as a line of YAML, such as [{name: rollout, n: 8}]."), h("div", { class: "fields" }, rest.map((f) => entry(f.name, f, draft, put)))));
  }).catch((error) => fill(box, h("h2", { id: "s-training" }, "Training"), h("p", { class: "complaint", role: "alert" }, error.message)));
  return box;
}

// ------------------------------------------------------------------------------------------------ the recipe

function recipe(draft, asides, signal) {
  const problems = complaint(), startProblems = complaint();
  const text = h("pre", { class: "recipe", tabindex: "0", "aria-label": "The recipe" });
  const whole = h("pre"), notes = h("ul", { class: "told" }), cost = h("div");
  const name = h("input", { type: "text", autocomplete: "off", spellcheck: "false", autocapitalize: "off", placeholder: "a name", oninput: () => (named = true) });
  const command = h("code");
  const tell = () => fill(command, `luthier tune runs/${name.value || "NAME"}/submitted.yaml output_dir=runs/${name.value || "NAME"}`);
  let named = false, latest = { text: "", error: "not checked yet" }, turn = 0;

  asides.check = async () => {
    const mine = ++turn;
    text.setAttribute("aria-busy", "true");
    try {
      const result = await ask("/api/check", { changes: draft }, { signal });
      if (mine !== turn) return;
      latest = result;
      fill(text, result.text || "# empty: every value is its default");
      fill(whole, result.whole);
      fill(notes, result.warnings.map((t) => h("li", {}, t)));
      if (!named) name.value = result.name.slice(0, 100);
      tell();
      problems.say(result.error);
      start.disabled = Boolean(result.error);
      announce(result.error ? "" : "the recipe can run");
    } catch (error) { if (error.name !== "AbortError" && mine === turn) problems.say(error.message); } finally { if (mine === turn) text.removeAttribute("aria-busy"); }
  };
  name.addEventListener("input", tell);

  const start = button("Start the run", async () => {
    await asides.check();
    if (latest.error) throw new Error(latest.error);
    await ask("/api/runs", { name: name.value, text: latest.text });
    announce(`run ${name.value} started`);
    location.hash = `#run/${name.value}`;
  }, startProblems, { class: "main", disabled: true });
  const foretell = button("Estimate the cost", async () => {
    fill(cost, h("p", { class: "note" }, "Loading the model to look …"));
    try {
      const result = await ask("/api/forecast", { changes: draft }, { signal });
      fill(cost, h("dl", { class: "tiles" }, result.figures.map(([what, much, is]) => h("div", {}, h("dt", {}, what), h("dd", {}, much), h("p", {}, is)))), result.notes.map((n) => h("p", { class: "note" }, n)));
      announce("the cost is estimated");
    } catch (error) { fill(cost); throw error; }
  }, startProblems, { class: "quiet" });

  const writing = h("textarea", { rows: 12, spellcheck: "false", "aria-label": "A recipe as YAML" });
  const wrong = complaint();
  const pasted = h("details", {}, h("summary", {}, "Write or paste a recipe instead"), writing,
    h("p", { class: "buttons" }, button("Use this recipe", async () => {
      const fields = await ask("/api/fields", { text: writing.value });
      tabStore.set("draft", fields);
      location.hash === "#new" ? window.dispatchEvent(new HashChangeEvent("hashchange")) : (location.hash = "#new");
    }, wrong, { class: "quiet" })), wrong.box);
  pasted.addEventListener("toggle", () => { if (pasted.open && !writing.value) writing.value = latest.text; });

  return h("aside", { class: "sheet", "aria-label": "The recipe and its cost" },
    h("h2", {}, "The recipe"),
    text, problems.box, notes,
    h("div", { class: "fields one" }, field("Name of the run", name, "Its folder: runs/NAME")),
    h("p", { class: "buttons" }, start, foretell), startProblems.box, cost,
    h("p", { class: "note" }, "The same from a shell: ", command),
    h("details", {}, h("summary", {}, "The whole recipe, with defaults"), whole), pasted,
    h("p", { class: "buttons" }, h("button", { type: "button", class: "quiet", onclick: () => { tabStore.set("draft", { model: "toy:lm-small" }); window.dispatchEvent(new HashChangeEvent("hashchange")); } }, "Reset")));
}
