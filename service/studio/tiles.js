// Large images in tiles: the number of tiles, and the map of their OOD scores over the whole image.

import { resultFile } from "./api.js";
import { h, stem } from "./dom.js";
import { roundHalfEven } from "./image.js";
import { showMap } from "./map.js";

const MAX_TILES = 1024; // of an image; a core scores about 16 a second

/** How the service splits an image: the `size` of a tile, the number `n` of tiles, and the `side` to request, if any. */
export function tiling(model, width, height) {
  const { overlap } = model.tiles ?? { overlap: 0.5 };
  const maxStep = (tile) => Math.ceil(tile * (1 - overlap) - 1e-9);
  const countAlong = (length, tile) => (length < tile ? 0 : Math.ceil((length - tile) / maxStep(tile)) + 1);
  const count = (size) => countAlong(width, size[0]) * countAlong(height, size[1]);
  if (model.tiles) {
    const size = [model.tiles.width, model.tiles.height];
    return { size, n: count(size) };
  }
  const smallest = Math.min(model.width, model.height);
  for (let side = smallest; ; side += 1) {
    const size = [model.width, model.height].map((length) => roundHalfEven((side * length) / smallest));
    const n = count(size);
    if (n <= MAX_TILES) return { size, n, side };
  }
}

/** The address of the map that the service drew for a job. */
export const tileMapUrl = async (id) => URL.createObjectURL(await resultFile(id, "image/png"));

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
