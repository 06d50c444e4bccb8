// Pictures of what a detector finds and misses: altered good images on one sheet.

import { requestBlob } from "./api.js";
import { reference } from "./catalogue.js";
import { h } from "./dom.js";
import { failure } from "./feedback.js";
import { createCanvas, withBitmap } from "./image.js";

const PICTURES_HINT =
  "Of each alteration, the first image that is missed and the first that is found. Marks surround what has changed; " +
  "where that is the whole image, the left half is unaltered.";

/** The examples of a detector's power: `row` returns those of a kind of alteration, drawn once they are loaded. */
export function powerPictures(model) {
  const shown = model.detector.power.pictures;
  const notice = h("div", { class: "hint" });
  if (!shown) return { notice: null, row: () => null };
  const canvases = new Map(shown.examples.map((example) => [example, createCanvas(example.width, example.height)]));
  async function load() {
    try {
      notice.replaceChildren("Loading the pictures");
      await withBitmap(await requestBlob(`models/${encodeURIComponent(reference(model))}/pictures`), draw);
      notice.replaceChildren(PICTURES_HINT);
    } catch (error) {
      notice.replaceChildren(failure(error, load));
    }
  }
  function draw(sheet) {
    for (const [{ left, top, width, height }, [, context]] of canvases) {
      context.drawImage(sheet, left, top, width, height, 0, 0, width, height);
    }
  }
  load();
  const row = (kind) => {
    const examples = shown.examples.filter((example) => example.kind === kind);
    const missedFirst = examples.toSorted((a, b) => a.is_found - b.is_found);
    const figures = missedFirst.map((example) => pictureFigure(example, canvases.get(example)[0]));
    return figures.length > 0 && h("tr", {}, h("td", { colspan: 2 }, h("div", { class: "pictures" }, figures)));
  };
  return { notice, row };
}

function pictureFigure({ kind, size, is_found: found }, canvas) {
  const outcome = found ? "found" : "missed";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${kind}, ${size}: ${outcome}`);
  return h(
    "figure",
    {},
    canvas,
    h("figcaption", {}, h("span", { class: found ? "badge" : "badge weak" }, outcome), ` ${size}`),
  );
}
