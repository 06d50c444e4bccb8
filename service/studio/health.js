// The health of the service: its queues and workers, and how long responses took.

import { h, seconds } from "./dom.js";
import { emptyState } from "./feedback.js";
import { table } from "./markdown.js";
import { laneNames, total, withLabel } from "./metrics.js";

const ROUTES = /^\/(score|generate|complete|jobs\/\{job_id\}\/result|models)$/;

export function lanesTable(metrics) {
  const headings = ["Lane", "Waiting", "Longest wait", "Pace", "Workers"];
  return table({
    caption: "Queues and workers",
    headings,
    rows: laneNames(metrics).map((lane) => laneRow(lane, metrics)),
  });
}

function laneRow(lane, metrics) {
  const queues = (name) => (metrics.get(name) ?? []).filter(({ labels }) => labels.queue?.split(":")[1] === lane);
  const ages = queues("ncml_queue_oldest_age_seconds").map(({ value }) => value);
  const oldest = Math.max(0, ...ages);
  const pace = total(withLabel(metrics.get("ncml_lane_jobs_per_second"), "lane", lane));
  const workers = withLabel(metrics.get("ncml_workers"), "lane", lane).filter(({ value }) => value);
  return [
    lane,
    String(total(queues("ncml_queue_depth"))),
    oldest ? seconds(oldest) : "–",
    pace ? `${seconds(1 / pace)} per job`.replaceAll(" ", "\u00a0") : "–",
    workers.map(({ labels, value }) => `${value} ${labels.state}`).join(", ") || "none",
  ];
}

/**
 * How long responses took. A 202, as every request of this page gets, is not counted: it only accepts a job, and the
 * pace of the lanes covers those. Refusals are not counted either: they are quick whatever the load.
 */
export function latencyTable(metrics) {
  const buckets = (metrics.get("ncml_http_request_duration_seconds_bucket") ?? []).filter(
    ({ labels: { code } }) => code.startsWith("2") && code !== "202",
  );
  const routes = [...new Set(buckets.map(({ labels }) => labels.route))].filter((route) => ROUTES.test(route));
  if (!routes.length) return h("div", {}, emptyState("No requests yet", "Latencies appear after the first requests."));
  return table({
    caption: "Responses since the service started",
    headings: ["Route", "Requests", "50% within", "95% within"],
    rows: routes.map((route) => latencyRow(route, withLabel(buckets, "route", route))),
  });
}

function latencyRow(route, buckets) {
  const counts = new Map(); // by the upper edge of a bucket, over all status codes
  for (const { labels, value } of buckets) counts.set(labels.le, (counts.get(labels.le) ?? 0) + value);
  const cumulative = [...counts].map(([edge, count]) => [edge === "+Inf" ? Infinity : Number(edge), count]);
  const [, requests] = cumulative.at(-1);
  const name = route.replace("{job_id}", "…");
  return [name, requests.toLocaleString("en"), quantile(cumulative, 0.5), quantile(cumulative, 0.95)];
}

/** The upper edge of the bucket of a quantile, in words. */
function quantile(cumulative, share) {
  const rank = share * cumulative.at(-1)[1];
  const [edge] = cumulative.find(([, count]) => count >= rank);
  return edge === Infinity ? "over a minute" : seconds(edge);
}
