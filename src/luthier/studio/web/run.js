// One run: how far it is, its curves while they grow, its answers, its recipe, and what can be done with it.

import { announce, ask, button, complaint, every, field, fill, h, shell } from "./dom.js";
import { curves as drawCurves } from "./charts.js";
import { positive, series, smoothed } from "./curves.js";
import { clone } from "./new.js";
import { badge, progress } from "./runs.js";

const PLAIN = ["step", "loss", "learning_rate", "tokens", "seconds", "epoch", "eval_loss"]; // of a log line; the rest gets small charts

export async function run(name, signal) {
  const at = `/api/runs/${encodeURIComponent(name)}`;
  let whole = await ask(at);
  const logged = [], place = { since: 0, mark: "" };
  const head = h("div", { class: "state" }), curves = h("div"), numbers = h("div"), answers = h("div"), more = h("div"), log = h("pre", { class: "log", tabindex: "0", "aria-label": "Console output" });
  const problems = complaint();
  let state = "", drawn = 0, quarter = 0;

  const actions = h("p", { class: "buttons" });
  function act(r) {
    const busy = r.state === "running" || r.state === "starting";
    const reload = async () => { whole = await ask(at); show(); };
    fill(actions,
      busy && button("Stop", async () => { await ask(`${at}/stop`, {}); announce("stopping"); }, problems),
      !busy && r.state !== "finished" && button("Resume", async () => { await ask(`${at}/resume`, {}); place.mark = "?"; await reload(); live(); }, problems, { class: "main" }),
      r.kind === "run" && whole.recipe && button("Clone with changes", () => clone(whole.recipe), problems, { class: "quiet" }),
      r.report && h("a", { class: "button quiet", href: `/runs/${encodeURIComponent(name)}/report.html`, target: "_blank" }, "Report"),
      r.state === "finished" && r.kind === "run" && whole.writes && h("a", { class: "button quiet", href: `#talk/${encodeURIComponent(JSON.stringify([modelOf(whole.recipe), `runs/${name}`]))}` }, "Chat with it"),
      !busy && removing(at, name, problems));
  }

  function top(r) {
    fill(head, badge(r), progress(r), r.doing && h("span", { class: "doing" }, r.doing), r.why && h("p", { class: r.state === "failed" ? "complaint" : "note" }, r.why));
    if (r.state !== state) {
      if (state) announce(`${name} is ${r.state}`);
      state = r.state;
      act(r);
    } else if (r.state === "running" && r.steps && Math.floor(4 * r.step / r.steps) !== quarter) {
      quarter = Math.floor(4 * r.step / r.steps);
      announce(`${name}: step ${r.step} of ${r.steps}`);
    }
  }

  function show() {
    top(whole);
    act(whole);
    fill(numbers, whole.sentence && h("p", { class: "sentence" }, whole.sentence), whole.cost.length > 0 && h("dl", { class: "tiles" }, whole.cost.map(([what, much]) => h("div", {}, h("dt", {}, what), h("dd", {}, much)))), table(whole.numbers, whole.state === "finished", numbers.querySelector("details")?.open));
    fill(answers, generationsSection(whole.answers, whole.state === "finished"));
    log.textContent = whole.log;
    fill(more, whole.notes.length > 0 && h("section", {}, h("h2", {}, "Warnings and notes"), h("ul", {}, whole.notes.map((n) => h("li", {}, n)))),
      Object.keys(whole.arms).length > 0 && h("section", {}, h("h2", {}, "Arms"), h("p", { class: "note" }, "The report shows their curves, answers and recipes side by side.")),
      whole.state === "finished" && whole.kind === "run" && exporting(at, name, whole));
  }

  const charts = new Map(); // key -> chart, which grows where it stands
  const smalls = h("div", { class: "smalls" }), loss = h("div", { class: "plot" });
  function grow(key, caption, box, spec) {
    if (charts.has(key)) charts.get(key).update(spec);
    else charts.set(key, drawCurves(box, { label: `${caption} by step`, ...spec }));
  }

  function draw() {
    if (logged.length === drawn) return;
    drawn = logged.length;
    const raw = series(logged, "loss"), heldOut = series(logged, "eval_loss");
    const extra = [...new Set(logged.flatMap((x) => Object.keys(x)))].filter((k) => !PLAIN.includes(k) && !k.includes("/"));
    const names = ["learning_rate", ...extra].filter((k) => series(logged, k).length > 0).slice(0, 12);
    if (!raw.length && !names.length) return;
    if (!curves.firstChild) fill(curves, h("section", {}, h("h2", {}, "Training"), h("figure", {}, h("figcaption", {}, "loss by step"), loss), smalls));
    if (raw.length) grow("loss", "loss", loss, { zero: true, log: positive(raw, heldOut), series: [
      { name: "each step", colour: "raw", width: 1, points: raw }, { name: "smoothed", colour: "wood", points: smoothed(raw) }, { name: whole.measured_on, colour: "held", points: heldOut }].filter((one) => one.points.length) });
    for (const key of names) {
      const metric = whole.numbers.find((x) => `eval_${x.name}` === key);
      const caption = metric ? `eval ${metric.label}` : key.replaceAll("_", " ");
      const box = h("div", { class: "plot" });
      if (!charts.has(key)) smalls.append(h("figure", {}, h("figcaption", {}, caption), box));
      grow(key, caption, box, { height: 150, series: [{ name: caption, colour: "wood", points: series(logged, key) }] });
    }
  }

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
    const over = !["running", "starting"].includes(result.run.state);
    if (over !== !["running", "starting"].includes(was) || !over) {
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
  return [
    h("header", {}, h("p", { class: "what" }, whole.what), h("h1", {}, name)),
    head, actions, problems.box, numbers, curves, answers, more,
    h("section", {}, h("h2", {}, "Recipe"), whole.command && h("p", { class: "note" }, "From a shell: ", h("code", {}, whole.command)), h("pre", { class: "recipe", tabindex: "0", "aria-label": "The recipe" }, whole.recipe)),
    h("section", {}, h("details", {}, h("summary", {}, "Console output"), log)),
  ];
}

/** The model a recipe starts from, for talking to both. */
function modelOf(text) {
  return /^model: *(.+?) *$/m.exec(text)?.[1].replace(/^['"]|['"]$/g, "") ?? "toy:lm";
}

/** Metrics before and after; the parts of a metric, such as retention by task, in a table of their own. */
function table(rows, finished, unfolded = false) {
  if (!rows.length) return null;
  const whole = rows.filter((x) => !x.name.includes("/")), parts = rows.filter((x) => x.name.includes("/"));
  const short = (x) => ({ ...x, label: x.name.replace(/^[^/]*\//, "") });
  return h("section", {}, h("h2", {}, finished ? "Evaluation: before and after" : "Evaluation: before and now"),
    beforeAfter("metric", whole, finished),
    parts.length > 0 && h("details", { open: unfolded }, h("summary", {}, `By task (${parts.length})`), beforeAfter(parts[0].label.split(": ")[0], parts.map(short), finished)));
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

function generationsSection(answers, finished) {
  if (!answers.length) return null;
  const mark = (score) => score === null || score === undefined ? null : h("b", { class: score > 0 ? "good" : "bad" }, score === 1 ? " correct" : score === 0 ? " wrong" : ` ${score.toFixed(2)}`);
  const part = (title, text, score) => text !== null && text !== undefined && h("div", {}, h("h3", {}, title, mark(score)), h("pre", {}, text || " "));
  return h("section", {}, h("h2", {}, "Generations"), answers.slice(0, 12).map((a) => h("article", {}, h("h3", {}, "prompt"), h("pre", {}, a.prompt),
    h("div", { class: "sides" }, part("before", a.before, a.score_before), part(finished ? "after" : "now", a.after, a.score_after), part("reference", a.expected)))));
}

function exporting(at, name, whole) {
  const problems = complaint();
  const kind = h("select", {}, h("option", { value: "lora" }, "an adapter for plain PEFT"), h("option", { value: "merged" }, "a plain transformers model"));
  const to = h("input", { type: "text", placeholder: "", autocomplete: "off", spellcheck: "false" });
  const command = h("code");
  const say = () => {
    to.placeholder = `exports/${name}-${kind.value}`;
    command.textContent = shell("luthier", "export", `runs/${name}`, "--output-dir", to.value || to.placeholder, "--as", kind.value);
  };
  for (const one of [kind, to]) one.addEventListener("input", say);
  say();
  const done = h("ul", { class: "told" }, whole.exports.map((x) => h("li", {}, x)));
  return h("section", { class: "work" }, h("h2", {}, "Export"), h("p", { class: "note" }, "The export is loaded back and compared with the tuned model; it is deleted where its outputs differ."),
    h("div", { class: "fields" }, field("As", kind), field("To", to, "A folder on this machine")),
    h("p", { class: "buttons" }, button("Export", async (b) => {
      b.textContent = "Exporting …";
      try {
        const exported = await ask(`${at}/export`, { kind: kind.value, to: to.value });
        done.append(h("li", { class: "good" }, exported.message));
        announce(`exported: ${exported.message}`);
      } finally { b.textContent = "Export"; }
    }, problems)), problems.box, done, h("p", { class: "note" }, "From a shell: ", command));
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
