// The map of an image: the bits of each pixel beside what the model sees.

import { reference } from "./catalogue.js";
import { announce, button, h, save, stem } from "./dom.js";
import { enlarge, pixelCanvas, toPng } from "./image.js";

const CLIPPED = 0.02; // share of pixels beyond each end of the colour scale
let mapsShown = false; // also for the images selected next
let sharedScale = false; // one colour scale for all maps that can be compared

/** The image of a reading as the model saw it. */
export function modelView({ modelView: src, name }) {
  const image = src && h("img", { src, alt: `${name} as the model sees it`, class: "pixels" });
  const reason = src === null ? "this browser cannot decode the file" : "the storage of this tab is full";
  const caption = src ? "As the model sees it" : `Not displayed: ${reason}`;
  return h("figure", {}, h("div", { class: "over" }, image), h("figcaption", { class: "hint" }, caption));
}

/** Details that show a map beside the image; `content()` returns their elements when they are first opened. */
export function showMap(summary, content) {
  const details = h("details", { class: "map", open: mapsShown, ontoggle: fill }, h("summary", {}, summary));
  function fill() {
    mapsShown = details.open;
    if (details.open && details.children.length === 1) details.append(...content().flat().filter(Boolean));
  }
  if (mapsShown) fill();
  return details;
}

export const mapDetails = (reading, readings) =>
  reading.score.map && showMap("Map: which pixels are unlikely", () => mapElements(reading, readings));

function mapElements(reading, readings) {
  const { score, name } = reading;
  const [least, most] = bitsRange([reading], 0);
  const label = `Bits per dimension of each pixel, from ${least.toFixed(1)} to ${most.toFixed(1)}`;
  const layer = pixelCanvas(heatmap(score.map, least, most), label);
  const output = h("output", { class: "mono", "aria-live": "off" }, "Point at a pixel, or move with the arrow keys.");
  const mapFigure = h(
    "figure",
    {},
    h("div", { class: "over", tabindex: 0, role: "group", "aria-label": "Map; the arrow keys select a pixel" }, layer),
    h("figcaption", { class: "hint" }, "Bits/dim of each pixel: bright ones are unlikely"),
  );
  const pair = h("div", { class: "pair" }, modelView(reading), mapFigure);
  linkPixels(pair, score.map, output);
  const download = async () => save(await toPng(enlarge(layer)), `${stem(name)}-map.png`);
  const actions = h("div", { class: "row" }, output, button("Download map", download, "small"));
  return [pair, colourScale(reading, readings, layer), actions];
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** Mark the pixel under the pointer, or the one that the arrow keys select, in both images of a pair; write its value. */
function linkPixels(pair, map, output) {
  const images = [...pair.querySelectorAll(".over")];
  const spots = images.map(() => h("span", { class: "spot", hidden: true }));
  const [height, width] = [map.length, map[0].length];
  let selected = null; // [row, column]
  function select(row, column) {
    selected = [row, column];
    for (const spot of spots) {
      spot.hidden = false;
      spot.style.inset = `${(100 * row) / height}% auto auto ${(100 * column) / width}%`;
      spot.style.width = `${100 / width}%`;
      spot.style.height = `${100 / height}%`;
    }
    output.textContent = `Row ${row + 1}, column ${column + 1}: ${map[row][column].toFixed(2)} bits/dim`;
  }
  const limited = (index, count) => Math.min(count - 1, Math.max(0, index));
  const onkeydown = (event) => {
    const arrow = ARROWS[event.key];
    if (!arrow) return;
    event.preventDefault(); // of scrolling
    const [row, column] = selected ? selected.map((index, i) => index + arrow[i]) : [0, 0];
    select(limited(row, height), limited(column, width));
    announce(output.textContent);
  };
  images.forEach((image, i) => {
    image.append(spots[i]);
    const onPointer = (event) => select(...pixelAt(map, image, event));
    for (const type of ["pointerdown", "pointermove"]) image.addEventListener(type, onPointer);
    image.addEventListener("keydown", onkeydown);
  });
}

/** [row, column] of the pixel under the pointer. */
function pixelAt(map, image, { clientX, clientY }) {
  const { left, top, width, height } = image.getBoundingClientRect();
  const index = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
  return [index((clientY - top) / height, map.length), index((clientX - left) / width, map[0].length)];
}

/** What images have in common whose bits can be compared. */
const conditionsKey = ({ model, conditions: { class: className, noise } }) =>
  [reference(model), className, noise].join();

/** The colour scale of a map, which paints it. */
function colourScale(reading, readings, layer) {
  const comparable = readings.filter((other) => other.score.map && conditionsKey(other) === conditionsKey(reading));
  const ramp = Array.from({ length: 64 }, (_, i) => i);
  const scale = pixelCanvas(heatmap([ramp], 0, 63), "Colour scale, from low to high");
  const ends = [h("span", { class: "mono" }), h("span", { class: "mono" })];
  const paint = () => {
    const [low, high] = bitsRange(sharedScale ? comparable : [reading]);
    const start = Math.min(0, low);
    layer.getContext("2d").putImageData(heatmap(reading.score.map, start, high), 0, 0);
    ends[0].textContent = start.toFixed(1);
    ends[1].textContent = high.toFixed(1);
  };
  const onchange = ({ target }) => {
    sharedScale = target.checked;
    paint();
  };
  paint();
  const checkbox = h("input", { type: "checkbox", checked: sharedScale, onchange });
  return [
    h("div", { class: "scale" }, ends[0], scale, ends[1]),
    comparable.length > 1 &&
      h("label", { class: "check" }, checkbox, "Same colour scale for all images under these conditions"),
  ];
}

/** [low, high] of the bits of maps, ignoring a share of the pixels at each end. */
function bitsRange(readings, clipped = CLIPPED) {
  const bits = readings.flatMap(({ score }) => score.map.flat()).sort((a, b) => a - b);
  return [clipped, 1 - clipped].map((share) => bits[Math.round(share * (bits.length - 1))]);
}

// Inferno by a polynomial of degree six (Matt Zucker, public domain).
const INFERNO = [
  [0.00022, 0.00165, -0.01948],
  [0.10651, 0.56396, 3.93271],
  [11.60249, -3.97285, -15.94239],
  [-41.70399, 17.43639, 44.35414],
  [77.16294, -33.40235, -81.80731],
  [-71.31943, 32.62606, 73.20952],
  [25.13113, -12.24267, -23.07033],
];

/** [r, g, b] of a number from 0 (dark) to 1 (bright). */
function colour(number) {
  const x = Math.min(1, Math.max(0, number));
  return [0, 1, 2].map((channel) => 255 * INFERNO.reduceRight((sum, row) => sum * x + row[channel], 0));
}

/** Rows of numbers as an ImageData, with the colours of `low` to `high`. */
export function heatmap(rows, low, high) {
  const image = new ImageData(rows[0].length, rows.length);
  rows.flat().forEach((number, i) => {
    image.data.set([...colour((number - low) / (high - low || 1)), 255], 4 * i);
  });
  return image;
}
