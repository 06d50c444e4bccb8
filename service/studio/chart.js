// Histograms of held-out images, with the position of one value.

import { h } from "./dom.js";

// The top and the base of the bars and the height of the chart, in CSS pixels.
const [TOP, BASE, HEIGHT] = [40, 132, 180];

/** The label of an axis: what it measures, and in which direction. */
export const axisLabel = (statistic) =>
  statistic === "bpd" ? "bits/dim: lower is more likely" : `${statistic} OOD score: higher is more unusual`;

/**
 * Draw a histogram {edges, counts} with a labelled `axis`. Lines mark `value` and `threshold`; with `tail`, everything
 * above `value` is shaded.
 */
export function histogram({ edges, counts }, { description, axis, value, threshold, tail = true }) {
  const chart = h("svg", { class: "chart", height: HEIGHT, role: "img", "aria-label": description });
  const draw = (width) => {
    const [low, high] = [edges[0], edges.at(-1)];
    const x = (number) => 2 + ((width - 4) * (number - low)) / (high - low || 1);
    const visible = value === undefined ? undefined : Math.min(high, Math.max(low, value));
    chart.replaceChildren(
      ...bars({ edges, counts }, x, tail ? visible : undefined),
      ...axisLine([low, high], x, width, axis),
      ...thresholdLine(threshold, [low, high], x, visible),
      ...valueLine(value, [low, high], x),
    );
  };
  // Drawn at the width on the page, so that its text keeps its size on a phone.
  new ResizeObserver(([{ contentRect }]) => contentRect.width && draw(contentRect.width)).observe(chart);
  return chart;
}

/** The bars; those from `tailStart` on are shaded. */
function bars({ edges, counts }, x, tailStart) {
  const highest = Math.max(...counts);
  const elements = counts.map((count, i) => {
    const y = BASE - ((BASE - TOP) * count) / highest;
    const width = Math.max(0.5, x(edges[i + 1]) - x(edges[i]) - 1);
    const inTail = tailStart !== undefined && edges[i] >= tailStart;
    return h("rect", { x: x(edges[i]) + 0.5, y, width, height: BASE - y, class: inTail ? "beyond" : "within" });
  });
  if (tailStart === undefined) return elements;
  const width = x(edges.at(-1)) - x(tailStart);
  return [h("rect", { x: x(tailStart), y: TOP - 8, width, height: BASE - TOP + 8, class: "tail" }), ...elements];
}

function axisLine([low, high], x, width, label) {
  const text = (centre, y, content) => h("text", { x: centre, y, "text-anchor": "middle", class: "axis" }, content);
  return [
    h("line", { x1: x(low), x2: x(high), y1: BASE, y2: BASE, class: "axis" }),
    ...ticks(low, high).map((number) => text(x(number), BASE + 18, String(number))),
    text(width / 2, BASE + 37, label),
  ];
}

/** About six round numbers from `low` to `high`. */
function ticks(low, high) {
  const roughStep = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(roughStep));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= roughStep);
  const first = Math.ceil(low / step);
  const count = Math.floor(high / step) - first + 1;
  return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function thresholdLine(threshold, [low, high], x, value) {
  if (!(threshold > low && threshold < high)) return [];
  const toTheLeft = value !== undefined && value >= threshold; // so that the text does not cross the value's line
  const position = { x: x(threshold) + (toTheLeft ? -5 : 5), y: TOP, "text-anchor": toTheLeft ? "end" : "start" };
  return [
    h("line", { x1: x(threshold), x2: x(threshold), y1: TOP - 8, y2: BASE, class: "limit" }),
    h("text", { ...position, class: "limit" }, "threshold"),
  ];
}

function valueLine(value, [low, high], x) {
  if (value === undefined) return [];
  const visible = Math.min(high, Math.max(low, value));
  const share = (visible - low) / (high - low || 1);
  let label = "this image";
  if (value > high) label = "this image, above the scale";
  if (value < low) label = "this image, below the scale";
  let anchor = "middle";
  if (share < 0.2) anchor = "start";
  if (share > 0.8) anchor = "end";
  return [
    h("line", { x1: x(visible), x2: x(visible), y1: 22, y2: BASE, class: "value" }),
    h("text", { x: x(visible), y: 14, "text-anchor": anchor, class: "value" }, label),
  ];
}
