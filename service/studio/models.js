// Models and health: the card of each model, and the load of the service.

import { catalogue } from "./catalogue.js";
import { axisLabel, histogram } from "./chart.js";
import { greyLevels, h, plural } from "./dom.js";
import { emptyState } from "./feedback.js";
import { explain } from "./fields.js";
import { lanesTable, latencyTable } from "./health.js";
import { markdown } from "./markdown.js";
import { SampleGrid } from "./samples.js";

export function mount(host) {
  const health = h("div", { class: "health" });
  const cards = h("div", { class: "cards" });
  host.append(h("h2", {}, "Health"), health, h("h2", {}, "Models"), cards);
  catalogue.addEventListener("list", showModels);
  showModels();

  function showModels() {
    const { models } = catalogue;
    cards.replaceChildren(...(models.length ? models.map(modelCard) : [noModels()]));
  }

  return {
    /** Show the metrics of the service, or null if they are not available. */
    showHealth(metrics) {
      const unavailable = h("p", { class: "hint" }, "Not available while the service does not respond.");
      health.replaceChildren(...(metrics ? [lanesTable(metrics), latencyTable(metrics)] : [unavailable]));
    },
  };
}

const noModels = () =>
  emptyState("No models", "A worker offers its models when it has loaded them, a few seconds after it starts.");

function modelCard(model) {
  const { calibration, card, name } = model;
  const facts = modelFacts(model).map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value)));
  return h(
    "article",
    { class: "card" },
    h("h3", {}, name),
    h("div", { class: "columns" }, h("dl", {}, facts), calibration ? calibrationFacts(model) : notCalibrated()),
    new SampleGrid(model).element,
    card &&
      h(
        "details",
        {},
        h("summary", {}, "Model card: training and measurements"),
        h("div", { class: "prose" }, markdown(card)),
      ),
  );
}

function modelFacts(model) {
  const { preprocessing } = model;
  const solvers = Object.entries(model.solvers).map(([name, steps]) => `${name} (${plural(steps, "step")})`);
  const metrics = Object.entries(model.metrics).map(([name, value]) => [
    name.replaceAll("_", " ").replace("bpd", "bits/dim"),
    h("span", { class: "mono" }, value.toLocaleString("en", { maximumFractionDigits: 4 })),
  ]);
  return [
    ["Version", h("code", {}, model.version.slice(0, 12))],
    ["Image size", `${model.width} × ${model.height}`],
    ["Classes", model.classes.join(", ") || "none"],
    ["Known halves", model.keeps.join(", ") || "none"],
    ["Initial noise", `up to ${greyLevels(model.noise)}`],
    ["Solvers", solvers.join(", ")],
    ...metrics,
    [
      "Preprocessing",
      typeof preprocessing === "string" ? preprocessing : `${preprocessing.name} v${preprocessing.version}`,
    ],
  ];
}

function notCalibrated() {
  const hint = ["Scores have no verdict. Run ", h("code", {}, "ncml calibrate"), " on held-out images to add one."];
  return h("div", {}, h("h4", {}, "Not calibrated"), h("p", { class: "hint" }, hint));
}

function calibrationFacts({ calibration, calibrations = {} }) {
  const { statistic, threshold, histograms = {}, n_rank: ranked, n_fit: estimated } = calibration;
  const { false_positive_rate: rate, smallest_p: smallestP, weakness, power } = calibration;
  const names = Object.keys(calibrations);
  const counts = histograms[statistic];
  const description = `Histogram of ${statistic} over held-out images, threshold ${threshold.toPrecision(3)}`;
  const flagged = `${(100 * rate).toFixed(0)}\u00a0%`;
  const summary = [
    `Statistic ${statistic}, estimated on ${plural(estimated, "image")}`,
    ` and ranked among ${ranked.toLocaleString("en")} others.`,
    ` At most ${flagged} of in-distribution images are flagged; p is at least ${smallestP.toPrecision(2)}.`,
  ];
  return h(
    "div",
    {},
    h("h4", {}, "Calibration", explain(statistic)),
    h("p", { class: "hint" }, summary),
    weakness && h("p", { class: "hint" }, h("strong", {}, "This calibration is weak"), `: ${weakness}.`),
    power && powerFacts(power),
    names.length > 1 && h("p", { class: "hint" }, `Calibrations to choose from: ${names.join(", ")}.`),
    counts && histogram(counts, { axis: axisLabel(statistic), threshold, description }),
  );
}

/** What a calibration flags, measured on held-out images when it was made. */
function powerFacts({ images, good, processed, altered, foreign }) {
  const rows = [["unchanged", good], ...[processed, altered, foreign].flatMap(Object.entries)];
  return h(
    "details",
    {},
    h("summary", {}, `What it flags, of ${plural(images, "held-out image")} each`),
    h(
      "dl",
      {},
      rows.map(([name, share]) => h("div", {}, h("dt", {}, name), h("dd", {}, `${(100 * share).toFixed(0)}\u00a0%`))),
    ),
  );
}
