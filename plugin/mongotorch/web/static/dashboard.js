// Keeps an open page up to date, filters its rows and draws its curves. All text goes in as text, never as HTML.
"use strict";

const MOST_CHARTS = 24;
const PAUSE_MS = 1000; // between two looks, however fast records change

// Curves

const charts = new Map(); // name of the values -> {plot, figure, key}

function color(n) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--curve-${n % 10}`).trim();
}

function soft(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// One chart for each name; `learning_rate/0` and `learning_rate/1` share one.
function grouped(runs) {
  const groups = new Map();
  runs.forEach((run, n) => {
    for (const curve of run.curves) {
      const name = curve.name.replace(/\/\d+$/, "");
      if (!groups.has(name)) groups.set(name, []);
      const about = [curve.kind, curve.name === name ? "" : curve.name.slice(name.length + 1)];
      const which = runs.length > 1 ? [run.name || "", run.id.slice(0, 8)] : [];
      groups.get(name).push({ ...curve, run: n, best: run.best_step, label: [...which, ...about].filter(Boolean).join(" ") });
    }
  });
  return [...groups].slice(0, MOST_CHARTS);
}

function aligned(curves, axis) {
  const tables = curves.map((curve) => {
    const rows = curve[axis].map((x, n) => [x, curve.values[n]]).filter(([x]) => x !== null);
    rows.sort((one, other) => one[0] - other[0]);
    return [rows.map((row) => row[0]), rows.map((row) => row[1])];
  });
  return uPlot.join(tables);
}

function bestStep(curves) {
  return (plot) => {
    const best = curves.length && curves[0].best;
    if (best === null || best === undefined || plot.scales.x.min === null) return;
    const x = Math.round(plot.valToPos(best, "x", true));
    if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) return;
    const pen = plot.ctx;
    pen.save();
    pen.strokeStyle = pen.fillStyle = soft("--good");
    pen.setLineDash([6, 4]);
    pen.beginPath();
    pen.moveTo(x, plot.bbox.top);
    pen.lineTo(x, plot.bbox.top + plot.bbox.height);
    pen.stroke();
    pen.textAlign = x > plot.bbox.left + plot.bbox.width / 2 ? "right" : "left";
    pen.fillText(` best step ${best} `, x, plot.bbox.top + 14 * devicePixelRatio);
    pen.restore();
  };
}

function options(curves, axis, width, alone) {
  const lines = curves.map((curve, n) => ({
    label: curve.label,
    stroke: color(alone ? n : curve.run),
    width: curve.kind === "valid" ? 2 : 1.2,
    dash: !alone && curve.kind === "train" ? [5, 4] : undefined,
    spanGaps: true,
    points: { show: curve.values.length < 3, size: 6, fill: color(alone ? n : curve.run) },
    value: (_, value) => (value === null || value === undefined ? "" : String(Number(value.toPrecision(5)))),
  }));
  const axes = { stroke: soft("--soft"), grid: { stroke: soft("--line"), width: 1 }, ticks: { stroke: soft("--line"), width: 1 } };
  return {
    width,
    height: 240,
    scales: { x: { time: false } },
    series: [{ label: axis === "steps" ? "step" : "seconds" }, ...lines],
    axes: [{ ...axes }, { ...axes, size: 62 }],
    cursor: { sync: { key: "curves" } },
    hooks: { draw: axis === "steps" && alone ? [bestStep(curves)] : [] },
  };
}

function draw(box, runs) {
  const axis = document.getElementById("axis")?.value || "steps";
  const groups = grouped(runs);
  if (!groups.length) {
    box.textContent = "Nothing has been measured yet.";
    return;
  }
  if (!charts.size) box.textContent = "";
  // All figures first: how many there are decides how wide each is.
  for (const [name] of groups) {
    if (charts.has(name)) continue;
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = name;
    figure.append(caption);
    box.append(figure);
    charts.set(name, { figure });
  }
  for (const [name, curves] of groups) {
    const key = [axis, ...curves.map((curve) => curve.label + curve.best)].join("\n");
    const chart = charts.get(name);
    if (chart.key === key) {
      chart.plot.setData(aligned(curves, axis));
      continue;
    }
    chart.plot?.destroy();
    const width = Math.max(chart.figure.clientWidth - 18, 200);
    chart.key = key;
    chart.plot = new uPlot(options(curves, axis, width, runs.length === 1), aligned(curves, axis), chart.figure);
  }
}

let lastRuns = null;

async function loadCharts() {
  const box = document.querySelector("[data-charts]");
  if (!box) return;
  const answer = await fetch(box.dataset.charts);
  if (!answer.ok) return;
  lastRuns = (await answer.json()).runs;
  draw(box, lastRuns);
}

function redraw() {
  const box = document.querySelector("[data-charts]");
  if (!box || !lastRuns) return;
  for (const chart of charts.values()) {
    chart.plot.destroy();
    chart.figure.remove();
  }
  charts.clear();
  draw(box, lastRuns);
}

// What is on the page, loaded again when records have changed

function replaceChildren(old, fresh) {
  const chosen = new Set([...old.querySelectorAll("input:checked")].map((input) => input.value));
  const open = old.querySelector("details")?.open;
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  const where = focused && (focused.value || focused.getAttribute("href"));
  old.replaceChildren(...fresh.childNodes);
  for (const input of old.querySelectorAll("input[type=checkbox]")) input.checked = chosen.has(input.value);
  if (open) old.querySelector("details")?.setAttribute("open", "");
  if (where) {
    const same = [...old.querySelectorAll("a, input")].find((one) => one.value === where || one.getAttribute("href") === where);
    same?.focus({ preventScroll: true });
  }
}

async function loadAgain() {
  const parts = document.querySelectorAll("[data-live]");
  if (parts.length) {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of parts) {
      const other = fresh.getElementById(part.id);
      if (other && other.innerHTML !== part.innerHTML) replaceChildren(part, other);
    }
    filterRows();
  }
  await loadCharts();
}

let pending = false;
let busy = false;

async function look() {
  if (busy) {
    pending = true;
    return;
  }
  busy = true;
  pending = false;
  try {
    await loadAgain();
  } catch {
    // The server is away: the event stream says so, and comes back by itself.
  }
  setTimeout(() => {
    busy = false;
    if (pending) look();
  }, PAUSE_MS);
}

function listen() {
  const topics = document.body.dataset.topics.split(" ").filter(Boolean);
  const shown = document.getElementById("connection");
  let source = null;
  const open = () => {
    if (source || document.hidden || !topics.length) return;
    source = new EventSource("/events");
    source.onopen = () => (shown.textContent = "· live");
    source.onerror = () => (shown.textContent = "· not connected");
    source.onmessage = (event) => {
      if (JSON.parse(event.data).some((topic) => topics.includes(topic))) look();
    };
  };
  // A browser keeps few connections to one server: a page in the background gives its own back.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      source?.close();
      source = null;
    } else {
      open();
      look();
    }
  });
  window.addEventListener("pagehide", () => source?.close());
  open();
}

// Filter and choice

function filterRows() {
  const asked = (document.getElementById("filter")?.value || "").toLowerCase();
  for (const row of document.querySelectorAll("#runs tbody tr")) {
    row.hidden = Boolean(asked) && !row.textContent.toLowerCase().includes(asked);
  }
}

function countChosen() {
  const shown = document.getElementById("chosen");
  if (!shown) return;
  const count = document.querySelectorAll("#runs input:checked").length;
  shown.textContent = count > 10 ? `${count} are chosen; ten can be compared` : count ? `${count} chosen` : "";
}

document.getElementById("filter")?.addEventListener("input", filterRows);
document.getElementById("filter")?.addEventListener("keydown", (event) => {
  if (event.key === "Enter") event.preventDefault();
});
document.getElementById("runs")?.addEventListener("change", countChosen);
document.getElementById("axis")?.addEventListener("change", redraw);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
    const box = document.getElementById("filter");
    if (box) {
      event.preventDefault();
      box.focus();
    }
  }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let resized = 0;
window.addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(redraw, 200);
});
loadCharts();
listen();
