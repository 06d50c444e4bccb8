// Large images in tiles: the map of their OOD scores over the whole image.

import { resultFile } from "./api.js";
import { h, stem } from "./dom.js";
import { failure } from "./feedback.js";
import { showMap } from "./map.js";

/** The names of the views, and what the frame of each marks. */
export const VIEWS = {
  worst_tile: { name: "worst tile", framed: "the worst tile" },
  peak: { name: "peak", framed: "the most surprising spot" },
  mean: { name: "mean of all tiles", framed: "the whole image, because its tiles differ on average" },
};

/** The image, or its map if it cannot be shown, with the frame of the view. */
export function framedImage(reading) {
  const { file, name, scan } = reading;
  if (!file) return mapFigure(reading, "Only the map: the page does not keep files when it is reloaded");
  reading.fileUrl ??= URL.createObjectURL(file);
  const onerror = () => figure.replaceWith(mapFigure(reading, "Only the map: this browser cannot display the file"));
  const image = h("img", { ...size(reading), src: reading.fileUrl, alt: name, onerror });
  const figure = framed(scan, image, `Framed: ${VIEWS[scan.view].framed}`);
  return figure;
}

/** Details with the map of the tiles beside the image. */
export function tileMapDetails(reading) {
  const { scan, file } = reading;
  const scale = scan.threshold
    ? `Brightest above ${scan.threshold.toPrecision(3)}, the threshold of this view.`
    : "Bright tiles are the most unusual.";
  return showMap("Map: which tiles are unusual", () => [
    h("div", { class: "pair" }, file && framedImage(reading), mapFigure(reading, scale, true)),
  ]);
}

const size = ({ scan: { width, height } }) => ({ width, height });

/** The map that the service drew. */
const mapFigure = (reading, caption, isDownloadable = false) =>
  fetchedFigure(reading, (src) => {
    const image = h("img", { ...size(reading), src, alt: `Map of the OOD scores of ${reading.name}’s tiles` });
    const attributes = { class: "button small", href: src, download: `${stem(reading.name)}-map.png` };
    const download = isDownloadable && h("div", {}, h("a", attributes, "Download map"));
    return framed(reading.scan, image, caption, { more: download });
  });

/** `figure(src)` of what the service drew, fetched when it is shown; if that fails, the user can try again. */
export function fetchedFigure(reading, figure) {
  const holder = h("div", {}, h("p", { class: "hint" }, "Loading the map"));
  async function show() {
    try {
      holder.replaceChildren(figure(await fetchMap(reading)));
    } catch (error) {
      holder.replaceChildren(failure(error, show));
    }
  }
  show();
  return holder;
}

/** The address of the map of a reading, which is fetched only once. */
async function fetchMap(reading) {
  reading.mapUrl ??= resultFile(reading.job, "image/png").then((file) => URL.createObjectURL(file));
  try {
    return await reading.mapUrl;
  } catch (error) {
    reading.mapUrl = null;
    throw error;
  }
}

/** An image of a size with the frame of a box in it, grey if it `isCalm`; `layers` lie between the two. */
export function framed({ box, width, height }, image, caption, { layers = [], more, isCalm = false } = {}) {
  const position = `${box.left} pixels from the left and ${box.top} from the top`;
  const label = `Frame of ${box.width} × ${box.height} pixels, ${position}, in an image of ${width} × ${height}`;
  const frame = h("span", { class: isCalm ? "box calm" : "box", role: "img", "aria-label": label });
  place(frame, box, width, height);
  const over = h("div", { class: "over whole" }, image, layers, frame);
  return h("figure", {}, over, h("figcaption", { class: "hint", title: `Frame: ${position}` }, caption), more);
}

/** Place an element over the part `box` of an image of a size. */
export function place(element, box, width, height) {
  const edges = {
    left: box.left / width,
    top: box.top / height,
    width: box.width / width,
    height: box.height / height,
  };
  for (const [property, share] of Object.entries(edges)) element.style[property] = `${100 * share}%`;
}
