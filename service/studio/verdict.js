// The verdict on a scored image, in words.

import { catalogue } from "./catalogue.js";
import { plural } from "./dom.js";

/** The first number of a reading. */
export const headline = ({ score, scan }) => (scan ? score.score : score.bpd).toFixed(2);

/** The calibration behind a reading's verdict, or null if its model is no longer available. */
export function calibrationOf({ score: { ood }, scan, model }) {
  const current = catalogue.models.find(({ name, version }) => name === model.name && version === model.version);
  if (!ood || !current) return null;
  if (scan) return current.tiles ?? null;
  return current.calibrations?.[ood.calibration] ?? current.calibration ?? null;
}

/** The verdict on a reading: {kind, title, text}. */
export function verdict(reading) {
  const { ood } = reading.score;
  if (!ood && reading.scan) {
    const text =
      "This model’s tiles are not calibrated (ncml calibrate --tile): the map shows the most unusual tiles, " +
      "but not whether the image is out of distribution.";
    return { kind: "unknown", title: "No verdict", text };
  }
  if (!ood) {
    const text =
      "This model has no calibration and so gives no verdict. " +
      "Bits per dimension alone do not show whether an image is out of distribution.";
    return { kind: "unknown", title: "Not calibrated", text };
  }
  const calibration = calibrationOf(reading);
  const views = Object.keys(reading.scan?.views ?? {}).length;
  const rank = views > 1 ? viewsText(ood.p_value, views) : rankText(ood.p_value, calibration?.n_rank);
  const caution = ood.is_weak && calibration ? ` This calibration is weak: ${calibration.weakness}.` : "";
  if (!ood.is_ood) return { kind: "in", title: "In distribution", text: `${rank}.${caution}` };
  const rate = calibration?.false_positive_rate;
  const rule = rate ? ` An image is flagged when fewer than ${(100 * rate).toFixed(0)}\u00a0% do.` : "";
  return { kind: "out", title: "Out of distribution", text: `${rank}.${rule}${caution}` };
}

/** What a p-value of several views of tiles together states. */
const viewsText = (pValue, views) =>
  `At most ${percentage(pValue)} of good images are as unusual in any of the ${views} views of their tiles`;

/** How many of the `ranked` held-out images are at least as unusual. */
function rankText(pValue, ranked) {
  if (!ranked) return `${percentage(pValue)} of the held-out images have an OOD score at least as high`;
  const images = plural(ranked, "held-out image");
  const higher = Math.round(pValue * (ranked + 1)) - 1; // p counts the image itself, too
  if (!higher) return `None of the ${images} has an OOD score as high`;
  const verb = higher === 1 ? "has" : "have";
  return `${higher.toLocaleString("en")} of the ${images} ${verb} an OOD score at least as high`;
}

function percentage(share) {
  const percent = 100 * share;
  const decimals = percent < 0.1 ? 2 : Number(percent < 10);
  return `${percent.toFixed(decimals)}\u00a0%`;
}
