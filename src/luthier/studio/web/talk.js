// Two models, asked the same.

import { announce, ask, complaint, field, fill, h, kept, suggested } from "./dom.js";

export async function talk(rest, signal) {
  const start = await ask("/api/start");
  const was = kept.get("talk", { models: ["practice:lm-small", ""], turns: [[], []] });
  let given = null;
  try { given = rest ? JSON.parse(rest) : null; } catch { /* an address somebody typed */ }
  if (given && String(given) !== String(was.models)) { was.models = given.map(String); was.turns = [[], []]; }
  const keep = () => kept.set("talk", was);
  const sides = ["left", "right"].map((side, i) => panel(side, i, was, [...start.models, ...start.runs], keep));

  const text = h("textarea", { rows: 2, placeholder: "Ask both …", onkeydown: (e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); } } });
  const tokens = h("input", { type: "number", min: 1, max: 4096, value: 64 }), heat = h("input", { type: "number", min: 0, step: 0.1, value: 0 }), seed = h("input", { type: "number", value: 0 });
  const go = h("button", { type: "button", class: "main", onclick: () => send() }, "Ask");
  async function send() {
    const asked = text.value.trim();
    if (!asked || go.getAttribute("aria-busy") === "true") return;
    go.setAttribute("aria-busy", "true");
    text.value = "";
    const how = { max_new_tokens: Number(tokens.value) || 64, temperature: Number(heat.value) || 0, seed: Number(seed.value) || 0 };
    await Promise.all(sides.map((s) => s.ask(asked, how, signal)));
    go.removeAttribute("aria-busy");
    keep();
    text.focus();
  }
  return [
    h("header", {}, h("h1", {}, "Talk"), h("p", { class: "note" }, "The same words to one model or two. A model is loaded when it is first asked, and asked as it was trained: in turns, or with a text to continue.")),
    h("div", { class: "talk" }, sides.map((s) => s.box)),
    h("div", { class: "asking" }, field("What you say", text, "Enter sends, Shift+Enter breaks the line"),
      h("p", { class: "buttons" }, go, h("button", { type: "button", class: "quiet", onclick: () => { was.turns = [[], []]; keep(); sides.forEach((s) => s.show()); announce("a new conversation"); } }, "New conversation"))),
    h("details", {}, h("summary", {}, "How they answer"), h("div", { class: "fields" }, field("max_new_tokens", tokens, "Tokens of an answer at most"), field("temperature", heat, "0 always takes the likeliest token"), field("seed", seed, "Of the random draws, where temperature is above 0"))),
  ];
}

function panel(side, i, was, models, keep) {
  const said = complaint(), turns = h("div", { class: "turns", role: "log", "aria-label": `Conversation, ${side}` });
  const [model, list] = suggested(models, { value: was.models[i] ?? "", placeholder: i ? "nobody" : "practice:lm", onchange: () => { was.models[i] = model.value.trim(); was.turns[i] = []; keep(); show(); } });
  function show() {
    fill(turns, was.turns[i].map((t) => h("div", { class: `turn ${t.role}` }, h("h4", {}, t.role === "user" ? "you" : was.models[i]), h("pre", {}, t.content || "(nothing)"))));
    turns.scrollTop = turns.scrollHeight;
  }
  async function say(text, how, signal) {
    const name = was.models[i];
    if (!name) return;
    said.say("");
    const before = was.turns[i];
    was.turns[i] = [...before, { role: "user", content: text }];
    show();
    const busy = h("p", { class: "note busy" }, "…");
    turns.append(busy);
    try {
      const found = await ask(`/api/say/${side}`, { model: name, text, before, ...how }, { signal });
      was.turns[i] = [...was.turns[i], { role: "assistant", content: found.answer }];
      show();
      if (found.notes.length) said.say(found.notes.join(" "));
    } catch (error) {
      if (error.name === "AbortError") return;
      was.turns[i] = before;
      show();
      said.say(error.message);
    } finally { busy.remove(); }
  }
  show();
  return { box: h("section", { class: "side", "aria-label": `Model ${side}` }, field(i ? "And" : "Model", model), list, turns, said.box), show, ask: say };
}
