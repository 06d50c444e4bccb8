// The map of an image: the bits of each pixel over what the model sees.

import { button, h, save, stem } from "./dom.js";
import { opacitySlider } from "./fields.js";
import { enlarge, pixelCanvas, toPng } from "./image.js";

const CLIPPED = 0.02; // share of pixels beyond each end of the colour scale
let sharedScale = false; // one colour scale for all maps, so that they can be compared

/** What the model saw of a reading, under its map. */
export function pixelMap(reading, readings) {
  const { modelView, score, name } = reading;
  const background = modelView && h("img", { src: modelView, alt: `${name} as the model sees it`, class: "pixels" });
  if (!score.map) return h("div", { class: "over" }, background);
  const [least, most] = bitsRange([reading], 0);
  const label = `Bits per dimension of each pixel, from ${least.toFixed(1)} to ${most.toFixed(1)}`;
  const layer = pixelCanvas(heatmap(score.map, least, most), label);
  const pixelValue = h("output", { class: "mono" }, " ");
  const showPixel = (event) => {
    pixelValue.textContent = pixelText(score.map, layer, event) ?? pixelValue.textContent;
  };
  const download = async () => save(await toPng(enlarge(layer)), `${stem(name)}-map.png`);
  return h(
    "div",
    { class: "stack map" },
    h("div", { class: "over", onpointermove: showPixel }, background, layer),
    opacitySlider(layer, modelView).element,
    colourScale(reading, readings, layer),
    h(
      "p",
      { class: "hint" },
      "Bits per dimension of each pixel, given the pixels before it. Bright pixels are unlikely. ",
      pixelValue,
    ),
    h("div", {}, button("Download map", download, "small")),
  );
}

/** The colour scale of a map, which paints it. */
function colourScale(reading, readings, layer) {
  const comparable = readings.filter(({ score }) => score.map);
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
    comparable.length > 1 && h("label", { class: "check" }, checkbox, "Same colour scale for all images"),
  ];
}

/** The value of the pixel under the pointer, or null. */
function pixelText(map, layer, { clientX, clientY }) {
  const box = layer.getBoundingClientRect();
  const column = Math.floor(((clientX - box.left) / box.width) * layer.width);
  const row = Math.floor(((clientY - box.top) / box.height) * layer.height);
  const bits = map[row]?.[column];
  return bits === undefined ? null : `row ${row + 1}, column ${column + 1}: ${bits.toFixed(2)} bits/dim`;
}

/** [low, high] of the bits of maps, without a share of the pixels at each end. */
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
function heatmap(rows, low, high) {
  const image = new ImageData(rows[0].length, rows.length);
  rows.flat().forEach((number, i) => {
    image.data.set([...colour((number - low) / (high - low || 1)), 255], 4 * i);
  });
  return image;
}
