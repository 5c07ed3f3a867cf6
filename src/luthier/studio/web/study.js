// What a comparison or a search came to: paired differences as the picture, then metrics with intervals, maps of trade-offs, and
// of a search every configuration.

import { h } from "./dom.js";
import { scatter } from "./charts.js";
import { forests } from "./forest.js";

/** study: as `/api/runs/NAME` gives it. */
export function studyPage(study) {
  const colours = Object.fromEntries((study.arms ?? []).map((arm) => [arm.name, arm.colour]));
  return [
    h("dl", { class: "tiles" }, study.about.map(([what, value]) => h("div", {}, h("dt", {}, what), h("dd", {}, value)))),
    study.pairs && forests(study.pairs),
    study.metrics && metricsTable(study, colours),
    study.maps.length > 0 && h("section", {}, h("h2", {}, study.kind === "search" ? "Configurations" : "Trade-offs"), study.arms && legend(study.arms), h("div", { class: "maps" }, study.maps.map(map))),
    study.trials && trialsTable(study),
    study.arms && h("section", {}, h("h2", {}, "Arms"), h("ul", { class: "arms" }, study.arms.map((arm) => h("li", {}, swatch(arm.colour), h("b", {}, arm.name), arm.stopped ? h("span", { class: "warn" }, ` left out: ${arm.stopped}`) : h("span", { class: "note" }, ` ${arm.runs.length} ${arm.runs.length === 1 ? "run" : "runs"}: ${arm.runs.join(", ")}`))))),
    study.commands?.length > 0 && h("section", {}, h("h2", {}, "What was found"), study.commands.map((c) => h("p", {}, h("b", {}, c.setting), h("code", { class: "block" }, c.text)))),
  ];
}

const swatch = (colour) => h("span", { class: `swatch ${colour}`, "aria-hidden": "true" });
const legend = (arms) => h("p", { class: "key" }, arms.map((arm) => h("span", {}, swatch(arm.colour), arm.name)));

function metricsTable(study, colours) {
  const best = new Set(study.arms.filter((arm) => arm.best).map((arm) => arm.name));
  return h("section", {}, h("h2", {}, "Metrics"),
    h("p", { class: "note" }, "Means over seeds with 95% intervals. Bold: the best, where it differs from another arm by more than chance. ★: no other arm is better in everything."),
    h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Metrics by arm" }, h("table", { class: "numbers" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "metric"), h("th", { scope: "col" }, "untuned"), study.finished.map((name) => h("th", { scope: "col" }, swatch(colours[name]), name, best.has(name) ? " ★" : "")))),
      h("tbody", {}, study.metrics.map((row) => h("tr", {}, h("th", { scope: "row" }, row.label), h("td", {}, row.before), row.cells.map((cell) => h("td", {}, cell.best ? h("b", {}, cell.mean) : cell.mean, cell.low && h("small", {}, `${cell.low} to ${cell.high}`)))))))));
}

function map(figure) {
  const plot = h("div", { class: "plot" });
  scatter(plot, figure.spec);
  return h("figure", {}, h("figcaption", {}, figure.caption), plot);
}

function trialsTable(study) {
  return h("section", {}, h("details", {}, h("summary", {}, `Every configuration (${study.trials.length})`),
    h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Every configuration" }, h("table", { class: "numbers" },
      h("thead", {}, h("tr", {}, ["configuration", "", ...study.goals, "share of a run", "seconds"].map((t) => h("th", { scope: "col" }, t)))),
      h("tbody", {}, study.trials.map((t) => h("tr", {}, h("th", { scope: "row" }, t.setting), h("td", {}, t.chosen ? "★" : t.failed), t.goals.map((g) => h("td", {}, g)), h("td", {}, t.share), h("td", {}, t.seconds))))))));
}
