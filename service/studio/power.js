// The power of a calibration: the shares of images that it flags, measured on held-out images when it was made.

import { h, plural } from "./dom.js";

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
  return h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, bar, h("span", {}, `${(100 * share).toFixed(0)}%`)));
}
