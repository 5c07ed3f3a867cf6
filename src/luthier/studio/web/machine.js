// How busy this machine is: two small meters in the bar on top, and the whole of it where one asks.

import { ask, bytes, dialog, every, fill, h, svg } from "./dom.js";

const KEPT = 90; // readings that are drawn
const history = { cpu: [], memory: [], gpus: [] };
let latest = null;

const share = (part, whole) => (whole ? Math.min(100, (100 * part) / whole) : 0);

/** The meters, for as long as the page is open. */
export function meters(place) {
  const button = h("button", { type: "button", class: "meters", "aria-label": "This machine", onclick: open });
  place.append(button);
  every(4, new AbortController().signal, async () => {
    latest = await ask("/api/machine");
    note(history.cpu, latest.cpu);
    note(history.memory, share(latest.memory.used, latest.memory.total));
    latest.gpus.forEach((gpu, i) => note((history.gpus[i] ??= []), share(gpu.used, gpu.total)));
    fill(button, latest.gpus.map((gpu, i) => meter(`GPU${latest.gpus.length > 1 ? ` ${i}` : ""}`, share(gpu.used, gpu.total))),
      meter("CPU", latest.cpu), meter("Memory", share(latest.memory.used, latest.memory.total)));
    return true;
  });
}

function note(list, value) {
  list.push(value);
  if (list.length > KEPT) list.shift();
}

function meter(name, percent) {
  const text = `${Math.round(percent)}%`;
  return h("span", { class: "meter", title: `${name} ${text}` }, h("span", {}, name), bar(percent), h("span", { class: "value" }, text));
}

function bar(percent) {
  return svg("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { width: 100, height: 10, class: "ground" }), svg("rect", { width: Math.max(0, percent), height: 10, class: "filled" }));
}

function open() {
  if (!latest) return;
  const body = h("div", { class: "machine" });
  const box = dialog("This machine", body, { class: "narrow" });
  const closing = new AbortController();
  box.addEventListener("close", () => closing.abort());
  const show = () => fill(body,
    latest.gpus.map((gpu, i) => [
      row(gpu.name, `${bytes(gpu.used)} of ${bytes(gpu.total)}${gpu.busy === null ? "" : `, busy ${Math.round(gpu.busy)}%`}${gpu.heat === null ? "" : `, ${Math.round(gpu.heat)} °C`}`, history.gpus[i] ?? []),
    ]),
    row("Memory", `${bytes(latest.memory.used)} of ${bytes(latest.memory.total)}`, history.memory),
    row("Processor", `${Math.round(latest.cpu)}% of ${latest.cores} cores`, history.cpu),
    !latest.gpus.length && h("p", { class: "note" }, "nvidia-smi names no GPU here."));
  show();
  every(2, closing.signal, async () => { show(); return true; });
}

function row(name, text, values) {
  const step = 100 / (KEPT - 1), first = KEPT - values.length;
  const line = values.map((v, i) => `${((first + i) * step).toFixed(2)},${(30 - 0.3 * v).toFixed(2)}`).join(" ");
  return h("div", { class: "gauge" }, h("h3", {}, name), h("p", {}, text),
    svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", role: "img", "aria-label": `${name} over the last minutes` },
      svg("rect", { width: 100, height: 30, class: "ground" }),
      values.length > 1 && svg("polyline", { points: line, class: "line", "vector-effect": "non-scaling-stroke" })));
}
