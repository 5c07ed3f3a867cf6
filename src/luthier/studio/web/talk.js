// Two models, asked the same; both answers grow side by side.

import { announce, ask, complaint, field, fill, h, tabStore, listen, shell, suggested } from "./dom.js";

export async function talk(rest, signal) {
  const start = await ask("/api/start");
  const was = tabStore.get("talk", { models: ["toy:lm-small", ""], turns: [[], []] });
  let requested = null;
  try { requested = rest ? JSON.parse(rest) : null; } catch { /* an address somebody typed */ }
  if (requested && String(requested) !== String(was.models)) { was.models = requested.map(String); was.turns = [[], []]; }
  const tokens = h("input", { type: "number", min: 1, max: 4096, value: 64 }), heat = h("input", { type: "number", min: 0, step: 0.1, value: 0 }), seed = h("input", { type: "number", value: 0 });
  const how = () => ({ max_new_tokens: Number(tokens.value) || 64, temperature: Number(heat.value) || 0, seed: Number(seed.value) || 0 });
  const commands = h("p", { class: "shell" });
  const keep = () => {
    tabStore.set("talk", was);
    const options = Object.entries(how()).filter(([, value]) => value).flatMap(([name, value]) => [`--${name.replaceAll("_", "-")}`, value]);
    fill(commands, was.models.filter(Boolean).map((m) => h("code", {}, shell("luthier", "chat", m, ...options))));
  };
  const sides = ["left", "right"].map((side, i) => panel(side, i, was, [...start.models, ...start.runs], keep));

  const text = h("textarea", { rows: 2, placeholder: "Ask both …", onkeydown: (e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); } } });
  const go = h("button", { type: "button", class: "main", onclick: () => send() }, "Ask");
  const stop = h("button", { type: "button", disabled: true, onclick: () => going.abort() }, "Stop");
  let going = new AbortController();
  signal.addEventListener("abort", () => going.abort());
  window.addEventListener("pagehide", keep, { signal }); // a reload keeps what was heard

  async function send() {
    const prompt = text.value.trim();
    if (!prompt || !stop.disabled) return;
    going = new AbortController();
    stop.disabled = !(go.disabled = true);
    text.value = "";
    text.focus();
    await Promise.all(sides.map((s) => s.ask(prompt, how(), going.signal)));
    go.disabled = !(stop.disabled = true);
    keep();
    if (going.signal.aborted) announce("stopped");
    if (document.activeElement === document.body) text.focus(); // the button that was pressed is there no more
  }
  keep();
  return [
    h("header", {}, h("h1", {}, "Chat"), h("p", { class: "note" }, "The same message to one model or two. A model is loaded at its first message and prompted as it was trained: in chat turns, or with a text to continue.")),
    h("div", { class: "talk" }, sides.map((s) => s.box)),
    h("div", { class: "asking" }, field("Message", text, "Enter sends, Shift+Enter breaks the line"),
      h("p", { class: "buttons" }, go, stop, h("button", { type: "button", class: "quiet", onclick: () => { going.abort(); was.turns = [[], []]; keep(); sides.forEach((s) => s.show()); announce("a new conversation"); } }, "New conversation"))),
    h("details", { onchange: keep }, h("summary", {}, "Generation settings"), h("div", { class: "fields" }, field("max_new_tokens", tokens, "Maximum number of generated tokens"), field("temperature", heat, "0: greedy decoding"), field("seed", seed, "Of sampling, where temperature is above 0"))),
    h("p", { class: "note" }, "The same from a shell:"), commands,
  ];
}

function panel(side, i, was, models, keep) {
  const problems = complaint(), turns = h("div", { class: "turns", role: "log", tabindex: "0", "aria-label": `Conversation, ${side}` });
  const [model, list] = suggested(models, { value: was.models[i] ?? "", placeholder: i ? "none" : "toy:lm", onchange: () => { was.models[i] = model.value.trim(); was.turns[i] = []; keep(); show(); } });
  const turn = (t, name) => h("div", { class: `turn ${t.role}` }, h("p", { class: "who" }, t.role === "user" ? "you" : name), h("pre", {}, t.content || "(nothing)"), t.stopped && h("p", { class: "note" }, "stopped here"));
  function show() {
    fill(turns, was.turns[i].map((t) => turn(t, was.models[i])));
    turns.scrollTop = turns.scrollHeight;
  }
  async function say(text, how, signal) {
    const name = was.models[i];
    if (!name) return;
    problems.say("");
    const before = was.turns[i], answer = { role: "assistant", content: "" };
    const mine = was.turns[i] = [...before, { role: "user", content: text }, answer];
    show();
    const growing = turns.lastChild.querySelector("pre");
    growing.textContent = "…";
    growing.classList.add("busy");
    turns.setAttribute("aria-busy", "true"); // who listens hears the answer once, when it is whole
    try {
      const result = await listen(`/api/say/${side}`, { model: name, text, before, ...how }, (part) => {
        const below = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
        if (!answer.content) growing.textContent = "";
        answer.content += part;
        growing.append(part);
        if (below) turns.scrollTop = turns.scrollHeight;
      }, { signal });
      answer.content = result.answer;
      if (result.notes.length) problems.say(result.notes.join(" "));
    } catch (error) {
      if (error.name === "AbortError") answer.stopped = true;
      else problems.say(error.message);
      if (!answer.content && was.turns[i] === mine) was.turns[i] = before;
    } finally {
      turns.removeAttribute("aria-busy");
      show();
    }
  }
  show();
  return { box: h("section", { class: "side", "aria-label": `Model ${side}` }, field(i ? "And" : "Model", model), list, turns, problems.box), show, ask: say };
}
