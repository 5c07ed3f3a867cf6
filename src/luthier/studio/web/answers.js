// What a model answered before and after training, as a conversation: the prompt, both answers, and what differs between them.

import { h, number } from "./dom.js";
import { diff } from "./diff.js";

const FIRST = 3; // answers that are shown at once
const LONG = 1400; // characters of a bubble

/** The pair that shows best what training did: the largest gain, else a changed answer that comes closest to the reference. */
export function bestPair(answers) {
  const both = answers.filter((a) => typeof a.before === "string" && typeof a.after === "string");
  const gain = (a) => (a.score_after ?? 0) - (a.score_before ?? 0);
  const close = (a) => (a.expected && a.after.trim().includes(String(a.expected).trim()) ? 1 : 0);
  const changed = (a) => (a.before.trim() !== a.after.trim() ? 1 : 0);
  const short = (a) => -(a.prompt.length + a.before.length + a.after.length) / 1e4;
  const rank = (a) => [gain(a), close(a), changed(a), short(a)];
  const better = (a, b) => {
    const [x, y] = [rank(a), rank(b)];
    const i = x.findIndex((value, k) => value !== y[k]);
    return i >= 0 && x[i] > y[i];
  };
  const first = answers.find((a) => typeof a.before === "string") ?? null; // of a run that has only begun
  return both.reduce((best, a) => (best === null || better(a, best) ? a : best), null) ?? first;
}

/** How many of the answers became better and worse, in words. */
export function tally(answers) {
  const scored = answers.filter((a) => typeof a.score_before === "number" && typeof a.score_after === "number");
  if (!scored.length) return "";
  const better = scored.filter((a) => a.score_after > a.score_before).length;
  const worse = scored.filter((a) => a.score_after < a.score_before).length;
  return `Of ${scored.length} prompts, ${better} answered better than before, ${worse} worse.`;
}

/** One prompt with its answers. finished: else `after` is what was generated last. */
export function conversation(answer, finished) {
  const before = typeof answer.before === "string" ? answer.before.trim() : null;
  const after = typeof answer.after === "string" ? answer.after.trim() : null;
  const parts = before !== null && after !== null && before !== after ? diff(before, after) : null;
  const side = (text, keep, mark) => {
    if (!parts) return clipped(text);
    return parts.filter((part) => part[keep]).map(([piece, first, second]) => (first && second ? piece : h(mark, {}, piece)));
  };
  const same = before !== null && before === after;
  return h("div", { class: "chat" },
    bubble("user", "prompt", null, clipped(answer.prompt)),
    before !== null && bubble("before", same ? `before and ${finished ? "after" : "now"}, the same` : "before", answer.score_before, side(before, 1, "del")),
    after !== null && !same && bubble("after", finished ? "after" : "now", answer.score_after, side(after, 2, "ins")),
    answer.expected !== null && answer.expected !== undefined && bubble("reference", "reference", null, clipped(String(answer.expected).trim())));
}

function bubble(kind, who, score, content) {
  const empty = content === "" || (Array.isArray(content) && !content.length);
  return h("div", { class: `bubble ${kind}` }, h("p", { class: "who" }, who, verdict(score)), h("pre", {}, empty ? h("i", {}, "(nothing)") : content));
}

function verdict(score) {
  if (score === null || score === undefined) return null;
  const word = score === 1 ? "correct" : score === 0 ? "wrong" : `score ${number(score)}`;
  return h("b", { class: score > 0 ? "good" : "bad" }, word);
}

const clipped = (text) => (text.length > LONG ? `${text.slice(0, LONG)} …` : text);

/** All answers: the first few, and a button for the rest. rows: of which they are, such as held-out rows. */
export function answersSection(answers, finished, rows, open = false) {
  if (!answers.length) return null;
  const list = h("div", { class: "answers" }, answers.slice(0, open ? answers.length : FIRST).map((a) => h("article", {}, conversation(a, finished))));
  const rest = answers.length - FIRST;
  const more = rest > 0 && !open && h("button", { type: "button", class: "quiet", onclick: () => {
    const next = answers.slice(FIRST).map((a) => h("article", { tabindex: "-1" }, conversation(a, finished)));
    list.append(...next);
    list.dataset.open = "true";
    more.remove();
    next[0].focus();
  } }, `${rest} more`);
  if (open) list.dataset.open = "true";
  return h("section", { class: "all-answers" }, h("h2", {}, "Answers"),
    h("p", { class: "note" }, [rows && `Prompts of ${rows}.`, tally(answers)].filter(Boolean).join(" ")), list, more && h("p", { class: "buttons" }, more));
}
