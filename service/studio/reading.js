// One scored image: what the model sees, the verdict, the map, the likelihood, and its position among held-out images.

import { averageBpd } from "./average.js";
import { catalogue, reference } from "./catalogue.js";
import { axisLabel, histogram } from "./chart.js";
import { chips } from "./chips.js";
import { csv } from "./csv.js";
import { curl, endpoint, imageField, terminal } from "./curl.js";
import { detectionFigure, detectionMap, detectionSteps, viewsTable } from "./detection.js";
import { greyLevels, h, plural } from "./dom.js";
import { flipTest } from "./flip.js";
import { mapDetails, modelView } from "./map.js";
import { reviewButtons } from "./reviews.js";
import { explainTerm } from "./terms.js";
import { framedImage, tileMapDetails, VIEWS } from "./tiles.js";
import { calibrationOf, headline, pText, verdict } from "./verdict.js";

export { csv, headline, verdict };

/** The image of a reading for the strip, or the type of a file that the page cannot show. */
export function stripImage({ name, modelView: src }) {
  if (src) return h("img", { src, alt: "", class: "pixels" });
  return h("span", { class: "blank" }, /\.(\w+)$/.exec(name)?.[1].toUpperCase());
}

/** The article of a reading; its map can be compared with those of all `readings`. */
export function readingArticle(reading, readings) {
  const { name, scan } = reading;
  if (reading.score.detection) return detectionArticle(reading);
  const calibration = calibrationOf(reading);
  if (!scan) reading.flip ??= flipTest(reading); // it keeps its job and its result
  return h(
    "article",
    { class: "reading" },
    h("header", {}, h("h2", {}, name), h("p", { class: "hint" }, conditionsText(reading))),
    h(
      "div",
      { class: scan ? "answer scanned" : "answer" },
      scan ? framedImage(reading) : modelView(reading),
      verdictFacts(reading),
    ),
    scan ? tileMapDetails(reading) : mapDetails(reading, readings),
    !scan && likelihood(reading),
    !scan && calibration && placement(reading, calibration),
    reading.flip,
    curlDetails(reading),
  );
}

/** The article of an image that a detector has judged at its own size. */
function detectionArticle(reading) {
  return h(
    "article",
    { class: "reading" },
    h("header", {}, h("h2", {}, reading.name), h("p", { class: "hint" }, conditionsText(reading))),
    h("div", { class: "answer scanned" }, detectionFigure(reading), verdictFacts(reading)),
    detectionMap(reading),
    viewsTable(reading),
    h("p", { class: "hint" }, bitsText(reading)),
    curlDetails(reading),
  );
}

const bitsText = ({ score: { bpd }, model: { name } }) =>
  `${bpd.toFixed(2)} bits/dim of a small copy of the image under the base of ${name}. They do not decide the verdict.`;

/** The model with its version, of a detector its own rather than that of its base, and the conditions. */
function conditionsText({ model, conditions, score: { detection } }) {
  const version = detection?.calibration_version ?? model.version;
  return [`${model.name} ${version.slice(0, 12)}`, ...conditionsOf(conditions)].join(" · ");
}

/** The conditions of the likelihood, as texts; none for the exact likelihood of the image. */
const conditionsOf = ({ class: className, noise }) =>
  [className && `class ${className}`, noise && `noise of ${greyLevels(noise)}`].filter(Boolean);

function verdictFacts(reading) {
  const { kind, label, title, text, caution } = verdict(reading);
  const { score, scan } = reading;
  return h(
    "div",
    { class: `verdict ${kind}` },
    h("p", { class: "label" }, label),
    h("h3", {}, title),
    h("p", {}, text),
    scan && h("p", { class: "hint" }, tilesText(scan, score)),
    caution && h("p", { class: "caution" }, caution, caution.includes("scenes") && explainTerm("scenes")),
    score.detection ? [detectionSteps(reading), reviewButtons(reading)] : !scan && h("p", {}, nextStep(kind)),
  );
}

const tilesText = ({ rows, columns, tile_width: width, tile_height: height, tile_overlap: overlap, view }, { score }) =>
  `${plural(rows * columns, "tile")} of ${width} × ${height} pixels, overlapping by at least ${Math.round(100 * overlap)}%. ` +
  `Most unusual view: ${VIEWS[view].name}, with an OOD score of ${score.toFixed(2)}.`;

/** What to do about a verdict. */
function nextStep(kind) {
  const link = h("a", { href: "#calibrate" }, "calibrate a model");
  if (kind === "unknown") return ["For a verdict, ", link, " on your own images."];
  return ["To compare with your own images, ", link, "."];
}

function likelihood(reading) {
  const { score, conditions } = reading;
  const nats = score.log_likelihood.toLocaleString("en", { maximumFractionDigits: 0 }).replace("-", "−");
  // The explanation of the unit holds without noise only: with noise, the likelihood is a density.
  const unit = [" bits/dim", !conditions.noise && explainTerm("bits/dim")];
  return h(
    "section",
    { class: "likelihood" },
    h("p", { class: "big" }, h("span", { class: "mono" }, score.bpd.toFixed(2)), unit),
    h(
      "p",
      { class: "hint" },
      `Lower means more likely. ${comparison(reading)} Log-likelihood of the whole image: ${nats} nats.`,
    ),
  );
}

/** What to compare bits/dim with: only images that were scored under the same conditions. */
function comparison({ model, conditions }) {
  const texts = conditionsOf(conditions);
  if (texts.length) return `Compare it only with images scored under the same conditions: ${texts.join(", ")}.`;
  const served = catalogue.modelOf(model);
  const average = served && averageBpd(served);
  const measured = average ? `${average.images} of ${model.name} average ${average.bpd}. ` : "";
  return `${measured}This is not a verdict: flat images are likely under every such model.`;
}

/** The position of the OOD score, or of bits/dim without conditions, in the histogram of held-out images. */
function placement({ score, conditions }, { histograms, n_rank: ranked }) {
  const { statistic } = score.ood;
  const isPlain = !conditionsOf(conditions).length;
  const names = [...new Set([statistic, ...(isPlain ? ["bpd"] : [])])].filter((name) => histograms[name]);
  if (!names.length) return null;
  const holder = h("div");
  const tabs = chips({
    legend: `Compared with ${plural(ranked, "held-out image")}`,
    options: names.map((name) => [name, name === "bpd" ? "bits/dim" : name]),
    value: names[0],
    kind: "chips small",
    onChange: show,
  });
  function show(name) {
    const chart =
      name === statistic ? oodScoreChart(score.ood, histograms[name]) : bpdChart(score.bpd, histograms[name]);
    holder.replaceChildren(...chart);
  }
  show(names[0]);
  tabs.element.append(...explainTerm(names[0]));
  return h("div", { class: "placed" }, tabs.element, holder);
}

function oodScoreChart({ statistic, score: value, threshold, p_value: pValue }, counts) {
  const position = `${statistic}: this image at ${value.toPrecision(3)}, threshold ${threshold.toPrecision(3)}`;
  const description = `${position}, p = ${pText(pValue)}`;
  const chart = histogram(counts, { axis: axisLabel(statistic), value, threshold, description });
  const isShaded = value <= counts.edges.at(-1);
  return [
    chart,
    ...(isShaded ? [h("p", { class: "hint" }, "Shaded: held-out images with at least this OOD score.")] : []),
  ];
}

function bpdChart(value, counts) {
  const description = `Bits per dimension: this image at ${value.toFixed(2)}`;
  const warning =
    "Likelihood alone is not a verdict: simple images have few bits/dim even if they are out of distribution.";
  return [
    histogram(counts, { axis: axisLabel("bpd"), value, description, tail: false }),
    h("p", { class: "hint" }, warning),
  ];
}

function curlDetails({ name, model, conditions }) {
  const parameters = { model: reference(model), map: "1" };
  for (const [key, value] of Object.entries(conditions)) if (value) parameters[key] = value;
  const command = curl("-F", imageField(name), endpoint("score", parameters));
  return h("details", {}, h("summary", {}, "The same from a terminal"), terminal(command));
}
