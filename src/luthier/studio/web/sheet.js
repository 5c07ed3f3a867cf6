// The recipe that the form comes to: its text, what it will cost, and starting it, or why it cannot be started.

import { announce, ask, button, complaint, field, fill, h, tabStore } from "./dom.js";

export function recipe(draft, page, signal) {
  const startProblems = complaint(), costProblems = complaint();
  const text = h("pre", { class: "recipe", tabindex: "0", "aria-label": "The recipe" });
  const whole = h("pre"), notes = h("ul", { class: "told" }), cost = h("div"), ready = h("p", { class: "ready wait" }, "Checking …");
  const name = h("input", { type: "text", autocomplete: "off", spellcheck: "false", autocapitalize: "off", placeholder: "a name", oninput: () => (named = true) });
  const command = h("code");
  const tell = () => fill(command, `luthier tune runs/${name.value || "NAME"}/submitted.yaml output_dir=runs/${name.value || "NAME"}`);
  let named = false, latest = { text: "", error: "not checked yet" }, turn = 0;

  page.check = async () => {
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
      page.rate = result.rate;
      page.told?.();
      verdict(result.error);
    } catch (error) { if (error.name !== "AbortError" && mine === turn) verdict(error.message); } finally { if (mine === turn) text.removeAttribute("aria-busy"); }
  };
  name.addEventListener("input", tell);

  /** Whether it can be started, beside the button; and why not. */
  function verdict(error) {
    start.disabled = Boolean(error);
    ready.className = error ? "ready not" : "ready";
    fill(ready, error ? [h("b", {}, "Cannot start: "), error] : "Checked with the first rows: it can start.");
    announce(error ? "" : "the recipe can run");
  }

  const start = button("Start the run", async () => {
    await page.check();
    if (latest.error) return;
    await ask("/api/runs", { name: name.value, text: latest.text });
    announce(`run ${name.value} started`);
    location.hash = `#run/${encodeURIComponent(name.value)}`;
  }, startProblems, { class: "main", disabled: true });
  const foretell = button("Estimate the cost", async () => {
    fill(cost, h("p", { class: "note" }, "Loading the model to look …"));
    try {
      const result = await ask("/api/forecast", { changes: draft }, { signal });
      fill(cost, h("dl", { class: "tiles" }, result.figures.map(([what, much, is]) => h("div", {}, h("dt", {}, what), h("dd", {}, much), h("p", {}, is)))), result.notes.map((n) => h("p", { class: "note" }, n)));
      announce("the cost is estimated");
    } catch (error) { fill(cost); throw error; }
  }, costProblems, { class: "quiet" });

  const writing = h("textarea", { rows: 12, spellcheck: "false", "aria-label": "A recipe as YAML" });
  const wrong = complaint();
  const again = () => (location.hash === "#new" ? window.dispatchEvent(new HashChangeEvent("hashchange")) : (location.hash = "#new"));
  const pasted = h("details", {}, h("summary", {}, "Write or paste a recipe instead"), writing,
    h("p", { class: "buttons" }, button("Use this recipe", async () => {
      tabStore.set("draft", await ask("/api/fields", { text: writing.value }));
      again();
    }, wrong, { class: "quiet" })), wrong.box);
  pasted.addEventListener("toggle", () => { if (pasted.open && !writing.value) writing.value = latest.text; });

  return h("aside", { class: "sheet", "aria-label": "The recipe and its cost" },
    h("h2", {}, "The recipe"), text, notes,
    h("div", { class: "fields one" }, field("Name of the run", name, "Its folder: runs/NAME")),
    h("p", { class: "buttons" }, start, foretell), ready, startProblems.box, costProblems.box, cost,
    h("p", { class: "note" }, "The same from a shell: ", command),
    h("details", {}, h("summary", {}, "The whole recipe, with defaults"), whole), pasted,
    h("p", { class: "buttons" }, h("button", { type: "button", class: "quiet", onclick: () => { tabStore.set("draft", null); again(); } }, "Reset")));
}
