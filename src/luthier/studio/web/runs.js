// All runs of this place as a table that is sorted, filtered and picked from; the curves of some of them; comparing their recipes.

import { announce, ask, button, complaint, count, dialog, every, field, fill, h, tabStore } from "./dom.js";
import { allColumns, defaultColumns, matches, sorted } from "./columns.js";
import { overlay } from "./overlay.js";

const STATES = ["running", "starting", "finished", "stopped", "failed"];
const GROUPS = { recipe: "Recipe", metric: "Metrics", cost: "Cost" };

export async function runs(rest, signal) {
  const chosen = new Set(rest.split(",").filter(Boolean)), problems = complaint();
  const view = tabStore.get("runs", { sort: "changed", down: true, columns: null, filter: "", state: "" });
  const find = (name) => all.find((r) => r.name === name);
  const over = overlay(() => [...chosen].filter((name) => find(name)?.kind === "run"), (name) => find(name)?.measured_on || "evaluated", signal);
  const head = h("tr"), body = h("tbody"), bulk = h("div", { class: "bulk", role: "group", "aria-label": "What to do with the chosen runs" });
  const states = h("div", { class: "chips", role: "group", "aria-label": "State" }), empty = h("div"), total = h("span", { class: "note" });
  const filter = h("input", { type: "search", value: view.filter, placeholder: "Filter: words, tuner:lora, tag:best, loss<2", "aria-label": "Filter runs", autocomplete: "off", spellcheck: "false", oninput: () => change({ filter: filter.value }) });
  let all = await ask("/api/runs"), before = "";

  function change(values) {
    Object.assign(view, values);
    tabStore.set("runs", view);
    show();
  }

  function keepAddress() {
    history.replaceState(null, "", `#runs${chosen.size ? "/" : ""}${[...chosen].map(encodeURIComponent)}`); // a reload finds them again
  }

  function choose(names, on) {
    for (const name of names) on ? chosen.add(name) : chosen.delete(name);
    keepAddress();
    show();
    over.show().catch((error) => { if (error.name !== "AbortError") problems.say(error.message); });
  }

  function show() {
    const columns = allColumns(all), picked = view.columns ?? defaultColumns(columns);
    const shown = columns.filter((c) => picked.includes(c.key));
    const named = { key: "name", title: "name", value: (r) => r.name };
    const state = { key: "state", title: "state", value: (r) => STATES.indexOf(r.state) };
    const by = [named, state, ...columns].find((c) => c.key === view.sort) ?? columns.find((c) => c.key === "changed");
    const fitting = all.filter((r) => (!view.state || r.state === view.state) && matches(r, view.filter, columns));
    const rows = sorted(fitting, by, view.down);
    const mark = JSON.stringify([rows, shown.map((c) => c.key), view, [...chosen]]);
    if (mark === before) return;
    before = mark;
    const focused = document.activeElement?.dataset?.run ?? document.activeElement?.dataset?.sort;
    const allChosen = rows.length > 0 && rows.every((r) => chosen.has(r.name));
    fill(head,
      h("th", { class: "tick", scope: "col" }, h("input", { type: "checkbox", "aria-label": "Choose all that are shown", checked: allChosen, disabled: !rows.length, onchange: (e) => choose(rows.map((r) => r.name), e.target.checked) })),
      [named, state, ...shown].map((c) => header(c, view, change)));
    fill(body, rows.map((r) => row(r, shown, chosen, choose)));
    fill(states, chip("All", "", all.length, view, change), STATES.map((s) => [s, all.filter((r) => r.state === s).length]).filter(([s, n]) => n || view.state === s).map(([s, n]) => chip(s, s, n, view, change)));
    fill(total, rows.length < all.length ? `${count(rows.length)} of ${count(all.length)} runs` : "");
    fill(empty, !rows.length && h("p", { class: "empty" }, all.length ? "No run matches the filter." : ["No run yet. ", h("a", { href: "#new" }, "Start one"), ": the built-in models and rows need no network."]));
    fill(bulk, chosen.size ? bulkActions(all.filter((r) => chosen.has(r.name)), choose, refresh, problems) : null);
    bulk.hidden = chosen.size === 0;
    if (focused) document.querySelector(`[data-run="${CSS.escape(focused)}"], [data-sort="${CSS.escape(focused)}"]`)?.focus();
  }

  async function refresh() {
    all = await ask("/api/runs", undefined, { signal });
    for (const name of [...chosen]) if (!all.some((r) => r.name === name)) chosen.delete(name);
    show();
  }

  for (const name of [...chosen]) if (!all.some((r) => r.name === name)) chosen.delete(name);
  show();
  every(2.5, signal, async () => {
    try {
      await refresh();
      await over.show();
      problems.say("");
    } catch (error) { if (error.name !== "AbortError") problems.say(error.message); }
    return true;
  });
  return [
    h("header", { class: "bar" }, h("h1", {}, "Runs"), h("a", { class: "button main", href: "#new" }, "New run")),
    h("div", { class: "tools" }, filter, states, h("button", { type: "button", class: "quiet", onclick: () => pickColumns(allColumns(all), view, change) }, "Columns"), total),
    problems.box, bulk,
    h("div", { class: "wide grid", tabindex: "0", role: "region", "aria-label": "Runs" }, h("table", { class: "runs" }, h("caption", { class: "hidden" }, "Runs"), h("thead", {}, head), body)), empty, over.box,
  ];
}

function header(column, view, change) {
  const sort = view.sort === column.key ? (view.down ? "descending" : "ascending") : null;
  const press = () => change(view.sort === column.key ? { down: !view.down } : { sort: column.key, down: Boolean(column.numeric) });
  return h("th", { scope: "col", class: column.numeric ? "number" : column.key, "aria-sort": sort },
    h("button", { type: "button", class: "sort", "data-sort": column.key, onclick: press }, column.title, h("span", { "aria-hidden": "true" }, sort === "descending" ? " ↓" : sort === "ascending" ? " ↑" : "")));
}

function chip(word, state, n, view, change) {
  return h("button", { type: "button", class: `chip ${state}`, "aria-pressed": String(view.state === state), onclick: () => change({ state }) }, word, h("span", {}, ` ${n}`));
}

function row(r, columns, chosen, choose) {
  const tick = h("input", { type: "checkbox", "data-run": r.name, "aria-label": `Choose ${r.name}`, checked: chosen.has(r.name), onchange: (e) => choose([r.name], e.target.checked) });
  return h("tr", { class: chosen.has(r.name) ? "picked" : false },
    h("td", { class: "tick" }, tick),
    h("th", { scope: "row", class: "name" }, h("a", { href: `#run/${encodeURIComponent(r.name)}` }, r.name), tags(r.tags)),
    h("td", { class: "state" }, badge(r), progress(r), r.state === "failed" && h("span", { class: "clip why", title: r.why }, r.why)),
    columns.map((c) => h("td", { class: c.numeric ? "number" : c.key }, c.cell(r))));
}

export function tags(list) {
  if (!list.length) return null;
  return h("span", { class: "tags" }, list.map((tag) => h("span", { class: "tag" }, tag)));
}

export function badge(r) {
  return h("span", { class: `badge ${r.state}` }, r.state);
}

/** How far a run is, by its own clock. */
export function progress(r) {
  const busy = r.state === "running" || r.state === "starting";
  if (!busy) return null;
  const unit = r.counted === "step" ? "step" : `${r.counted}s:`;
  return h("span", { class: "steps" },
    r.steps ? h("progress", { max: r.steps, value: r.step, "aria-label": `Steps of ${r.name}` }) : null,
    r.steps ? h("span", { class: "count" }, `${r.act ? `${r.act}, ` : ""}${unit} ${count(r.step)} of ${count(r.steps)}`) : null,
    r.doing && h("span", { class: "doing" }, r.doing));
}

// ------------------------------------------------------------------------------------------------ what is done with several

function bulkActions(some, choose, refresh, problems) {
  const names = some.map((r) => r.name), busy = some.filter((r) => r.state === "running" || r.state === "starting");
  const recipes = some.filter((r) => r.kind === "run");
  const each = async (list, path, body = {}) => { for (const name of list) await ask(`/api/runs/${encodeURIComponent(name)}/${path}`, body); };
  return [
    h("b", {}, `${some.length} chosen`),
    recipes.length > 1 && h("button", { type: "button", class: "main", onclick: () => comparing(recipes.map((r) => r.name)) }, "Compare on the same seeds"),
    h("button", { type: "button", class: "quiet", onclick: () => tagging(some, refresh) }, "Tag"),
    busy.length > 0 && button(`Stop ${busy.length > 1 ? busy.length : ""}`.trim(), async () => { await each(busy.map((r) => r.name), "stop"); announce("stopping"); await refresh(); }, problems, { class: "quiet" }),
    h("button", { type: "button", class: "quiet danger", disabled: busy.length > 0, title: busy.length ? "Stop what runs first" : null, onclick: () => removing(names, each, refresh) }, "Remove"),
    h("button", { type: "button", class: "quiet", onclick: () => choose(names, false) }, "Choose none"),
  ];
}

function tagging(some, refresh) {
  const problems = complaint(), names = [...new Set(some.flatMap((r) => r.tags))];
  const input = h("input", { type: "text", autocomplete: "off", spellcheck: "false", placeholder: "baseline, try again" });
  const set = async (change) => {
    for (const r of some) await ask(`/api/runs/${encodeURIComponent(r.name)}/labels`, { tags: change(r.tags), note: r.note });
    await refresh();
    box.close();
  };
  const add = button("Add", () => set((tags) => [...tags, ...input.value.split(",")]), problems, { class: "main" });
  input.addEventListener("keydown", (e) => { if (e.key === "Enter") add.click(); });
  const box = dialog(`Tags of ${some.length === 1 ? some[0].name : `${some.length} runs`}`, h("div", {}, field("Add", input, "Several with commas between"), h("p", { class: "buttons" }, add),
    names.length > 0 && h("p", { class: "buttons" }, h("span", { class: "note" }, "Take off:"), names.map((tag) => button(`${tag} ×`, () => set((tags) => tags.filter((t) => t !== tag)), problems, { class: "quiet small" }))), problems.box), { class: "narrow" });
  input.focus();
}

function removing(names, each, refresh) {
  const problems = complaint();
  const box = dialog(names.length === 1 ? `Remove ${names[0]}?` : `Remove ${names.length} runs?`, h("div", {},
    h("p", {}, "Their folders are deleted, with weights, checkpoints and reports: "), h("p", { class: "note" }, names.map((n) => `runs/${n}`).join(", ")),
    h("p", { class: "buttons" }, button("Remove for good", async () => { await each(names, "remove"); announce(`${names.length} removed`); await refresh(); box.close(); }, problems, { class: "danger" }),
      h("button", { type: "button", class: "quiet", onclick: () => box.close() }, "Keep")), problems.box), { class: "narrow" });
}

function pickColumns(all, view, change) {
  const picked = new Set(view.columns ?? defaultColumns(all));
  const box = (c) => {
    const id = `col-${c.key}`;
    return h("p", { class: "check" }, h("input", { type: "checkbox", id, checked: picked.has(c.key), onchange: (e) => { e.target.checked ? picked.add(c.key) : picked.delete(c.key); change({ columns: [...picked] }); } }), h("label", { for: id }, c.title));
  };
  const shown = dialog("Columns", h("div", {}, h("div", { class: "groups" }, Object.entries(GROUPS).map(([group, title]) => {
    const some = all.filter((c) => c.group === group);
    return some.length ? h("fieldset", {}, h("legend", {}, title), some.map(box)) : null;
  })), h("p", { class: "buttons" }, h("button", { type: "button", class: "quiet", onclick: () => { change({ columns: null }); shown.close(); } }, "As at first"), h("button", { type: "button", class: "main", onclick: () => shown.close() }, "Done"))));
}

function comparing(names) {
  const problems = complaint();
  const name = h("input", { type: "text", value: `compare-${new Date().toISOString().slice(0, 10)}`, autocomplete: "off", spellcheck: "false" });
  const seeds = h("input", { type: "number", min: 1, value: 3 });
  const budget = h("input", { type: "text", placeholder: "as the recipes say" }), metric = h("input", { type: "text", placeholder: "loss" });
  const box = dialog(`Compare ${names.join(" and ")}`, h("div", {},
    h("p", { class: "note" }, "Each recipe is trained again on the same rows with the same seeds, so that differences come with intervals. This is `luthier compare`."),
    h("div", { class: "fields" }, field("Name", name, "Its folder: runs/NAME"), field("Seeds", seeds, "Runs of each recipe; one seed says little"), field("Budget of each run", budget, "A time (30m), steps (500 steps) or tokens (200k tokens)"), field("Metric", metric, "Ranks the runs")),
    h("p", { class: "buttons" }, button("Compare them", async () => {
      await ask("/api/compare", { name: name.value, runs: names, seeds: Number(seeds.value) || 1, budget: budget.value, metric: metric.value || "loss" });
      announce(`comparison ${name.value} started`);
      box.close();
      location.hash = `#run/${encodeURIComponent(name.value)}`;
    }, problems, { class: "main" })), problems.box));
}
