// Models and health: the card of each model, and how busy the service is.

import { ask, cancel, follow, result, submit } from "./api.js";
import { catalogue, jobs, reference } from "./catalogue.js";
import { axis, histogram } from "./chart.js";
import { announce, button, empty, failure, h, plural, seconds, why } from "./ui.js";

const EACH = 4; // pictures of each class in a sample grid

export function mount(host) {
  const health = h("div", { class: "health" });
  const cards = h("div", { class: "cards" });
  host.append(h("h2", {}, "Health"), health, h("h2", {}, "Models"), cards);
  catalogue.addEventListener("list", list);
  list();
  return { pulse };

  function list() {
    if (!catalogue.models.length) cards.replaceChildren(empty("No model is served", "A worker publishes its models once it has loaded them; that takes a few seconds after its start."));
    else cards.replaceChildren(...catalogue.models.map(card));
  }

  /** Show what the metrics say; an error where they could not be read. */
  function pulse(state) {
    if (state instanceof Error) health.replaceChildren(h("p", { class: "hint" }, "Not known while the service does not answer."));
    else health.replaceChildren(lanes(state), latency(state));
  }
}

/** Samples of the Prometheus text format by name: [{labels, value}]. */
export async function metrics() {
  const found = new Map();
  for (const line of (await (await ask("metrics")).text()).split("\n")) {
    const [, name, labels = "", value] = /^([a-z_]+)(?:\{(.*)\})? (\S+)/.exec(line) ?? [];
    if (!name) continue;
    if (!found.has(name)) found.set(name, []);
    found.get(name).push({ labels: Object.fromEntries([...labels.matchAll(/(\w+)="([^"]*)"/g)].map(([, key, text]) => [key, text])), value: Number(value) });
  }
  return found;
}

const total = (samples = []) => samples.reduce((sum, { value }) => sum + value, 0);

/** The lanes that nobody works on, and how many jobs wait. */
export function summary(state) {
  const workers = state.get("ncml_workers") ?? [];
  const lanes = [...new Set(workers.map(({ labels }) => labels.lane))];
  const idle = lanes.filter((lane) => !total(workers.filter(({ labels }) => labels.lane === lane)));
  return { idle, waiting: total(state.get("ncml_queue_depth")) };
}

function table(caption, heads, rows) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, ...heads.map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, ...rows.map(([first, ...cells]) => h("tr", {}, h("th", { scope: "row" }, first), ...cells.map((cell) => h("td", {}, cell)))))));
}

function lanes(state) {
  const workers = state.get("ncml_workers") ?? [];
  const names = [...new Set(workers.map(({ labels }) => labels.lane))];
  return table("Queues and workers", ["Lane", "Waiting", "Oldest", "Pace", "Workers"], names.map((lane) => {
    const own = (name) => (state.get(name) ?? []).filter(({ labels }) => labels.queue?.split(":")[1] === lane);
    const oldest = Math.max(0, ...own("ncml_queue_oldest_age_seconds").map(({ value }) => value));
    const states = workers.filter(({ labels, value }) => labels.lane === lane && value).map(({ labels, value }) => `${value} ${labels.state}`);
    const pace = total(state.get("ncml_lane_jobs_per_second")?.filter(({ labels }) => labels.lane === lane));
    return [lane, String(total(own("ncml_queue_depth"))), oldest ? seconds(oldest) : "–", pace ? `${seconds(1 / pace)} a job`.replaceAll(" ", "\u00a0") : "–", states.join(", ") || "none"];
  }));
}

/** How long answers took. A 202 is none: it only takes a job on, as for all that this page asks; the lanes' pace tells of those. */
function latency(state) {
  const buckets = (state.get("ncml_http_request_duration_seconds_bucket") ?? []).filter(({ labels }) => labels.code !== "202");
  const routes = [...new Set(buckets.map(({ labels }) => labels.route))].filter((route) => /^\/(score|generate|complete|jobs\/\{job_id\}\/result|models)$/.test(route));
  const rows = routes.map((route) => {
    const counts = new Map(); // by the edge of a bucket, over all codes
    for (const { labels, value } of buckets) if (labels.route === route) counts.set(labels.le, (counts.get(labels.le) ?? 0) + value);
    const own = [...counts].map(([edge, value]) => [edge === "+Inf" ? Infinity : Number(edge), value]);
    return [route.replace("{job_id}", "…"), own.at(-1)[1].toLocaleString("en"), quantile(own, 0.5), quantile(own, 0.95)];
  });
  if (!rows.length) return h("div", {}, empty("No request yet", "Latencies appear with the first requests."));
  return table("Answers since the service started", ["Route", "Requests", "Half within", "95 % within"], rows);
}

/** The upper edge of the bucket that a quantile lies in, in words. */
function quantile(buckets, part) {
  const wanted = part * buckets.at(-1)[1];
  const edge = buckets.find(([, seen]) => seen >= wanted)[0];
  return edge === Infinity ? "more than a minute" : seconds(edge);
}

function card(model) {
  const { calibration, metrics: measured } = model;
  const facts = [
    ["Version", h("code", {}, model.version.slice(0, 12))],
    ["Pictures", `${model.width} × ${model.height}`],
    ["Classes", model.classes.join(", ") || "none"],
    ["Completes", model.keeps.join(", ") || "nothing"],
    ["Start noise", `up to ${model.noise} grey levels`],
    ["Solvers", Object.entries(model.solvers).map(([name, steps]) => `${name} (${plural(steps, "step")})`).join(", ")],
    ...Object.entries(measured).map(([name, value]) => [name.replaceAll("_", " ").replace("bpd", "bits/dim"), h("span", { class: "mono" }, value.toLocaleString("en", { maximumFractionDigits: 4 }))]),
    ["Preprocessing", typeof model.preprocessing === "string" ? model.preprocessing : `${model.preprocessing.name} v${model.preprocessing.version}`],
  ];
  return h("article", { class: "card" }, h("h3", {}, model.name),
    h("div", { class: "columns" }, h("dl", {}, ...facts.map(([term, text]) => h("div", {}, h("dt", {}, term), h("dd", {}, text)))), calibrated(calibration)),
    samples(model),
    model.card && h("details", {}, h("summary", {}, "Model card: training and measurements"), h("div", { class: "prose" }, ...markdown(model.card))));
}

function calibrated(calibration) {
  if (!calibration) return h("div", {}, h("h4", {}, "Not calibrated"), h("p", { class: "hint" }, "Scores have no verdict. ", h("code", {}, "ncml calibrate"), " measures one on held-out pictures."));
  const { statistic, threshold, histograms = {}, n_rank: ranked, n_fit: fitted, false_positive_rate: rate, smallest_p: smallest } = calibration;
  const own = histograms[statistic];
  return h("div", {}, h("h4", {}, "Calibration", statistic === "multiscale" && why(statistic)),
    h("p", { class: "hint" }, `Statistic ${statistic}, fitted on ${plural(fitted, "picture")} and ranked among ${ranked.toLocaleString("en")} others. At most ${(100 * rate).toFixed(0)}\u00a0% of pictures that belong are turned away; p is ${smallest.toPrecision(1)} at the least.`),
    own && histogram(own, { axis: axis(statistic), threshold, words: `Histogram of ${statistic} over held-out pictures, threshold ${threshold.toPrecision(3)}` }));
}

/** A grid of the model's own samples, drawn when asked for: the same seeds every time. */
function samples(model) {
  const holder = h("div", { class: "samples" });
  const former = jobs.of("samples").filter((job) => job.model === reference(model));
  const offer = () => holder.replaceChildren(button(`Draw ${model.classes.length ? `${EACH} of each class` : "16 samples"}`, begin, "small"));
  if (former.length) show(former);
  else offer();
  return holder;

  async function begin() {
    holder.replaceChildren(h("p", { class: "hint" }, "Asking"));
    const asked = model.classes.length ? model.classes.map((name, i) => ({ class: name, n: EACH, seed: EACH * i })) : [{ n: 16, seed: 0 }];
    const records = [];
    try {
      for (const one of asked) {
        const job = await submit("generate", { ...one, model: reference(model), priority: "low" });
        records.push({ id: job.id, view: "samples", model: reference(model), label: one.class ?? model.name });
        jobs.add(records.at(-1));
      }
      show(records);
    } catch (error) {
      forget(records);
      holder.replaceChildren(failure(error, begin));
    }
  }

  function forget(records) {
    for (const { id } of records) {
      jobs.remove(id);
      cancel(id).catch(() => announce("A drawing goes on")); // it ends by itself
    }
  }

  async function show(records) {
    const rows = records.map((record) => h("li", {}, h("span", { class: "name" }, record.label), h("span", { class: "faces" })));
    const bar = h("progress", { max: records.length, value: 0, "aria-label": "Progress" });
    const stop = button("Cancel", () => { forget(records); offer(); }, "small");
    const top = h("div", { class: "row" }, h("p", { class: "hint grow" }, "Drawing samples, seeds 0 and on"), bar, stop);
    holder.replaceChildren(top, h("ul", { class: "classes" }, ...rows));
    try {
      for (const [i, record] of records.entries()) {
        const end = await follow(record.id, () => {});
        if (end.status === "canceled") return;
        if (end.status !== "succeeded") throw new Error(end.error?.detail ?? `The job ${end.status}.`);
        const { images } = await result(record.id);
        rows[i].lastChild.replaceChildren(...images.map(({ seed, png }) => h("img", { class: "pixels", src: `data:image/png;base64,${png}`, alt: `${record.label}, seed ${seed}` })));
        bar.value = i + 1;
      }
      top.replaceChildren(h("p", { class: "hint grow" }, "Samples of the model, seeds 0 and on, not chosen"), button("Draw again", () => { forget(records); begin(); }, "small"));
    } catch (error) {
      forget(records);
      if (error.status === 404) offer();
      else holder.replaceChildren(failure(error, begin));
    }
  }
}

/** The Markdown that model cards use: headings, lists, tables, paragraphs; bold, code. */
function markdown(text) {
  const out = [];
  const spans = (line) => line.split(/(\*\*[^*]+\*\*|`[^`]+`)/).map((part) => (part.startsWith("**") ? h("strong", {}, part.slice(2, -2)) : part.startsWith("`") ? h("code", {}, part.slice(1, -1)) : part));
  for (const block of text.trim().split(/\n\s*\n/)) {
    const lines = block.split("\n");
    if (lines[0].startsWith("|")) {
      const [head, , ...body] = lines.map((line) => line.split("|").slice(1, -1).map((cell) => cell.trim()));
      out.push(h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": head.join(", ") }, h("table", {}, h("thead", {}, h("tr", {}, ...head.map((cell) => h("th", { scope: "col" }, spans(cell))))), h("tbody", {}, ...body.map((row) => h("tr", {}, ...row.map((cell) => h("td", {}, spans(cell)))))))));
      continue;
    }
    let list = null;
    let paragraph = null;
    for (const line of lines) {
      const [, title] = /^#+ (.*)/.exec(line) ?? [];
      const [, item] = /^[-*] (.*)/.exec(line) ?? [];
      if (title) out.push(h("h4", {}, title));
      else if (item) {
        if (!list) out.push((list = h("ul")));
        list.append(h("li", {}, spans(item)));
      } else if (list && /^\s/.test(line)) list.lastChild.append(" ", ...spans(line.trim()));
      else {
        if (!paragraph) out.push((paragraph = h("p")));
        paragraph.append(...spans(line), " ");
      }
      if (title) paragraph = list = null;
    }
  }
  return out;
}
