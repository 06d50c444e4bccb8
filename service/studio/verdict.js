// The verdict on a scored image, in words.

import { catalogue } from "./catalogue.js";
import { plural } from "./dom.js";

/** The calibration that a reading's verdict is based on; null if the service no longer has it. */
export function calibrationOf({ score: { ood, detection }, scan, model }) {
  const current = catalogue.modelOf(model);
  if (!ood || !current) return null;
  const whole = detection ? current.detector : current.calibrations[ood.calibration];
  const calibration = scan ? current.tiles : whole;
  return calibration?.version === ood.calibration_version ? calibration : null;
}

/** A p-value, rounded to its two significant digits. */
export const pText = (pValue) => String(Number(pValue.toPrecision(2)));

/** At which p-values images are flagged; the comparison is not broken between two lines. */
const flaggedAt = (cutoff) => `An image is flagged at p\u00a0≤\u00a0${pText(cutoff)}.`;

/** The first number of a reading: its p-value or, without a verdict, the OOD score of its tiles or its bits/dim. */
export function headline({ score, scan }) {
  if (score.ood) return `p ${pText(score.ood.p_value)}`;
  return (scan ? score.score : score.bpd).toFixed(2);
}

/** The verdict on a reading: {kind, label, title, text, caution}. The title names what the image is compared with. */
export function verdict(reading) {
  const { score, scan, model } = reading;
  const { ood } = score;
  if (!ood) return scan ? uncalibratedTiles(model) : uncalibrated(model);
  const calibration = calibrationOf(reading);
  if (score.detection) return detected(score.detection, calibration);
  const others = `the images ${calibrationName(reading)} was calibrated on`;
  const caution = ood.is_weak ? `This calibration is weak${calibration ? `: ${calibration.weakness}` : ""}.` : "";
  const views = Object.keys(scan?.views ?? {}).length;
  const rank = views > 1 ? viewsText(ood.p_value, views) : rankText(ood, calibration);
  const text = `${rank} ${pValueText(ood, calibration)}`;
  if (!ood.is_ood) {
    return { kind: "in", label: "Not flagged", title: `No difference found from ${others}`, text, caution };
  }
  const title = outTitle(ood, calibration, others, views);
  return { kind: "out", label: "Out of distribution", title, text, caution };
}

/** The verdict of a detector; its title is how rare such an image is among good ones. */
function detected(detection, calibration) {
  const {
    is_ood: isOod,
    is_weak: isWeak,
    at_least_as_unusual: count,
    ranking_images: ranked,
    p_value: pValue,
    differences,
  } = detection;
  const others = plural(ranked, "good image");
  const number = `${count.toLocaleString("en")} of ${others} ${count === 1 ? "is" : "are"} at least as unusual`;
  const title = count ? number : `None of ${others} is as unusual`;
  const isSmallest = calibration && pValue < 1.001 * calibration.smallest_p;
  const value = `p = ${pText(pValue)}${isSmallest ? ", the smallest possible" : ""}.`;
  const flagged = calibration ? [flaggedAt(calibration.cutoff)] : [];
  const remarks = differences.map((clause) => `${clause[0].toUpperCase()}${clause.slice(1)}.`);
  const text = [value, ...flagged, ...remarks].join(" ");
  const caution = isWeak ? `This detector is weak${calibration ? `: ${calibration.weakness}` : ""}.` : "";
  const [kind, label] = isOod ? ["out", "Flagged"] : ["in", "Not flagged"];
  return { kind, label, title, text, caution };
}

function uncalibrated({ name }) {
  const text = "Bits per dimension alone do not show whether an image is out of distribution.";
  return { kind: "unknown", label: "No verdict", title: `${name} is not calibrated`, text };
}

function uncalibratedTiles({ name }) {
  const text =
    "The map shows the most unusual tiles, but not whether the image is out of distribution. " +
    "For a verdict, calibrate the tiles on the command line: ncml calibrate --tile.";
  return { kind: "unknown", label: "No verdict", title: `The tiles of ${name} are not calibrated`, text };
}

function calibrationName({ score: { ood }, model, scan }) {
  return scan || ood.calibration === "default" ? model.name : `${model.name} (${ood.calibration})`;
}

/** How many ranking images have an OOD score at least as high: p counts the image itself, too. */
const countHigher = ({ p_value: pValue }, { n_rank: ranked }) => Math.round(pValue * (ranked + 1)) - 1;

function outTitle(ood, calibration, others, views) {
  if (!calibration || views > 1) return `More unusual than ${percentBelow(1 - ood.p_value)} of ${others}`;
  const higher = countHigher(ood, calibration);
  const ranked = calibration.n_rank;
  if (!higher) return `More unusual than all ${ranked.toLocaleString("en")} of ${others}`;
  return `More unusual than ${percentBelow(1 - higher / ranked)} of ${others}`;
}

/** A share in percent, rounded down so that it is never 100%. */
const percentBelow = (share) => `${Math.floor(1000 * share) / 10}%`;

/** What a p-value that combines several views of the tiles means. */
const viewsText = (pValue, views) =>
  `At most ${Math.ceil(1000 * pValue) / 10}% of good images are expected to be as unusual in any of the ` +
  `${views} views of their tiles.`;

function rankText(ood, calibration) {
  if (!calibration) return "";
  const higher = countHigher(ood, calibration);
  const images = plural(calibration.n_rank, "held-out image");
  if (!higher) return `None of the ${images} is as unusual.`;
  const verb = higher === 1 ? "is" : "are";
  return `${higher.toLocaleString("en")} of the ${images} ${verb} at least as unusual.`;
}

function pValueText({ p_value: pValue }, calibration) {
  const value = `p = ${pText(pValue)}`;
  if (!calibration) return `${value}.`;
  const { smallest_p: smallestP, false_positive_rate: rate, n_rank: ranked } = calibration;
  const flagged = flaggedAt(rate);
  const isSmallest = pValue < 1.001 * smallestP;
  if (isSmallest) return `${value}, the smallest possible with ${plural(ranked, "image")}. ${flagged}`;
  return `${value}; the smallest possible is ${pText(smallestP)}. ${flagged}`;
}
