// An image that a detector has judged at its own size: where it differs, in which views, and what to do.

import { h, plural } from "./dom.js";
import { pixelCanvas } from "./image.js";
import { heatmap, showMap } from "./map.js";
import { fetchedFigure, framed, place } from "./tiles.js";
import { calibrationOf } from "./verdict.js";

/** What each view compares, in words. */
const DETECTOR_VIEWS = {
  patches: "patches unlike those of good images",
  areas: "an area unlike those of good images",
  stains: "patches like those with a soft stain",
  marks: "patches like those with a scratch, a spot or a pit",
  known_defects: "patches like those of known defects",
  colour_spots: "a spot whose colour differs from its surroundings",
  places: "patches unlike those of good images at the same place",
  appearance: "brightness, contrast or colour of the whole image",
  appearance_grid: "brightness, contrast or colour of a part",
  likelihood_mean: "noise, sharpness or compression of the whole image",
  likelihood_window: "the texture of a part",
  likelihood_peak: "pixels unlike those around them",
};

/** What else a flagged image shows in a view. */
const MEANING = { places: ": something is missing, moved or added" };

const BRIGHTEST_SHARE = 0.5; // least share of the way from a map's median to its maximum from which it is brightest
const MIN_ESTIMATING = 11; // scenes from which a detector is estimated at least

const viewName = (view) => view.replaceAll("_", " ");

/** The image with the box of the view with the largest part: a small copy if the page no longer has the file, or what the service drew. */
export function detectionFigure(reading) {
  const { detection } = reading.score;
  const caption = detectionCaption(detection);
  if (!hasPicture(reading)) return drawnFigure(reading, caption);
  return framed(detection, picture(reading), caption, { isCalm: !detection.is_ood });
}

/** Whether the page can show the image; it has no small copy of a TIFF, which most browsers cannot decode. */
const hasPicture = ({ modelView }) => Boolean(modelView);

/** The image as the service drew it: in grey, with its map and its box. */
function drawnFigure(reading, caption) {
  const { name, modelView } = reading;
  const { width, height } = reading.score.detection;
  const reason = modelView === null ? "This browser cannot display the file" : "The storage of this tab is full";
  return fetchedFigure(reading, (src) => {
    const image = h("div", { class: "over whole" }, h("img", { width, height, src, alt: `${name} with its map` }));
    const source = `${reason}: this is the map on the image in grey, as the service drew it.`;
    return h("figure", {}, image, h("figcaption", { class: "hint" }, `${caption}. ${source}`));
  });
}

function detectionCaption({ view, is_ood: isOod, box, width, height }) {
  const compared = DETECTOR_VIEWS[view] ?? viewName(view);
  if (isOod) return `Most unusual: ${compared}${MEANING[view] ?? ""}`;
  const isWhole = box.width === width && box.height === height;
  return `Not flagged. ${isWhole ? `Most unusual: ${compared}` : `The most unusual place, in the view ${viewName(view)}`}`;
}

/** [low, high] of the colours of a map, which mean the same in all images: `detection_range` of `ncml.images.heat`. */
function colourRange({ map, score, threshold }) {
  const values = map.flat().sort((a, b) => a - b);
  const middle = values.length / 2;
  const median = (values[Math.ceil(middle) - 1] + values[Math.floor(middle)]) / 2;
  const largest = values.at(-1);
  if (score > 0) return [median, median + (largest - median) * Math.max(BRIGHTEST_SHARE, threshold / score)];
  return [largest, largest + 1];
}

function picture(reading) {
  const { file, name, modelView } = reading;
  const { width, height } = reading.score.detection;
  const small = () => h("img", { width, height, src: modelView, alt: name });
  if (!file) return small();
  reading.fileUrl ??= URL.createObjectURL(file);
  const image = h("img", { width, height, src: reading.fileUrl, alt: name, onerror: () => image.replaceWith(small()) });
  return image;
}

/** Details with the local scores of that view over the image; nothing for a view without a map, or if it is shown. */
export function detectionMap(reading) {
  const { detection } = reading.score;
  const { map, covered, width, height, view } = detection;
  if (!map?.length || !hasPicture(reading)) return null;
  return showMap("Map: where it differs from good images", () => {
    const label = `Map of ${reading.name} in the view ${viewName(view)}; it is brightest where the image differs most`;
    const layer = pixelCanvas(heatmap(map, ...colourRange(detection)), label);
    layer.className = "heat";
    place(layer, covered, width, height);
    const caption =
      "The colours mean the same in all images. The most unusual place is black if the score of this image is 0, and " +
      "brightest if it is flagged.";
    return [framed(detection, picture(reading), caption, { layers: [layer], isCalm: !detection.is_ood })];
  });
}

/** The parts of all views in the score of the image, the largest first. */
export function viewsTable({ score: { detection } }) {
  const { views, threshold } = detection;
  const sorted = Object.entries(views).sort(([, a], [, b]) => b.part - a.part);
  const rows = sorted.map(([view, { part }]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, viewName(view)),
      h("td", {}, DETECTOR_VIEWS[view] ?? ""),
      h("td", { class: "number" }, part.toFixed(2)),
    ),
  );
  const head = h(
    "tr",
    {},
    ["View", "What differs", "Part"].map((heading) => h("th", { scope: "col" }, heading)),
  );
  const caption = `The parts of the score; an image is flagged if their sum is above ${threshold.toFixed(2)}`;
  return h(
    "details",
    {},
    h("summary", {}, "All views"),
    h(
      "div",
      { class: "scroll" },
      h("table", { class: "views" }, h("caption", {}, caption), h("thead", {}, head), h("tbody", {}, rows)),
    ),
  );
}

/** What to do about the verdict of a detector. */
export function detectionSteps(reading) {
  const calibration = calibrationOf(reading);
  const { is_ood: isOod } = reading.score.detection;
  const models = h("a", { href: "#models" }, "Models");
  const unmeasured = calibration?.power === null && "what this detector misses has not been measured.";
  const missed = unmeasured || [models, " lists what this detector misses."];
  const keepsImages = calibration?.keeps_images !== false;
  const learns = (what, option) =>
    keepsImages
      ? `If this image ${what}, say so here: the next version of the detector learns from it.`
      : [`If this image ${what}, put it into a folder, and make the detector again with `, command(option), "."];
  const steps = isOod
    ? [calibration && rateStep(calibration), learns("is good", "--reviewed FOLDER")]
    : [["This does not mean free of defects: ", missed], learns("has a defect", "--defective FOLDER")];
  return h(
    "ul",
    { class: "steps" },
    steps.filter(Boolean).map((step) => h("li", {}, step)),
  );
}

/** The command that makes a detector again with an option. */
const command = (option) => h("code", {}, `ncml adapt GOOD ${option} --out NEW`);

/** How many good images are flagged, and how to flag fewer: a detector has the rate with which it was made. */
function rateStep({ false_positive_rate: rate, confidence }) {
  const share = `ne in ${plural(Math.round(1 / rate), "good image")} is flagged at this rate`;
  const lower = rate > 0.01 ? 0.01 : Number((rate / 10).toPrecision(3));
  const needed = MIN_ESTIMATING + Math.ceil(1 / lower - 1e-9) - 1;
  const remedy = "; to flag fewer, make the detector again with ";
  return [
    `${confidence ? "At most o" : "O"}${share}${remedy}`,
    command(`--false-positive-rate ${lower}`),
    `, from good images of at least ${needed} scenes.`,
  ];
}
