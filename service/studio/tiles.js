// Large images in tiles: how many there are, and the map of their OOD scores over the whole image.

import { resultFile } from "./api.js";
import { h, stem } from "./dom.js";
import { opacitySlider } from "./fields.js";
import { roundHalfEven } from "./image.js";

const MAX_TILES = 1024; // of an image; a core scores about 25 a second

/** How the service cuts an image: [width, height] of a tile, the number of tiles, and the `side` to request, if any. */
export function tiling(model, width, height) {
  const countAlong = (length, tile) => (length < tile ? 0 : Math.ceil((length - tile) / ((tile + 1) >> 1)) + 1);
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

/** What a view points at, and what its map shows. */
export const VIEWS = {
  worst_tile: { name: "worst tile", framed: "the worst tile" },
  peak: { name: "peak", framed: "the most surprising spot" },
  mean: { name: "mean of all tiles", framed: "the whole image, which differs as a whole" },
};

/** The image, if its file is available, under its map and a frame around what the view points at. */
export function tileOverlay(reading) {
  const { mapUrl, name, scan } = reading;
  const { box, width, height, threshold } = scan;
  const layer = h("img", { src: mapUrl, width, height, alt: `Map of the OOD scores of ${name}’s tiles` });
  const frame = h("span", { class: "box" });
  const edges = {
    left: box.left / width,
    top: box.top / height,
    width: box.width / width,
    height: box.height / height,
  };
  for (const [property, share] of Object.entries(edges)) frame.style[property] = `${100 * share}%`;
  const opacity = opacitySlider(layer, reading.file);
  const background = reading.file && backgroundImage(reading, () => opacity.makeOpaque());
  const position = `Framed: ${VIEWS[scan.view].framed}, ${box.left} pixels from the left and ${box.top} from the top. `;
  const scale = threshold
    ? `Above ${threshold.toPrecision(3)} an image is out of distribution in this view; the map is brightest there.`
    : "Bright tiles are the most unusual.";
  return h(
    "div",
    { class: "stack map" },
    h("div", { class: "over whole" }, background, layer, frame),
    opacity.element,
    h("p", { class: "hint" }, position, scale),
    h("div", {}, h("a", { class: "button small", href: mapUrl, download: `${stem(name)}-map.png` }, "Download map")),
  );
}

/** The image itself, which is removed if the browser cannot decode it. */
function backgroundImage(reading, onUndecodable) {
  const { width, height } = reading.scan;
  reading.fileUrl ??= URL.createObjectURL(reading.file);
  const onerror = () => {
    image.remove();
    onUndecodable();
  };
  const image = h("img", { src: reading.fileUrl, width, height, alt: reading.name, onerror });
  return image;
}
