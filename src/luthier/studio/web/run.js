// One run: what it came to, its curve and one pair of answers first; below them the rest, and what can be done with it.

import { announce, ask, button, complaint, every, field, fill, h } from "./dom.js";
import { curves as drawCurves } from "./charts.js";
import { positive, series, smoothed } from "./curves.js";
import { answersSection, bestPair, conversation } from "./answers.js";
import { exporting } from "./export.js";
import { clone } from "./new.js";
import { badge, progress, tags } from "./runs.js";
import { studyPage } from "./study.js";

const PLAIN = ["step", "loss", "learning_rate", "tokens", "seconds", "epoch", "eval_loss"]; // of a log line; the rest gets small charts
const busyStates = ["running", "starting"];
const isBusy = (r) => busyStates.includes(r.state);

export async function run(name, signal) {
  const at = `/api/runs/${encodeURIComponent(name)}`;
  let whole = await ask(at);
  const logged = [], place = { since: 0, mark: "" };
  const problems = complaint();
  const actions = h("p", { class: "buttons" }), head = h("div", { class: "now" }), marks = h("span", { class: "marks" });
  const sentence = h("div"), chart = h("section", { class: "card curve", "aria-labelledby": "s-curve" }), pair = h("section", { class: "card pair", "aria-labelledby": "s-pair" });
  const fold = h("div", { class: "fold" }, chart, pair);
  const numbers = h("div"), study = h("div"), more = h("div"), answers = h("div"), smallsBox = h("div"), labels = h("div");
  const log = h("pre", { class: "log", tabindex: "0", "aria-label": "Console output" });
  const command = h("p", { class: "note" }), recipe = h("pre", { class: "recipe", tabindex: "0", "aria-label": "The recipe" });
  let state = "", drawn = 0, quarter = 0, studied = "", shown = "";

  // ---------------------------------------------------------------------------------------------- what can be done

  async function reload() {
    whole = await ask(at, undefined, { signal });
    show();
  }

  let offered = "";
  function act(r) {
    const busy = isBusy(r), finished = r.state === "finished";
    const mark = JSON.stringify([r.state, r.report, r.kind, whole.writes, whole.command, whole.recipe]);
    if (mark === offered) return; // a button that is focused stays what it is
    offered = mark;
    fill(actions,
      busy && button("Stop", async () => { await ask(`${at}/stop`, {}); announce("stopping"); }, problems),
      !busy && !finished && whole.command && button("Resume", async () => { await ask(`${at}/resume`, {}); place.mark = "?"; await reload(); live(); }, problems, { class: "main" }),
      finished && r.kind === "run" && button("Export", () => exporting(at, name, whole.exports, reload), problems, { class: "main" }),
      finished && r.kind === "run" && whole.writes && h("a", { class: "button", href: `#talk/${encodeURIComponent(JSON.stringify([modelOf(r), `runs/${name}`]))}` }, "Chat with it"),
      r.report && h("a", { class: "button quiet", href: `/runs/${encodeURIComponent(name)}/report.html`, target: "_blank" }, "Report"),
      r.kind === "run" && whole.recipe && button("Clone with changes", () => clone(whole.recipe), problems, { class: "quiet" }),
      !busy && removing(at, name, problems));
  }

  function top(r) {
    fill(marks, badge(r), tags(r.tags));
    fill(head, progress(r), r.why && h("p", { class: r.state === "failed" ? "complaint" : "note" }, r.why));
    head.hidden = !head.childNodes.length;
    if (r.state !== state) {
      if (state) announce(`${name} is ${r.state}`);
      state = r.state;
      act(r);
    } else if (r.state === "running" && r.steps && Math.floor(4 * r.step / r.steps) !== quarter) {
      quarter = Math.floor(4 * r.step / r.steps);
      announce(`${name}: step ${r.step} of ${r.steps}`);
    }
  }

  // ---------------------------------------------------------------------------------------------- what it came to

  function show() {
    const finished = whole.state === "finished";
    top(whole);
    act(whole);
    fill(sentence, whole.sentence && h("p", { class: "sentence" }, whole.sentence), whole.trend && h("p", { class: "note" }, `${whole.trend[0].toUpperCase()}${whole.trend.slice(1)}.`));
    const generated = JSON.stringify([whole.answers, finished, whole.measured_on, whole.state]);
    if (generated !== shown) { // where nothing is new, nothing that is scrolled or focused changes
      shown = generated;
      showPair(finished);
      fill(answers, answersSection(whole.answers, finished, whole.measured_on, Boolean(answers.querySelector("[data-open]"))));
    }
    fill(numbers,
      whole.cost.length > 0 && h("dl", { class: "tiles" }, whole.cost.map(([what, much]) => h("div", {}, h("dt", {}, what), h("dd", {}, much)))),
      table(whole, finished, numbers.querySelector("details")?.open));
    if (whole.study && JSON.stringify(whole.study) !== studied) {
      studied = JSON.stringify(whole.study);
      fill(study, studyPage(whole.study));
    }
    fill(more, whole.notes.length > 0 && h("section", {}, h("h2", {}, "Warnings and notes"), h("ul", {}, whole.notes.map((n) => h("li", {}, n)))));
    fill(command, whole.command ? ["From a shell: ", h("code", {}, whole.command)] : "");
    recipe.textContent = whole.recipe;
    log.textContent = whole.log;
    drawn = -1; // which rows the points are of may be known now
    draw();
  }

  function showPair(finished) {
    const best = bestPair(whole.answers);
    const later = isBusy(whole) ? "Answers before and after stand here once the run has generated some." : "This run generated no answers before and after; `evaluate: [loss, generate]` has it do so.";
    fill(pair, h("h2", { id: "s-pair" }, "One answer, before and after"),
      best ? [conversation(best, finished), h("p", { class: "note" }, whole.measured_on && `A prompt of the ${whole.measured_on}. `, whole.answers.length > 1 && h("button", { type: "button", class: "link", onclick: () => answers.scrollIntoView({ behavior: "smooth" }) }, `All ${whole.answers.length} answers`))] : h("p", { class: "note" }, later));
    fold.hidden = whole.kind !== "run";
  }

  // ---------------------------------------------------------------------------------------------- curves

  const charts = new Map(); // key -> chart, which grows where it stands
  const smalls = h("div", { class: "smalls" }), loss = h("div", { class: "plot" }), waiting = h("p", { class: "note" });
  fill(chart, h("h2", { id: "s-curve" }, "Loss"), waiting, loss);

  function grow(key, caption, box, spec) {
    if (charts.has(key)) charts.get(key).update(spec);
    else charts.set(key, drawCurves(box, { label: `${caption} by step`, ...spec }));
  }

  function draw() {
    if (logged.length === drawn) return;
    drawn = logged.length;
    const raw = series(logged, "loss"), rows = whole.measured_on, points = evaluated(logged, whole);
    waiting.textContent = raw.length ? "" : isBusy(whole) ? "The curve begins with the first step." : "No step was logged.";
    waiting.hidden = raw.length > 0;
    const onRows = rows || "evaluated";
    const lines = [
      { name: "each step", colour: "raw", width: 1, points: raw }, { name: "smoothed", colour: "wood", points: smoothed(raw) },
      { name: onRows, colour: "held", points: points.between }, { name: "○ before and after", colour: "held", marks: true, points: points.ends },
    ].filter((one) => one.points.length);
    if (raw.length) grow("loss", "loss", loss, { height: 270, zero: true, log: positive(raw, points.between, points.ends), series: lines });
    const extra = [...new Set(logged.flatMap((x) => Object.keys(x)))].filter((k) => !PLAIN.includes(k) && !k.includes("/"));
    const names = ["learning_rate", ...extra].filter((k) => series(logged, k).length > 0).slice(0, 12);
    if (names.length && !smallsBox.firstChild) fill(smallsBox, h("section", {}, h("h2", {}, "Also logged"), smalls));
    for (const key of names) {
      const metric = whole.numbers.find((x) => `eval_${x.name}` === key);
      const caption = metric ? `${metric.label}, evaluated` : key.replaceAll("_", " ");
      const box = h("div", { class: "plot" });
      if (!charts.has(key)) smalls.append(h("figure", {}, h("figcaption", {}, caption), box));
      grow(key, caption, box, { height: 150, series: [{ name: caption, colour: "wood", points: series(logged, key) }] });
    }
  }

  // ---------------------------------------------------------------------------------------------- while it goes on

  async function tick() {
    const result = await ask(`${at}/live?since=${place.since}&mark=${encodeURIComponent(place.mark)}`, undefined, { signal });
    problems.say("");
    if (result.anew) { logged.length = 0; drawn = -1; }
    logged.push(...result.lines);
    const full = result.lines.length > 2000;
    place.since = result.next;
    place.mark = result.mark;
    draw();
    const was = state;
    top(result.run);
    const over = !isBusy(result.run);
    if (over !== !busyStates.includes(was) || !over) {
      whole = await ask(at, undefined, { signal });
      show();
    }
    return full ? "soon" : over ? false : true;
  }

  let going = new AbortController();
  function live() {
    going.abort();
    going = new AbortController();
    signal.addEventListener("abort", () => going.abort());
    every(1.5, going.signal, async () => { try { return await tick(); } catch (error) { if (error.name === "AbortError") return false; problems.say(error.message); return true; } });
  }

  state = whole.state;
  show();
  live();
  fill(labels, labelling(at, whole, problems, reload));
  return [
    h("header", { class: "run-head" }, h("p", { class: "what" }, h("a", { href: "#runs" }, "Runs"), " / ", whole.what), h("div", { class: "bar" }, h("div", { class: "titles" }, h("h1", {}, name), marks), actions)),
    head, problems.box, sentence, fold, study, numbers, answers, smallsBox, more,
    h("section", {}, h("h2", {}, "Tags and note"), labels),
    whole.recipe && h("section", {}, h("h2", {}, "Recipe"), command, recipe),
    h("section", {}, h("details", {}, h("summary", {}, "Console output"), log)),
  ];
}

/** The loss on evaluated rows: before training and after it, and the curve between them. */
function evaluated(logged, whole) {
  const { before, after } = whole.losses;
  const known = (x) => typeof x === "number" && Number.isFinite(x);
  const between = series(logged, "eval_loss"), last = whole.steps ?? logged.at(-1)?.step ?? 0;
  const ends = [];
  if (known(before)) ends.push([0, before]);
  if (whole.state === "finished" && known(after)) ends.push([last, after]);
  const curve = new Map([...between, ...ends]);
  const points = [...curve].sort(([a], [b]) => a - b);
  return { between: points.length > 1 ? points : [], ends };
}

/** The model that a run was tuned from, for talking to both. */
const modelOf = (r) => r.methods.model ?? "toy:lm";

// -------------------------------------------------------------------------------------------------- numbers

/** Metrics before and after; the parts of a metric, such as retention by task, in a table of their own. */
function table(whole, finished, unfolded = false) {
  const rows = whole.numbers;
  if (!rows.length) return null;
  const metrics = rows.filter((x) => !x.name.includes("/")), parts = rows.filter((x) => x.name.includes("/"));
  const short = (x) => ({ ...x, label: x.name.replace(/^[^/]*\//, "") });
  return h("section", {}, h("h2", {}, finished ? "Evaluation: before and after" : "Evaluation: before and now"),
    h("p", { class: "note" }, onWhich(whole)),
    beforeAfter("metric", metrics, finished),
    parts.length > 0 && h("details", { open: unfolded }, h("summary", {}, `By task (${parts.length})`), beforeAfter(parts[0].label.split(": ")[0], parts.map(short), finished)));
}

/** Which rows metrics were measured on, so that nobody takes training rows for held-out ones. */
function onWhich(whole) {
  const n = whole.stats.held_out_rows, others = whole.numbers.some((x) => x.name.startsWith("retention"));
  const counts = `${others ? " Retention is measured on rows of other tasks." : ""}${whole.row_counts ? ` ${whole.row_counts}.` : ""}`;
  if (whole.measured_on === "training rows") return [h("b", { class: "warn" }, "Measured on training rows: no rows were held out."), counts];
  if (whole.measured_on === "held-out rows") return `Measured on ${n ? `${n.toLocaleString("en")} ` : ""}held-out rows, which were not trained on.${counts}`;
  return "";
}

function beforeAfter(title, rows, finished) {
  const judged = (x) => x.better === true ? ["good", "better"] : x.better === false ? ["bad", "worse"] : ["", ""];
  return h("table", { class: "numbers" },
    h("thead", {}, h("tr", {}, [title, "before", finished ? "after" : "now", "change"].map((t) => h("th", { scope: "col" }, t)))),
    h("tbody", {}, rows.map((x) => {
      const [kind, word] = judged(x);
      return h("tr", {}, h("th", { scope: "row" }, x.label), h("td", {}, x.before), h("td", {}, x.after), h("td", { class: kind }, x.change, word && h("span", { class: "hidden" }, ` (${word})`)));
    })));
}

// -------------------------------------------------------------------------------------------------- tags, removal

function labelling(at, whole, problems, reload) {
  const tag = h("input", { type: "text", value: whole.tags.join(", "), autocomplete: "off", spellcheck: "false", placeholder: "baseline, try again" });
  const note = h("textarea", { rows: 3, placeholder: "What was tried, and why" });
  note.value = whole.note;
  return h("div", { class: "work" }, h("div", { class: "fields two" }, field("Tags", tag, "Several with commas between"), field("Note", note)),
    h("p", { class: "buttons" }, button("Save tags and note", async () => {
      await ask(`${at}/labels`, { tags: tag.value.split(","), note: note.value });
      announce("saved");
      await reload();
    }, problems, { class: "quiet" })));
}

function removing(at, name, problems) {
  let sure = false;
  const element = button("Remove", async () => {
    if (!sure) {
      sure = true;
      element.textContent = `Really remove runs/${name}?`;
      setTimeout(() => { sure = false; element.textContent = "Remove"; }, 5000);
      return;
    }
    await ask(`${at}/remove`, {});
    announce(`${name} removed`);
    location.hash = "#runs";
  }, problems, { class: "quiet danger" });
  return element;
}
