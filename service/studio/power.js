// The power of a calibration or a detector: the shares of images that it flags, measured when it was made.

import { h, plural } from "./dom.js";
import { powerPictures } from "./pictures.js";

const DETECTED = 0.5; // share of flagged images from which on their kind counts as detected

const shares = ({ altered, foreign }) => Object.entries({ ...altered, ...foreign });

/** The kind of an image without its amount: "blur, 1.5 pixels" is "blur". */
const kind = ([name]) => name.split(",")[0];

/** The kinds of images that a calibration detects and misses, as text. */
export const detected = (power) => listed(shares(power).filter(([, share]) => share >= DETECTED));
export const missed = (power) => listed(shares(power).filter(([, share]) => share < DETECTED));

const listed = (entries) => [...new Set(entries.map(kind))].join(", ");

/** A table of all shares with bars: first the images that should be flagged, then those that should not. */
export function powerTable({ images, good, processed, altered, foreign }) {
  const groups = [
    ["Should be flagged", { ...altered, ...foreign }],
    ["Should rarely be flagged", { unchanged: good, ...processed }],
  ];
  const rows = groups.flatMap(([title, group]) => [
    h("tr", {}, h("th", { scope: "colgroup", colspan: 2, class: "group" }, title)),
    ...Object.entries(group).map(([name, share]) => powerRow(name, share)),
  ]);
  const caption = `What it flags, of ${plural(images, "held-out image")}, unchanged or changed, and of foreign images`;
  return h("table", { class: "power" }, h("caption", {}, caption), h("tbody", {}, rows));
}

function powerRow(name, share) {
  const bar = h("span", { class: "bar-share" });
  bar.style.setProperty("--share", share);
  return h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, bar, h("span", {}, percent(share))));
}

/** The kinds of alteration of a detector's power: those of which the fewest are found at the largest size first. */
const worstFirst = ({ shares }) =>
  Object.entries(shares).sort(([, a], [, b]) => largest(a) - largest(b) || mean(a) - mean(b));

const largest = (sizes) => Object.values(sizes).at(-1);
const mean = (sizes) => Object.values(sizes).reduce((sum, share) => sum + share, 0) / Object.keys(sizes).length;

/** The kinds that a detector mostly misses even at the largest size, as text. */
export const missedKinds = (power) =>
  worstFirst(power)
    .filter(([, sizes]) => largest(sizes) < DETECTED)
    .map(([kind, sizes]) => `${kind} ${Object.keys(sizes).at(-1)} (${percent(largest(sizes))})`)
    .join("; ");

/** The smallest sizes that a detector finds in nine of ten images, as text. */
export const foundSizes = ({ smallest_found: found }) =>
  Object.entries(found)
    .filter(([, size]) => size)
    .map(([kind, size]) => `${kind} ${size}`)
    .join("; ");

/** The power of a detector: a table of the shares that it finds, by alteration and size, the worst first, with pictures. */
export function detectorPower(model) {
  const { power } = model.detector;
  const pictures = powerPictures(model);
  const groups = worstFirst(power).flatMap(([kind, sizes]) => [
    h("tr", {}, h("th", { scope: "colgroup", colspan: 2, class: "group" }, kind, smallestFound(power, kind))),
    ...Object.entries(sizes).map(([size, share]) => powerRow(size, share)),
    pictures.row(kind),
  ]);
  const foreign = Object.entries(power.foreign).map(([kind, share]) => powerRow(kind, share));
  const rows = [...groups, h("tr", {}, h("th", { scope: "colgroup", colspan: 2, class: "group" }, "foreign images"))];
  const caption =
    `Share found, the worst first: ${plural(power.images, "good image")}, altered in their own pixels, and foreign ` +
    "images. Nothing else was measured.";
  const table = h("table", { class: "power" }, h("caption", {}, caption), h("tbody", {}, rows, foreign));
  return h("div", { class: "stack" }, pictures.notice, table);
}

function smallestFound({ smallest_found: found }, kind) {
  const text = found[kind]
    ? `smallest size found in nine of ten: ${found[kind]}`
    : "no measured size found in nine of ten";
  return h("span", { class: "hint" }, ` · ${text}`);
}

const percent = (share) => `${(100 * share).toFixed(0)}%`;
