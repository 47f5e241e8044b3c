// The validation curve: mean over peers as a line, smallest to largest as a band around it.

import uPlot from "/static/uplot.js";
import { loss } from "/static/format.js";

const HEIGHT = 280;

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Some air above and below; a lone value or a flat line sits in the middle.
function padded(low, high) {
  const air = Math.max(0.06 * (high - low), 0.02 * Math.abs(high), 0.01);
  return [low - air, high + air];
}

function options(width) {
  const axis = {
    stroke: colour("--quiet"),
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
  };
  const edge = { stroke: "transparent", width: 0, points: { show: false }, value: (_u, v) => loss(v ?? null) };
  return {
    width,
    height: HEIGHT,
    padding: [12, 12, 0, 0],
    cursor: { y: false, drag: { x: false, y: false } },
    scales: {
      x: { time: false, range: (u, low, high) => (u.data[0].length === 1 ? [u.data[0][0] - 0.5, u.data[0][0] + 0.5] : [low, high]) },
      y: { range: (_u, low, high) => padded(low, high) },
    },
    axes: [
      { ...axis, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 100000], values: (_u, ticks) => ticks.map(String) },
      { ...axis, size: 52 },
    ],
    series: [
      { label: "round", value: (_u, v) => (v === null || v === undefined ? "–" : String(v)) },
      { ...edge, label: "worst" },
      { ...edge, label: "best" },
      {
        label: "mean",
        stroke: colour("--accent"),
        width: 2,
        points: { show: (u) => u.data[0].length <= 40, size: 5, fill: colour("--accent") },
        value: (_u, v) => loss(v ?? null),
      },
    ],
    // With no pointer over it, the legend tells the newest round.
    hooks: { setCursor: [(u) => u.cursor.idx == null && tellNewest(u)] },
    bands: [{ series: [1, 2], fill: colour("--band") }],
  };
}

function tellNewest(plot) {
  plot.setLegend({ idx: plot.data[0].length - 1 });
}

export class LossChart {
  constructor(element) {
    this.element = element;
    this.plot = null;
    this.data = null;
    new ResizeObserver(() => this.resize()).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.rebuild());
  }

  // points: [[round, mean, smallest, largest, number of peers], …] by round.
  show(points) {
    this.element.hidden = points.length === 0;
    if (points.length === 0) return;
    this.data = [0, 3, 2, 1].map((column) => points.map((point) => point[column]));
    if (this.plot === null) this.rebuild();
    else this.plot.setData(this.data);
    if (this.plot.cursor.idx == null) tellNewest(this.plot);
  }

  rebuild() {
    if (this.data === null) return;
    if (this.plot !== null) this.plot.destroy();
    this.plot = new uPlot(options(this.element.clientWidth), this.data, this.element);
  }

  resize() {
    const width = this.element.clientWidth;
    if (this.plot !== null && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }
}
