// Exporting a run: in which form, to which folder, and what came of it.

import { announce, ask, button, complaint, dialog, field, fill, h, shell } from "./dom.js";

export async function exporting(at, name, exports, exported) {
  const forms = await ask("/api/exports");
  const problems = complaint();
  const kind = h("select", {}, forms.map((form) => h("option", { value: form.name }, form.name)));
  const to = h("input", { type: "text", autocomplete: "off", spellcheck: "false" });
  const command = h("code", { class: "block" }), about = h("p", { class: "note" });
  const say = () => {
    const form = forms.find((x) => x.name === kind.value);
    to.placeholder = `exports/${name}-${kind.value}`;
    fill(about, form.says);
    command.textContent = shell("luthier", "export", `runs/${name}`, "--as", kind.value, "--output-dir", to.value || to.placeholder);
  };
  for (const one of [kind, to]) one.addEventListener("input", say);
  say();
  const done = h("ul", { class: "told" }, exports.map((x) => h("li", {}, x)));
  dialog(`Export ${name}`, h("div", {},
    field("As", kind), about, field("To", to, "A folder on this machine"),
    h("p", { class: "buttons" }, button("Export", async (b) => {
      b.textContent = "Exporting, and comparing with the tuned model …";
      try {
        const { message } = await ask(`${at}/export`, { kind: kind.value, to: to.value });
        done.append(h("li", { class: "good" }, message));
        announce(`exported: ${message}`);
        exported();
      } finally { b.textContent = "Export"; }
    }, problems, { class: "main" })),
    problems.box, done,
    h("p", { class: "note" }, "What is written is loaded back and compared with the tuned model, and deleted where its outputs differ. From a shell:"), command), { class: "narrow" });
  kind.focus();
}
