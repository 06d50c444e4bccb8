// One scored image in full: likelihood, verdict, map, and its place among held-out images.

import { catalogue, reference } from "./catalogue.js";
import { axisLabel, histogram } from "./chart.js";
import { curl, endpoint, quoted, terminal } from "./curl.js";
import { greyLevels, h, plural } from "./dom.js";
import { chips, explain } from "./fields.js";
import { flipTest } from "./flip.js";
import { pixelMap } from "./map.js";
import { tileOverlay, VIEWS } from "./tiles.js";
import { calibrationOf, headline, verdict } from "./verdict.js";

/** The article of a reading; its map can be compared with those of all `readings`. */
export function readingArticle(reading, readings) {
  const { name, scan } = reading;
  const calibration = calibrationOf(reading);
  return h(
    "article",
    { class: "reading" },
    h("header", {}, h("h2", {}, name), h("p", { class: "hint" }, conditionsText(reading))),
    facts(reading),
    scan ? tileOverlay(reading) : pixelMap(reading, readings),
    h(
      "div",
      { class: "facts" },
      !scan && [calibration && placement(reading, calibration), flipTest(reading)],
      curlLine(reading),
    ),
  );
}

function conditionsText({ model, conditions }) {
  const parts = [
    `${model.name} ${model.version.slice(0, 12)}`,
    conditions.class && `class ${conditions.class}`,
    conditions.noise && `noise of ${greyLevels(conditions.noise)}`,
  ];
  return parts.filter(Boolean).join(" · ");
}

function facts(reading) {
  const { score, scan, model } = reading;
  const { kind, title, text } = verdict(reading);
  return h(
    "div",
    { class: "facts" },
    h(
      "p",
      { class: "big" },
      h("span", { class: "mono" }, headline(reading)),
      scan ? ` ${VIEWS[scan.view].name}` : [" bits/dim", explain("bits/dim")],
    ),
    h("p", { class: "hint" }, scan ? tilesText(scan) : likelihoodText(score, model)),
    h(
      "div",
      { class: `verdict ${kind}` },
      h("p", { class: "strong" }, title),
      h("p", {}, text),
      score.ood && h("p", { class: "mono" }, `p = ${score.ood.p_value.toPrecision(2)}`),
    ),
  );
}

const tilesText = ({ rows, columns, tile_width: width, tile_height: height }) =>
  `${plural(rows * columns, "tile")} of ${width} × ${height} pixels, overlapping by half or more.`;

function likelihoodText(score, model) {
  const nats = score.log_likelihood.toLocaleString("en", { maximumFractionDigits: 0 }).replace("-", "−");
  const testBpd = catalogue.models.find(({ name }) => name === model.name)?.metrics.test_bpd;
  const comparison = testBpd ? ` Test images of ${model.name} average ${testBpd.toFixed(2)} bits/dim.` : "";
  return `Log-likelihood of the whole image: ${nats} nats.${comparison}`;
}

/** The OOD score, or bits/dim, in the histogram of held-out images. */
function placement({ score }, { histograms, n_rank: ranked, smallest_p: smallestP }) {
  const { statistic } = score.ood;
  const names = [...new Set([statistic, "bpd"])].filter((name) => histograms?.[name]);
  if (!names.length) return null;
  const holder = h("div");
  const tabs = chips({
    legend: `Among ${plural(ranked, "held-out image")}`,
    options: names.map((name) => [name, name === "bpd" ? "bits/dim" : name]),
    value: names[0],
    kind: "chips small",
    onChange: show,
  });
  function show(name) {
    const chart =
      name === statistic
        ? oodScoreChart(score.ood, histograms[name], { ranked, smallestP })
        : bpdChart(score.bpd, histograms[name]);
    holder.replaceChildren(...chart);
  }
  show(names[0]);
  tabs.element.append(...explain(names[0]));
  return h("div", { class: "placed" }, tabs.element, holder);
}

function oodScoreChart({ statistic, score: value, threshold, p_value: pValue }, counts, { ranked, smallestP }) {
  const position = `${statistic}: this image at ${value.toPrecision(3)}, threshold ${threshold.toPrecision(3)}`;
  const description = `${position}, p = ${pValue.toPrecision(2)}`;
  const shading = value > counts.edges.at(-1) ? "" : "Shaded: OOD scores at least as high. ";
  const limit = `With ${plural(ranked, "held-out image")}, p is at least ${smallestP.toPrecision(2)}.`;
  return [
    histogram(counts, { axis: axisLabel(statistic), value, threshold, description }),
    h("p", { class: "hint" }, shading + limit),
  ];
}

function bpdChart(value, counts) {
  const description = `Bits per dimension: this image at ${value.toFixed(2)}`;
  const warning =
    "Likelihood alone is no verdict: simple images have few bits/dim even if they are out of distribution.";
  return [
    histogram(counts, { axis: axisLabel("bpd"), value, description, tail: false }),
    h("p", { class: "hint" }, warning),
  ];
}

function curlLine({ name, model, conditions }) {
  const parameters = { model: reference(model), map: "1" };
  for (const [key, value] of Object.entries(conditions)) if (value) parameters[key] = value;
  const line = curl("-F", quoted(`image=@${name}`), endpoint("score", parameters));
  return h("details", {}, h("summary", {}, "From a terminal"), terminal(line));
}
