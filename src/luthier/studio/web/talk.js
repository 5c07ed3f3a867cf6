// Two models, asked the same under one system prompt; both answers grow side by side.

import { announce, ask, complaint, field, fill, h, tabStore, listen, shell } from "./dom.js";
import { pick } from "./pickers.js";

const TOKENS = 256, HOTTEST = 2;

export async function talk(rest, signal) {
  const start = await ask("/api/start");
  const was = { system: "", tokens: TOKENS, heat: 0, seed: 0, ...tabStore.get("talk", { models: ["toy:lm-small", ""], turns: [[], []] }) };
  let requested = null;
  try { requested = rest ? JSON.parse(rest) : null; } catch { /* an address somebody typed */ }
  if (requested && String(requested) !== String(was.models)) { was.models = requested.map(String); was.turns = [[], []]; }
  const system = h("textarea", { rows: 4, placeholder: "none", onchange: () => again() });
  system.value = was.system;
  const tokens = h("input", { type: "number", min: 1, max: 4096, value: was.tokens }), seed = h("input", { type: "number", value: was.seed });
  const heat = h("input", { type: "range", min: 0, max: HOTTEST, step: 0.05, value: was.heat }), warmth = h("p", { class: "note" });
  const how = () => ({ max_new_tokens: Number(tokens.value) || TOKENS, temperature: Number(heat.value) || 0, seed: Number(seed.value) || 0 });
  const commands = h("p", { class: "shell" });
  const keep = () => {
    const { max_new_tokens, temperature } = how();
    Object.assign(was, { system: system.value.trim(), tokens: max_new_tokens, heat: temperature, seed: how().seed });
    fill(warmth, temperature === 0 ? "0: always the likeliest token" : `${temperature}: drawn with the seed`);
    tabStore.set("talk", was);
    const options = Object.entries(how()).filter(([, value]) => value).flatMap(([name, value]) => [`--${name.replaceAll("_", "-")}`, value]);
    if (was.system) options.push("--system", was.system);
    fill(commands, was.models.filter(Boolean).map((m) => h("code", {}, shell("luthier", "chat", m, ...options))));
  };
  const text = h("textarea", { rows: 2, onkeydown: (e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); } } });
  const ways = () => { text.placeholder = was.models.filter(Boolean).length > 1 ? "Ask both …" : "Ask …"; };
  const sides = ["left", "right"].map((side, i) => panel(side, i, was, start, { keep, changed: ways }, signal));
  const go = h("button", { type: "button", class: "main", onclick: () => send() }, "Ask");
  const stop = h("button", { type: "button", disabled: true, onclick: () => going.abort() }, "Stop");
  let going = new AbortController();
  signal.addEventListener("abort", () => going.abort());
  window.addEventListener("pagehide", keep, { signal }); // a reload keeps what was heard

  /** Another system prompt begins another conversation. */
  function again() {
    going.abort();
    was.turns = [[], []];
    keep();
    sides.forEach((s) => s.show());
    announce("a new conversation");
  }

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
  for (const one of [tokens, heat, seed]) one.addEventListener("input", keep);
  return [
    h("header", {}, h("h1", {}, "Chat"), h("p", { class: "note" }, "The same message to one model or two, as each was trained to be asked: in turns, or with a text to continue.")),
    h("div", { class: "desk" },
      h("div", {}, h("div", { class: "talk" }, sides.map((s) => s.box)),
        h("div", { class: "asking" }, field("Message", text, "Enter sends, Shift+Enter breaks the line"),
          h("p", { class: "buttons" }, go, stop, h("button", { type: "button", class: "quiet", onclick: again }, "New conversation")))),
      h("section", { class: "how", "aria-labelledby": "s-how" }, h("h2", { id: "s-how" }, "How it is asked"),
        field("System prompt", system, "A change begins a new conversation"),
        field("Temperature", heat), warmth, field("Most new tokens", tokens), field("Seed", seed, "Of the draws"))),
    h("p", { class: "note" }, "The same from a shell:"), commands,
  ];
}

/** Rejects as an aborted request does, once nobody waits for it. */
const ended = (signal) => new Promise((_, reject) => signal.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")), { once: true }));

function panel(side, i, was, start, { keep, changed }, signal) {
  const problems = complaint(), turns = h("div", { class: "turns chat", role: "log", tabindex: "0", "aria-label": `Conversation, ${side}` });
  const state = h("p", { class: "note load" }), chosen = h("button", { type: "button", class: "chosen", "aria-haspopup": "dialog", onclick: choose });
  let ready = "", loading = null; // which model is loaded, and what waits for it

  function choose() {
    const plain = (says) => (name) => ({ name, says });
    const groups = [["Runs of this folder", start.runs.map(plain(""))], ["Models", [...start.near, ...start.cached].map(plain(""))], ["Built in", start.models.map(plain("no network needed"))]];
    if (i) groups.unshift(["", [{ name: "", title: "none", says: "ask one model alone" }]]);
    pick(i ? "Compare with" : "Model", groups, was.models[i], use, (text) => (text ? "a run, a folder or a name on the hub" : null));
  }

  function use(name) {
    was.models[i] = name.trim();
    was.turns[i] = [];
    keep();
    show();
    problems.say("");
    load().catch(() => {});
  }

  /** Load the model ahead of the first message, and say how long that has been taking. */
  function load() {
    const name = was.models[i];
    if (!name || ready === name) return Promise.resolve();
    if (loading?.name === name) return loading.done;
    const began = Date.now();
    const tick = () => fill(state, h("span", { class: "spinner", "aria-hidden": "true" }), `loading ${name} … ${Math.round((Date.now() - began) / 1000)} s`);
    tick();
    const clock = setInterval(tick, 1000);
    const mine = { name };
    mine.done = ask(`/api/say/${side}/load`, { model: name }, { signal }).then((told) => {
      if (was.models[i] !== name) return;
      ready = name;
      const system = told.system ? ` Its rows had the system prompt “${told.system.slice(0, 200)}”.` : "";
      fill(state, `Ready: ${told.turns ? "asked in turns, through its chat template." : "continues the text it is given."}${system}`, told.notes.length > 0 && ` ${told.notes.join(" ")}`);
      announce(`${name} is ready`);
    }, (error) => {
      if (error.name === "AbortError") return;
      fill(state);
      if (was.models[i] === name) problems.say(error.message);
      throw error;
    }).finally(() => { clearInterval(clock); loading = null; });
    loading = mine;
    return mine.done;
  }

  const turn = (t, name) => h("div", { class: `turn bubble ${t.role === "user" ? "user" : "assistant"}` }, h("p", { class: "who" }, t.role === "user" ? "you" : name), h("pre", {}, t.content || "(nothing)"), t.stopped && h("p", { class: "note" }, "stopped here"));
  function show() {
    fill(chosen, h("b", {}, was.models[i] || "none"), h("span", { class: "extra" }, "Change"));
    chosen.setAttribute("aria-label", `${i ? "Compare with" : "Model"}: ${was.models[i] || "none"}. Change`);
    fill(turns, was.turns[i].map((t) => turn(t, was.models[i])));
    turns.hidden = !was.models[i];
    changed();
    turns.scrollTop = turns.scrollHeight;
    if (ready !== was.models[i]) fill(state, was.models[i] ? "It is loaded at its first message." : "");
  }

  async function say(text, how, stopped) {
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
      await Promise.race([load(), ended(stopped)]);
      const earlier = was.system ? [{ role: "system", content: was.system }, ...before] : before;
      const sent = earlier.map(({ role, content }) => ({ role, content }));
      const result = await listen(`/api/say/${side}`, { model: name, text, before: sent, ...how }, (part) => {
        const below = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
        if (!answer.content) growing.textContent = "";
        answer.content += part;
        growing.append(part);
        if (below) turns.scrollTop = turns.scrollHeight;
      }, { signal: stopped });
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
  return { box: h("section", { class: "side", "aria-label": `Model ${side}` }, h("h2", {}, i ? "Compare with" : "Model"), chosen, state, turns, problems.box), show, ask: say };
}
