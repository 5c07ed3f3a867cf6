// Exporting a run: in which form, with which settings, to which folder, and how what came of it is used.

import { announce, ask, button, complaint, dialog, field, fill, h, shell } from "./dom.js";

export async function exporting(at, name, exports, exported) {
  const forms = await ask("/api/exports");
  const problems = complaint(), settings = {};
  const kind = h("select", {}, forms.map((form) => h("option", { value: form.name }, form.name)));
  const to = h("input", { type: "text", autocomplete: "off", spellcheck: "false" });
  const command = h("code", { class: "block" }), about = h("p", { class: "note" }), more = h("div", { class: "fields" });
  const words = () => Object.entries(settings).map(([key, value]) => `${key}=${value}`);
  const say = () => {
    to.placeholder = [`exports/${name}-${kind.value}`, ...Object.values(settings).map((v) => v.replace(/[^\w.-]+/g, "-"))].join("-");
    command.textContent = shell("luthier", "export", `runs/${name}`, ...words(), "--as", kind.value, "--output-dir", to.value || to.placeholder);
  };

  let turn = 0;
  async function choose() {
    const mine = ++turn;
    for (const key of Object.keys(settings)) delete settings[key];
    fill(about, forms.find((x) => x.name === kind.value).says);
    fill(more);
    say();
    const fields = await ask(`/api/settings/exporter/${kind.value}`).catch(() => []);
    if (mine === turn) fill(more, fields.map((f) => field(f.name, setting(f), f.help)));
  }

  function setting(f) {
    const set = (value) => { if (value.trim()) settings[f.name] = value.trim(); else delete settings[f.name]; say(); };
    if (!f.choices.length) return h("input", { type: "text", placeholder: f.default, autocomplete: "off", spellcheck: "false", oninput: (e) => set(e.target.value) });
    return h("select", { onchange: (e) => set(e.target.value) }, h("option", { value: "" }, `${f.default} (default)`), f.choices.filter((c) => c !== f.default).map((c) => h("option", { value: c }, c)));
  }

  kind.addEventListener("change", choose);
  to.addEventListener("input", say);
  const earlier = exports.length > 0 && h("details", {}, h("summary", {}, `Exported earlier (${exports.length})`), h("ul", { class: "told" }, exports.map((x) => h("li", {}, x))));
  const done = h("div", { role: "status" });
  dialog(`Export ${name}`, h("div", {},
    field("As", kind), about, more, field("To", to, "A folder on this machine"),
    h("p", { class: "buttons" }, button("Export", async (b) => {
      b.textContent = "Exporting, and comparing with the tuned model …";
      fill(done);
      try {
        const { message, usage } = await ask(`${at}/export`, { kind: kind.value, to: to.value || to.placeholder, settings });
        fill(done, h("p", { class: "good" }, message), usage.map((u) => [h("h3", {}, u.tool), h("code", { class: "block" }, u.code)]));
        announce(`exported: ${message}`);
        exported();
      } finally { b.textContent = "Export"; }
    }, problems, { class: "main" })),
    problems.box, done, earlier,
    h("p", { class: "note" }, "What is written is loaded back and compared with the tuned model, and deleted where it differs. From a shell:"), command), { class: "narrow" });
  kind.focus();
  await choose();
}
