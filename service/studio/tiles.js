// Large images in tiles: the map of their OOD scores over the whole image.

import { h, stem } from "./dom.js";
import { showMap } from "./map.js";

/** The names of the views, and what the frame of each marks. */
export const VIEWS = {
  worst_tile: { name: "worst tile", framed: "the worst tile" },
  peak: { name: "peak", framed: "the most surprising spot" },
  mean: { name: "mean of all tiles", framed: "the whole image, because its tiles differ on average" },
};

/** The image, or its map if the file is not available, with the frame of the view. */
export function framedImage(reading) {
  const { file, name, scan } = reading;
  if (!file)
    return framed(reading, mapImage(reading), "Only the map: the page does not keep files when it is reloaded");
  reading.fileUrl ??= URL.createObjectURL(file);
  const onerror = () => image.replaceWith(mapImage(reading));
  const image = h("img", { ...size(reading), src: reading.fileUrl, alt: name, onerror });
  return framed(reading, image, `Framed: ${VIEWS[scan.view].framed}`);
}

/** Details with the map of the tiles beside the image. */
export function tileMapDetails(reading) {
  const { mapUrl, name, scan, file } = reading;
  const download = h("a", { class: "button small", href: mapUrl, download: `${stem(name)}-map.png` }, "Download map");
  const scale = scan.threshold
    ? `Brightest above ${scan.threshold.toPrecision(3)}, the threshold of this view.`
    : "Bright tiles are the most unusual.";
  const map = () => framed(reading, mapImage(reading), scale);
  return showMap("Map: which tiles are unusual", () => [
    h("div", { class: "pair" }, file && framedImage(reading), map()),
    h("div", {}, download),
  ]);
}

const size = ({ scan: { width, height } }) => ({ width, height });

const mapImage = (reading) =>
  h("img", { ...size(reading), src: reading.mapUrl, alt: `Map of the OOD scores of ${reading.name}’s tiles` });

/** An image with the frame of the view. */
function framed({ scan: { box, width, height } }, image, caption) {
  const frame = h("span", { class: "box" });
  const edges = {
    left: box.left / width,
    top: box.top / height,
    width: box.width / width,
    height: box.height / height,
  };
  for (const [property, share] of Object.entries(edges)) frame.style[property] = `${100 * share}%`;
  const position = `${box.left} pixels from the left and ${box.top} from the top`;
  const over = h("div", { class: "over whole" }, image, frame);
  return h("figure", {}, over, h("figcaption", { class: "hint", title: position }, caption));
}
