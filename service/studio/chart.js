// Where one number lies among those of the held-out pictures.

import { h } from "./ui.js";

const [WIDTH, HEIGHT, BASE] = [560, 150, 122];

/** At most `most` round numbers between two. */
function ticks(low, high, most = 6) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** A histogram {edges, counts} with `value` on it, what lies beyond it shaded, and the threshold where there is one. */
export function histogram({ edges, counts }, { value, threshold, words, tail = true }) {
  const [low, high] = [edges[0], edges.at(-1)];
  const x = (number) => 8 + ((WIDTH - 16) * (number - low)) / (high - low || 1);
  const tallest = Math.max(...counts);
  const inside = value === undefined ? undefined : Math.min(high, Math.max(low, value));
  const bars = counts.map((count, i) => {
    const top = BASE - (96 * count) / tallest;
    return h("rect", { x: x(edges[i]) + 0.5, y: top, width: Math.max(0.5, x(edges[i + 1]) - x(edges[i]) - 1), height: BASE - top,
      class: tail && inside !== undefined && edges[i] >= inside ? "beyond" : "within" });
  });
  const marker = inside === undefined ? [] : [
    h("line", { x1: x(inside), x2: x(inside), y1: 14, y2: BASE, class: "here" }),
    h("text", { x: x(inside), y: 10, "text-anchor": inside < low + 0.15 * (high - low) ? "start" : inside > high - 0.15 * (high - low) ? "end" : "middle", class: "here" },
      value === inside ? "this picture" : value > high ? "this picture, beyond the scale →" : "← this picture, beyond the scale"),
  ];
  const limit = threshold !== undefined && threshold > low && threshold < high ? [
    h("line", { x1: x(threshold), x2: x(threshold), y1: 26, y2: BASE, class: "limit" }),
    h("text", { x: x(threshold) + 4, y: 32, class: "limit" }, "threshold"),
  ] : [];
  const axis = ticks(low, high).map((number) => [
    h("line", { x1: x(number), x2: x(number), y1: BASE, y2: BASE + 4, class: "axis" }),
    h("text", { x: x(number), y: BASE + 18, "text-anchor": "middle", class: "axis" }, String(number)),
  ]);
  return h("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words },
    bars, h("line", { x1: 8, x2: WIDTH - 8, y1: BASE, y2: BASE, class: "axis" }), axis, limit, marker);
}
