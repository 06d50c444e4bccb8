// Example images that show what a likelihood measures.

import { requestBlob } from "./api.js";
import { catalogue } from "./catalogue.js";
import { disable, h } from "./dom.js";
import { showFailure } from "./feedback.js";
import { pixelCanvas, toPng } from "./image.js";

// Painted at the model's size: [r, g, b] of each pixel. The photograph is a file: Chelsea by Stefan van der Walt, CC0.
const PAINTERS = {
  "flat grey": () => [128, 128, 128],
  gradient: ({ x, y }) => [40 + 180 * x, 60 + 150 * y, 200 - 120 * x],
  stripes: ({ column }) => (column % 4 < 2 ? [226, 214, 190] : [38, 66, 84]),
  noise: () => [0, 1, 2].map(() => 256 * Math.random()),
};
const PHOTOGRAPH = "photo";
export const EXAMPLES = [PHOTOGRAPH, ...Object.keys(PAINTERS)];

/** The file of an example. */
export async function exampleFile(name, width, height) {
  if (name === PHOTOGRAPH) {
    return new File([await requestBlob("studio/chelsea.jpg", { isQuick: false })], "chelsea.jpg", {
      type: "image/jpeg",
    });
  }
  const blob = await toPng(pixelCanvas(paint(name, width, height), name));
  return new File([blob], `${name.replace(" ", "-")}.png`, { type: "image/png" });
}

function paint(name, width, height) {
  const image = new ImageData(width, height);
  for (let row = 0; row < height; row += 1) {
    for (let column = 0; column < width; column += 1) {
      const colour = PAINTERS[name]({ x: column / width, y: row / height, column });
      image.data.set([...colour, 255], 4 * (row * width + column));
    }
  }
  return image;
}

/**
 * Buttons with a thumbnail of each example, which pass its file to `onFiles`; failures are reported in `notice`. They
 * are disabled while one is loaded, and while `isBusy()`; `update` must be called when that changes.
 */
export function exampleButtons({ names = EXAMPLES, hint, onFiles, notice, isBusy = () => false }) {
  let isLoading = false;
  async function passFile(name) {
    isLoading = true;
    update();
    try {
      const { width, height } = await catalogue.requireCurrent();
      await onFiles([await exampleFile(name, width, height)]);
    } catch (error) {
      showFailure(notice, error);
    }
    isLoading = false;
    update();
  }
  const thumbnail = (name) =>
    name === PHOTOGRAPH
      ? h("img", { src: "studio/chelsea.jpg", alt: "", width: 44, height: 44 })
      : pixelCanvas(paint(name, 16, 16), "");
  const buttons = names.map((name) =>
    h("button", { type: "button", onclick: () => passFile(name) }, thumbnail(name), h("span", {}, name)),
  );
  const items = buttons.map((element) => h("li", {}, element));
  function update() {
    for (const element of buttons) disable(element, isLoading || isBusy());
  }
  const element = h("div", { class: "field" }, h("p", { class: "hint" }, hint), h("ul", { class: "examples" }, items));
  return { element, update };
}
