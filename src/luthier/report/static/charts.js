// Charts of reports and of the studio, drawn by uPlot (a global of its own script) in the colours of theme.css.
// Hover shows values, a drag zooms, a double click shows everything again, a click on the legend hides a curve.

const REACH = 24; // pixels around a point in which it is hovered
const PAPER = 660; // pixels: the width of a chart on paper
const FEW = 20; // points of a curve that are drawn as such
const DASH = [6, 4];
const EMPTY = [null, null]; // the range of a scale before there is data
const mounted = new Set(); // charts of this page, to be drawn again in other colours

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Curves. spec: {label, x, zero, log, height, series: [{name, colour, dash, width, marks, points: [[x, y], ...]}]}; colour: of theme.css;
    marks: large points and no line. */
export function curves(box, spec) {
  return mount(box, spec, curveOptions, curveData(spec.series));
}

/** Points of a map. spec: {x: {label, percent}, y: {label, percent}, height, path: [[x, y], ...],
    points: [{text, colour, shape, hollow, x, y, low, high, link}]}. */
export function scatter(box, spec) {
  const points = [...spec.points].sort((a, b) => a.x - b.x);
  return mount(box, { ...spec, points }, scatterOptions, [points.map((p) => p.x), points.map((p) => p.y)]);
}

function mount(box, spec, options, data) {
  let chart = null;
  let logarithmic = false;
  const draw = (width) => {
    chart?.destroy();
    chart = new uPlot(options(spec, width, logarithmic && spec.log, box), data, box);
    chart.batch(() => {}); // drawn at once: a page that is printed does not wait
    describe(chart, spec);
  };
  const item = {
    draw: (widest = Infinity) => box.clientWidth > 0 && draw(Math.min(box.clientWidth, widest)),
    gone: () => !box.isConnected && chart !== null,
    end: () => { watch.disconnect(); chart?.destroy(); mounted.delete(item); },
    /** More points of the same curves, where what is zoomed or hidden stays so; or other curves. */
    update: (changes) => {
      const names = (series) => JSON.stringify(series.map((one) => one.name));
      const same = names(spec.series) === names(changes.series);
      spec = { ...spec, ...changes };
      data = curveData(spec.series);
      if (!chart) return;
      if (!same) {
        item.draw();
        return;
      }
      const { min, max } = chart.scales.x;
      chart.setData(data, !chart.zoomed);
      if (chart.zoomed) chart.setScale("x", { min, max });
      describe(chart, spec);
    },
  };
  if (spec.log) {
    box.append(scaleButtons((log) => { logarithmic = log; item.draw(); }));
  }
  const watch = new ResizeObserver(() => {
    if (item.gone()) item.end();
    else if (!chart) item.draw();
    else if (box.clientWidth > 0 && box.clientWidth !== chart.width) chart.setSize({ width: box.clientWidth, height: chart.height });
  });
  watch.observe(box);
  mounted.add(item);
  return item;
}

/** What a screen reader says of a chart. */
function describe(chart, spec) {
  const last = ({ name, points }) => (points.length ? [`${name} ${format(points.at(-1)[1])}`] : []);
  let text = `${spec.y?.label} by ${spec.x?.label}, ${spec.points?.length} points`;
  if (spec.series) text = `${spec.label}; at ${spec.x ?? "step"} ${chart.data[0].at(-1)}: ${spec.series.flatMap(last).join(", ")}`;
  chart.ctx.canvas.setAttribute("role", "img");
  chart.ctx.canvas.setAttribute("aria-label", text);
}

function scaleButtons(choose) {
  const row = document.createElement("p");
  row.className = "scale";
  for (const name of ["linear", "log"]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.setAttribute("aria-pressed", String(name === "linear"));
    button.addEventListener("click", () => {
      for (const other of row.children) other.setAttribute("aria-pressed", String(other === button));
      choose(name === "log");
    });
    row.append(button);
  }
  return row;
}

function redrawAll(widest) {
  for (const item of [...mounted]) {
    if (item.gone()) item.end();
    else item.draw(widest);
  }
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redrawAll(Infinity));
matchMedia("print").addEventListener("change", (event) => redrawAll(event.matches ? PAPER : Infinity));

// ------------------------------------------------------------------------------------------------ axes

/** A number as people read it: 0.25, 1,234, 1.5e-4. */
export function format(y) {
  if (y === null || y === undefined || !Number.isFinite(y)) return "";
  const size = Math.abs(y);
  if (size !== 0 && size < 1e-3) return Number(y.toPrecision(3)).toExponential().replace("e-", "e-");
  if (size >= 1e6) return `${Number((y / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((y / 1e3).toPrecision(3))}K`;
  return Number(y.toPrecision(size >= 1000 ? 4 : 3)).toLocaleString("en", { maximumFractionDigits: 6 });
}

const WHOLE = [1, 2, 5].flatMap((m) => Array.from({ length: 9 }, (_, e) => m * 10 ** e)).sort((a, b) => a - b);

function axis(more) {
  return {
    stroke: css("soft"),
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    grid: { stroke: css("line"), width: 1 },
    ticks: { show: false },
    gap: 6,
    values: ticks,
    ...more,
  };
}

/** Labels of an axis, with as many digits as their distance needs. */
function ticks(u, splits, index, space, step, percent = false) {
  const scale = percent ? 100 : 1;
  const digits = Math.max(0, Math.min(6, Math.ceil(-Math.log10(scale * step) - 1e-9) + (/[1-9]5/.test(String(step)) ? 1 : 0)));
  return splits.map((v) => {
    if (v === null || v === undefined) return "";
    if (v !== 0 && step < 1e-4 && !percent) return format(v);
    if (Math.abs(v) >= 1e4) return format(v);
    return (scale * v).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) + (percent ? "%" : "");
  });
}

/** As wide as its longest label. */
function labelWidth(u, values) {
  const longest = Math.max(0, ...(values ?? []).map((v) => v.length));
  return Math.max(36, longest * 7 + 14);
}

// ------------------------------------------------------------------------------------------------ curves

function curveData(series) {
  const tables = series.map(({ points }) => [points.map((p) => p[0]), points.map((p) => p[1])]);
  return tables.length === 1 ? tables[0] : uPlot.join(tables);
}

function curveOptions(spec, width, logarithmic) {
  const across = (u, low, high) => {
    if (low === null) return EMPTY;
    u.zoomed = low > u.data[0][0] || high < u.data[0].at(-1);
    return low === high ? [low - 1, high + 1] : [low, high];
  };
  const linear = (u, low, high) => {
    if (low === null) return EMPTY;
    const [bottom, top] = uPlot.rangeNum(low, high, 0.08, true);
    return [spec.zero && !u.zoomed ? Math.min(0, low) : bottom, top];
  };
  return {
    width,
    height: spec.height ?? 240,
    scales: {
      x: { time: false, range: across },
      y: logarithmic ? { distr: 3, range: (u, low, high) => (low === null ? EMPTY : [low / 1.2, high * 1.2]) } : { range: linear },
    },
    axes: [axis({ incrs: WHOLE, size: 28, space: 60 }), axis({ size: labelWidth, space: 34 })],
    series: [{ label: spec.x ?? "step", value: lastValue }, ...spec.series.map((one) => curve(one, spec.series.length === 1))],
    cursor: { hover: { skip: [null, undefined] }, points: { size: 7 }, y: false },
    legend: { markers: { width: 3, stroke: (u, i) => `var(--${spec.series[i - 1]?.colour})`, dash: (u, i) => (spec.series[i - 1]?.dash ? "dashed" : "solid") } },
  };
}

function curve(one, alone) {
  const colour = css(one.colour);
  const thick = (one.width ?? 2) > 1;
  const few = (u, i) => thick && u.data[i].reduce((n, y) => n + (y !== null && y !== undefined), 0) <= FEW; // a curve may grow
  if (one.marks) {
    const points = { show: true, size: 10, width: 2, fill: css("paper"), stroke: colour };
    return { label: one.name, stroke: colour, width: 0, paths: () => null, value: lastValue, points };
  }
  return {
    label: alone ? "value" : one.name, // a lone curve is named by its caption
    stroke: colour,
    width: one.width ?? 2,
    dash: one.dash ? DASH : undefined,
    spanGaps: true,
    value: lastValue,
    points: { show: few, size: one.points.length === 1 ? 8 : 5, fill: colour, stroke: colour },
  };
}

/** What the legend shows: the value under the cursor, else the last. */
function lastValue(u, value, index) {
  if (value !== null && value !== undefined) return format(value);
  return format(u.data[index].findLast((v) => v !== null && v !== undefined));
}

// ------------------------------------------------------------------------------------------------ points

function scatterOptions(spec, width, _, box) {
  const lows = spec.points.map((p) => p.low ?? p.y);
  const highs = spec.points.map((p) => p.high ?? p.y);
  const bottom = Math.min(...lows), top = Math.max(...highs);
  const whole = { x: paddedRange(spec.points.map((p) => p.x)), y: paddedRange([bottom, top]) };
  const range = (key) => (u, low, high) => (u.zoomed && low !== null ? [low, high] : whole[key]);
  return {
    width,
    height: spec.height ?? 220,
    scales: { x: { time: false, range: range("x") }, y: { range: range("y") } },
    axes: [
      axis({ label: spec.x.label, labelSize: 20, size: 30, space: 70, values: (...call) => ticks(...call.slice(0, 5), spec.x.percent) }),
      axis({ label: spec.y.label, labelSize: 20, size: labelWidth, space: 34, values: (...call) => ticks(...call.slice(0, 5), spec.y.percent) }),
    ],
    series: [{}, { paths: () => null, points: { show: false } }],
    cursor: { x: false, y: false, points: { show: false }, drag: { x: true, y: true, uni: 20 } },
    legend: { show: false },
    hooks: {
      draw: [(u) => paint(u, spec)],
      setSelect: [(u) => { u.zoomed = true; }],
      ready: [(u) => hover(u, spec.points)],
    },
  };
}

function paddedRange(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low - pad, high + pad];
}

function paint(u, { points, path }) {
  const ratio = uPlot.pxRatio, g = u.ctx;
  const at = (x, y) => [u.valToPos(x, "x", true), u.valToPos(y, "y", true)];
  g.save();
  g.beginPath();
  g.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
  g.clip();
  if (path?.length) {
    g.strokeStyle = css("soft");
    g.lineWidth = ratio;
    g.setLineDash([4 * ratio, 3 * ratio]);
    g.beginPath();
    for (const [x, y] of path) g.lineTo(...at(x, y));
    g.stroke();
    g.setLineDash([]);
  }
  for (const p of points) {
    const [x, y] = at(p.x, p.y), size = 5 * ratio;
    g.strokeStyle = g.fillStyle = css(p.colour);
    g.lineWidth = 2 * ratio;
    if (p.low < p.high) {
      g.beginPath();
      g.moveTo(...at(p.x, p.low));
      g.lineTo(...at(p.x, p.high));
      g.stroke();
    }
    g.beginPath();
    if (p.shape === "square") g.rect(x - size, y - size, 2 * size, 2 * size);
    else g.arc(x, y, size, 0, 2 * Math.PI);
    if (p.hollow) g.fillStyle = css("paper");
    g.fill();
    g.stroke();
  }
  g.restore();
}

/** The point under the cursor: its text beside it, its link behind a click. */
function hover(u, points) {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  u.root.append(tip);
  let near = null, pressed = null;
  const look = (event) => {
    const frame = u.over.getBoundingClientRect();
    const [left, top] = [event.clientX - frame.left, event.clientY - frame.top];
    const distance = (p) => Math.hypot(u.valToPos(p.x, "x") - left, u.valToPos(p.y, "y") - top);
    near = points.reduce((best, p) => (best === null || distance(p) < distance(best) ? p : best), null);
    if (near && distance(near) > REACH) near = null;
    u.over.classList.toggle("link", Boolean(near?.link));
    tip.hidden = near === null;
    if (near === null) return;
    tip.textContent = near.text;
    const room = u.root.clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, u.over.offsetLeft + u.valToPos(near.x, "x") + 10))}px`;
    tip.style.top = `${Math.max(0, u.over.offsetTop + u.valToPos(near.y, "y") - tip.offsetHeight - 10)}px`;
  };
  u.over.addEventListener("mousemove", look);
  u.over.addEventListener("mouseleave", () => { tip.hidden = true; });
  u.over.addEventListener("mousedown", (event) => { pressed = [event.clientX, event.clientY]; });
  u.over.addEventListener("click", (event) => {
    const moved = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4; // then it was a zoom
    if (near?.link && !moved) location.href = near.link;
  });
  u.over.addEventListener("dblclick", () => {
    u.zoomed = false;
    u.setData(u.data);
  });
}
