// Elements, questions to the studio, and what is said aloud. Whatever comes from rows, models or recipes becomes text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** h("p", {class: "note", onclick: f}, "text", element, ...): an element; attributes that are false or null are left out. */
export function h(tag, attributes = {}, ...inside) {
  return assemble(document.createElement(tag), attributes, inside);
}

export function svg(tag, attributes = {}, ...inside) {
  return assemble(document.createElementNS(SVG, tag), attributes, inside);
}

function assemble(element, attributes, inside) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...inside.flat(9).filter((x) => x !== null && x !== undefined && x !== false));
  return element;
}

/** Replace what an element holds. */
export function fill(element, ...inside) {
  element.replaceChildren(...inside.flat(9).filter((x) => x !== null && x !== undefined && x !== false));
  return element;
}

let lastAnnounced = "";
/** Say something to who listens instead of looks; the same thing twice is said once. */
export function announce(text) {
  if (text && text !== lastAnnounced) document.getElementById("status").textContent = lastAnnounced = text;
}

/** A question to the studio. Throws an Error whose message is the sentence that the command line would say. */
export async function ask(path, body, how = {}) {
  return whole(await sent(path, body, how));
}

/** A question whose answer comes in parts: `hear` is told each, and what it comes to is returned. Aborting ends it there. */
export async function listen(path, body, hear, how = {}) {
  const answer = await sent(path, body, how);
  if (!answer.ok) return whole(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : new Error(GONE); });
    if (done) throw new Error(GONE);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const message of lines.map((line) => JSON.parse(line))) {
      if (message.error !== undefined) throw new Error(message.error);
      if (message.is !== undefined) return message.is;
      hear(message.part);
    }
  }
}

const GONE = "the studio does not answer; was it ended? `luthier studio` starts it again, and the runs are where they were";

async function sent(path, body, how) {
  try {
    return await fetch(path, body === undefined ? how : { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, ...how });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(GONE);
  }
}

async function whole(answer) {
  const message = await answer.json().catch(() => ({ error: `the studio answered ${answer.status}` }));
  if (!answer.ok || message.error !== undefined && Object.keys(message).length === 1) throw new Error(message.error);
  return message;
}

/** A place for a sentence that went wrong; it is read aloud at once. */
export function complaint() {
  const box = h("p", { class: "complaint", role: "alert", hidden: true });
  return {
    box,
    say(text) { box.textContent = text; box.hidden = !text; },
  };
}

/** A button that is busy while its work is done, and complains where it fails. */
export function button(text, work, where, attributes = {}) {
  const element = h("button", { type: "button", ...attributes, onclick: async () => {
    if (element.getAttribute("aria-busy") === "true") return;
    element.setAttribute("aria-busy", "true");
    where.say("");
    try { await work(element); } catch (error) { where.say(error.message); } finally { element.removeAttribute("aria-busy"); }
  } }, text);
  return element;
}

let counter = 0;
/** A label, its field and its help, tied together. */
export function field(label, input, help = "") {
  input.id ||= `f${++counter}`;
  const hint = help ? h("small", { id: `${input.id}-h` }, help) : null;
  if (hint) input.setAttribute("aria-describedby", hint.id);
  return h("div", { class: "field" }, h("label", { for: input.id }, label), input, hint);
}

/** A field with suggestions. */
export function suggested(list, attributes = {}) {
  const id = `l${++counter}`;
  const input = h("input", { type: "text", list: id, autocomplete: "off", spellcheck: "false", autocapitalize: "off", ...attributes });
  return [input, h("datalist", { id }, list.map((x) => h("option", { value: x })))];
}

/** Kept in this tab, so that a reload loses nothing that was typed. */
export const tabStore = {
  get(name, other) {
    try { return JSON.parse(sessionStorage.getItem(`luthier-${name}`)) ?? other; } catch { return other; }
  },
  set(name, value) {
    try { sessionStorage.setItem(`luthier-${name}`, JSON.stringify(value)); } catch { /* a full or forbidden store: then only this page knows */ }
  },
};

/** Words as a shell reads them. */
export const shell = (...words) => words.map((w) => /^[\w@%+=:,./-]+$/.test(w) ? w : `'${String(w).replaceAll("'", "'\\''")}'`).join(" ");
export const count = (n) => Number(n).toLocaleString("en");
export const number = (x) => x === null || x === undefined ? "" : x !== 0 && Math.abs(x) < 0.1 ? String(Number(x.toPrecision(2))) : Math.abs(x) >= 1000 ? count(Math.round(x)) : String(Number(x.toPrecision(3)));
export const percent = (x) => `${Math.round(100 * x)}%`;

/** Do something again and again while the page is looked at; it ends when `signal` does. */
export function every(seconds, signal, work) {
  let waiting = 0;
  const again = async () => {
    clearTimeout(waiting);
    if (signal.aborted) return;
    const go = document.hidden ? true : await work().catch((error) => (error.name === "AbortError" ? false : true));
    if (go !== false && !signal.aborted) waiting = setTimeout(again, (go === "soon" ? 0.05 : document.hidden ? 5 : seconds) * 1000);
  };
  document.addEventListener("visibilitychange", () => document.hidden || again(), { signal });
  again();
}

/** A dialog over the page; it is in the page as long as it is open. Escape and a click beside it close it. */
export function dialog(title, content, attributes = {}) {
  const close = h("button", { type: "button", class: "quiet close", "aria-label": "Close", onclick: () => box.close() }, "×");
  const box = h("dialog", { "aria-label": title, ...attributes },
    h("div", { class: "inside" }, h("header", {}, h("h2", {}, title), close), content));
  box.addEventListener("click", (e) => { if (e.target === box) box.close(); });
  const opener = document.activeElement;
  box.addEventListener("close", () => { box.remove(); if (opener?.isConnected) opener.focus(); });
  window.addEventListener("hashchange", () => box.open && box.close(), { once: true });
  document.body.append(box);
  box.showModal();
  return box;
}

/** 123456789 -> "118 MB". */
export function bytes(n) {
  if (n === null || n === undefined) return "";
  for (const [size, unit, digits] of [[2 ** 30, "GB", 1], [2 ** 20, "MB", 0], [2 ** 10, "KB", 0]]) {
    if (n >= size) return `${(n / size).toFixed(digits)} ${unit}`;
  }
  return `${n} B`;
}

/** 75.2 -> "1 min 15 s". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
