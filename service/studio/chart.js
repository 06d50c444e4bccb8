// Where one number lies among those of the held-out pictures.

import { h } from "./ui.js";

const [TOP, BASE, HEIGHT] = [40, 132, 180]; // of the bars and of the whole, in CSS pixels

/** About six round numbers between two. */
function ticks(low, high) {
  const rough = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** What an axis measures, and which way. */
export const axis = (name) => (name === "bpd" ? "bits/dim: further left is likelier" : `${name} score: further right is stranger`);

/** A histogram {edges, counts} over an `axis` with `value` on it, what lies beyond it shaded, and the threshold where there is one. */
export function histogram(counted, { words, ...marks }) {
  const chart = h("svg", { class: "chart", height: HEIGHT, role: "img", "aria-label": words });
  // Drawn for the width that it gets, so that its words keep their size on a phone.
  new ResizeObserver(([{ contentRect: { width } }]) => width && chart.replaceChildren(...bars(counted, marks, width))).observe(chart);
  return chart;
}

function bars({ edges, counts }, { axis, value, threshold, tail = true }, width) {
  const [low, high] = [edges[0], edges.at(-1)];
  const x = (number) => 2 + ((width - 4) * (number - low)) / (high - low || 1);
  const tallest = Math.max(...counts);
  const inside = value === undefined ? undefined : Math.min(high, Math.max(low, value));
  const shaded = tail && inside !== undefined;
  const parts = shaded ? [h("rect", { x: x(inside), y: TOP - 8, width: x(high) - x(inside), height: BASE - TOP + 8, class: "tail" })] : [];
  counts.forEach((count, i) => {
    const top = BASE - ((BASE - TOP) * count) / tallest;
    parts.push(h("rect", { x: x(edges[i]) + 0.5, y: top, width: Math.max(0.5, x(edges[i + 1]) - x(edges[i]) - 1), height: BASE - top,
      class: shaded && edges[i] >= inside ? "beyond" : "within" }));
  });
  parts.push(h("line", { x1: x(low), x2: x(high), y1: BASE, y2: BASE, class: "axis" }));
  for (const number of ticks(low, high)) {
    parts.push(h("text", { x: x(number), y: BASE + 18, "text-anchor": "middle", class: "axis" }, String(number)));
  }
  parts.push(h("text", { x: width / 2, y: BASE + 37, "text-anchor": "middle", class: "axis" }, axis));
  if (threshold > low && threshold < high) {
    const left = inside !== undefined && inside >= threshold; // its word keeps clear of the picture's line
    parts.push(h("line", { x1: x(threshold), x2: x(threshold), y1: TOP - 8, y2: BASE, class: "limit" }),
      h("text", { x: x(threshold) + (left ? -5 : 5), y: TOP, "text-anchor": left ? "end" : "start", class: "limit" }, "threshold"));
  }
  if (inside !== undefined) {
    const part = (inside - low) / (high - low || 1);
    parts.push(h("line", { x1: x(inside), x2: x(inside), y1: 22, y2: BASE, class: "here" }),
      h("text", { x: x(inside), y: 14, "text-anchor": part < 0.2 ? "start" : part > 0.8 ? "end" : "middle", class: "here" },
        value === inside ? "this picture" : value > high ? "this picture, beyond the scale" : "this picture, below the scale"));
  }
  return parts;
}
