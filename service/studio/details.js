// The details of a model: its properties, its calibration and what that detects, samples, and its card.

import { isGenerator } from "./catalogue.js";
import { axisLabel, histogram } from "./chart.js";
import { greyLevels, h, plural } from "./dom.js";
import { markdown } from "./markdown.js";
import { detectorPower, powerTable } from "./power.js";
import { reviewSection } from "./reviews.js";
import { sampleGrid } from "./samples.js";
import { explainTerm } from "./terms.js";
import { pText } from "./verdict.js";

const METRIC_NAMES = {
  class_fidelity: "Class recognised, generated images",
  class_fidelity_real: "Class recognised, real images",
};

export function modelDetails(model) {
  const { card } = model;
  const facts = modelFacts(model).map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value)));
  return h(
    "div",
    { class: "stack" },
    h(
      "div",
      { class: "columns" },
      verdictFacts(model),
      h("section", { class: "stack" }, h("dl", {}, facts), model.detector && reviewSection(model)),
    ),
    isGenerator(model) && sampleGrid(model).element,
    model.detector && powerSection(model), // last, because its pictures fill many screens
    card &&
      h(
        "details",
        {},
        h("summary", {}, "Model card: training and measurements"),
        h("div", { class: "prose" }, markdown(ownFirst(card))),
      ),
  );
}

/** A card with the section on its detector, if it has one, before what it says about the base of the detector. */
function ownFirst(card) {
  const [base, ...own] = card.split(/^(?=## Detector$)/m);
  return [...own, base].join("\n\n");
}

function verdictFacts(model) {
  if (model.detector) return detectorFacts(model);
  return model.calibration ? calibrationFacts(model) : notCalibrated();
}

/** How a detector was made, and at which size it judges. */
function detectorFacts(model) {
  const { detector } = model;
  const { n_fit: estimated, n_rank: ranked, estimation_scenes: fitScenes, ranking_scenes: rankScenes } = detector;
  const { false_positive_rate: rate, rate_bound: bound, confidence, weakness, descriptions, notes } = detector;
  const percent = (share) => `${pText(100 * share)}%`;
  const flagged = confidence
    ? `Flags at most ${percent(rate)} of good images, with a confidence of ${percent(confidence)}.`
    : `Flags ${percent(rate)} of good images on average; with 95% confidence at most ${percent(bound)} with this detector.`;
  const made =
    `Estimated on ${plural(estimated, "good image")} of ${plural(fitScenes, "scene")}; ranks images among ` +
    `${ranked.toLocaleString("en")} others of ${plural(rankScenes, "scene")}.`;
  const sentences = [...Object.values(descriptions), ...notes].map(
    (text) => `${text[0].toUpperCase()}${text.slice(1)}.`,
  );
  return h(
    "div",
    {},
    h("h3", {}, "Detector"),
    weakness && h("p", { class: "caution" }, h("strong", {}, "This detector is weak"), `: ${weakness}.`),
    h("p", { class: "hint" }, flagged),
    h("p", { class: "hint" }, made, explainTerm("scenes")),
    sentences.map((text) => h("p", { class: "hint" }, text)),
  );
}

function powerSection(model) {
  const unmeasured = h("p", { class: "hint" }, "What it finds has not been measured.");
  const content = model.detector.power ? detectorPower(model) : unmeasured;
  return h("section", { class: "stack" }, h("h3", {}, "What it finds and misses"), content);
}

function modelFacts(model) {
  if (model.detector) return detectorBaseFacts(model);
  const { preprocessing } = model;
  const metrics = Object.entries(model.metrics).map(([name, value]) => [
    METRIC_NAMES[name] ?? name.replaceAll("_", " ").replace("bpd", "bits/dim"),
    h("span", { class: "mono" }, value.toLocaleString("en", { maximumFractionDigits: 4 })),
  ]);
  return [
    ["Version", h("code", {}, model.version.slice(0, 12))],
    ["Image size", `${model.width} × ${model.height}`],
    ["Classes", model.classes.join(", ") || "none"],
    ...(isGenerator(model) ? samplingFacts(model) : []),
    ...metrics,
    ["Preprocessing", `${preprocessing.name} v${preprocessing.version}`],
  ];
}

/** The facts of a detector, whose base says nothing about it: other detectors and its updates have the same one. */
function detectorBaseFacts({ detector, version, width, height, generates, classes }) {
  return [
    ["Version", h("code", {}, detector.version.slice(0, 12))],
    ["Good images", (detector.n_fit + detector.n_rank).toLocaleString("en")],
    ["Version of its base", h("code", {}, version.slice(0, 12))],
    ["Image size of its base", `${width} × ${height}`],
    ...(generates && classes.length ? [["Classes of its base", classes.join(", ")]] : []),
  ];
}

function samplingFacts(model) {
  const solvers = Object.entries(model.solvers).map(([name, steps]) => `${name} (${plural(steps, "step")})`);
  return [
    ["Known halves", model.keeps.join(", ") || "none"],
    ["Initial noise", `up to ${greyLevels(model.noise)}`],
    ["Solvers", solvers.join(", ")],
  ];
}

function notCalibrated() {
  const link = h("a", { href: "#calibrate" }, "Calibrate a model");
  const hint = ["Scores of this model have no verdict. ", link, " on your own images to add one."];
  return h("div", {}, h("h3", {}, "Not calibrated"), h("p", { class: "hint" }, hint));
}

/** How a calibration was made and what it detects. */
function calibrationFacts({ calibration, calibrations }) {
  const { statistic, threshold, histograms, n_rank: ranked, n_fit: estimated } = calibration;
  const { false_positive_rate: rate, smallest_p: smallestP, weakness, power } = calibration;
  const names = Object.keys(calibrations);
  const counts = histograms[statistic];
  const description = `Histogram of ${statistic} over held-out images, threshold ${threshold.toPrecision(3)}`;
  const flagged = `${pText(100 * rate)}%`;
  const summary = [
    `The statistic ${statistic} is estimated on ${plural(estimated, "image")}`,
    `, and images are ranked among ${ranked.toLocaleString("en")} others.`,
    ` At most ${flagged} of in-distribution images are flagged. The smallest possible p-value is ${pText(smallestP)}.`,
  ];
  return h(
    "div",
    {},
    h("h3", {}, "Calibration", explainTerm(statistic)),
    h("p", { class: "hint" }, summary),
    weakness && h("p", { class: "caution" }, h("strong", {}, "This calibration is weak"), `: ${weakness}.`),
    names.length > 1 && h("p", { class: "hint" }, `Available calibrations: ${names.join(", ")}.`),
    power && powerTable(power),
    counts && histogram(counts, { axis: axisLabel(statistic), threshold, description }),
  );
}
