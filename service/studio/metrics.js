// The metrics of the service, in the Prometheus text format.

import { requestText } from "./api.js";

/** The samples by name, [{labels, value}]. */
export async function fetchMetrics() {
  const text = await requestText("metrics");
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const [, name, labels = "", value] = /^([a-z_]+)(?:\{(.*)\})? (\S+)/.exec(line) ?? [];
    if (!name) continue;
    if (!metrics.has(name)) metrics.set(name, []);
    metrics.get(name).push({ labels: parseLabels(labels), value: Number(value) });
  }
  return metrics;
}

const parseLabels = (text) =>
  Object.fromEntries([...text.matchAll(/(\w+)="([^"]*)"/g)].map(([, name, value]) => [name, value]));

export const total = (samples = []) => samples.reduce((sum, { value }) => sum + value, 0);

/** The samples of a metric whose label has a value. */
export const withLabel = (samples = [], label, value) => samples.filter(({ labels }) => labels[label] === value);

/** The names of the lanes that workers can serve. */
export const laneNames = (metrics) => [
  ...new Set((metrics.get("ncml_workers") ?? []).map(({ labels }) => labels.lane)),
];

/** The lanes that no worker serves, and the number of waiting jobs. */
export function load(metrics) {
  const workers = metrics.get("ncml_workers");
  const unserved = laneNames(metrics).filter((lane) => !total(withLabel(workers, "lane", lane)));
  return { unserved, waiting: total(metrics.get("ncml_queue_depth")) };
}
