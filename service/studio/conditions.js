// The fields of a score: tiles, the class and noise level that it is conditioned on, and the calibration.

import { Refusal } from "./api.js";
import { greyLevels, h } from "./dom.js";
import { explainGreyLevels, numberField, selectField, slider } from "./fields.js";

export function conditionFields({ onChange }) {
  let isDetector = false;
  const tiles = tileFields(() => {
    show();
    onChange();
  });
  const classes = selectField({ label: "Class", field: "class" });
  const calibrations = selectField({ label: "Calibration", field: "calibration", onChange });
  const noise = slider({
    label: "Noise level",
    field: "noise",
    explanation: explainGreyLevels(),
    min: 0,
    max: 10,
    step: 0.5,
    value: 0,
    format: greyLevels,
    hint: "Without noise, you get the exact likelihood of the image.",
  });
  const details = h(
    "details",
    {},
    h("summary", {}, "Class, noise level and calibration"),
    classes.element,
    noise.element,
    h("p", { class: "hint" }, "Class and noise level affect only the likelihood, not the verdict."),
    calibrations.element,
  );
  /** Hide what has no effect on tiles, or on the verdict of a detector. */
  function show() {
    details.hidden = tiles.value !== null || (isDetector && calibrations.element.hidden);
  }
  return {
    elements: [tiles.elements, details],
    /** How images are split into tiles: {size} with the chosen size, if any; null if they are not. */
    get tiles() {
      return tiles.value;
    },
    /** The parameters of a request; throws a `Refusal` if the size of tiles is invalid. */
    read() {
      tiles.check();
      if (tiles.value) return { tile: 1, tile_size: tiles.value.size };
      if (details.hidden) return {};
      return {
        class: classes.value || undefined,
        noise: noise.value || undefined,
        calibration: calibrations.value || undefined,
      };
    },
    /** Whether a detector gives the verdict, on whole images at their own size. */
    get isDetection() {
      return isDetector && !tiles.value && !calibrations.value;
    },
    useModel(model) {
      isDetector = Boolean(model.detector);
      classes.offer([["", "none"], ...model.classes.map((name) => [name, name])]);
      noise.limit(model.noise);
      const first = isDetector ? "detector" : "default";
      const names = Object.keys(model.calibrations).filter((name) => name !== first);
      calibrations.offer([["", first], ...names.map((name) => [name, name])]);
      calibrations.element.hidden = !names.length;
      tiles.useModel(model);
      show();
    },
  };
}

/** Whether images are split into tiles, and the size of these unless their calibration determines it. */
function tileFields(onChange) {
  const onchange = () => {
    show();
    onChange();
  };
  const input = h("input", { type: "checkbox", onchange });
  const size = numberField({
    label: "Tile size in pixels",
    field: "tile_size",
    placeholder: "auto",
    oninput: onChange,
    hint: "The shorter side of a tile. Larger tiles are scored faster, but hide small details.",
  });
  const label = h("label", { class: "check" }, input, "Score in tiles (large images)");
  const checkbox = h("div", { "data-field": "tile" }, label);
  let areCalibrated = false;
  function show() {
    size.element.hidden = !input.checked || areCalibrated;
  }
  show();
  return {
    elements: [checkbox, size.element],
    get value() {
      if (!input.checked) return null;
      return { size: size.element.hidden || !size.isValid ? undefined : size.value };
    },
    check() {
      if (size.element.hidden || size.isValid) return;
      const message = `The tile size must be a whole number, at least ${size.min}.`;
      throw new Refusal(message, { remedy: "Or leave it empty.", fields: ["tile_size"] });
    },
    useModel(model) {
      size.min = Math.min(model.width, model.height);
      areCalibrated = Boolean(model.tiles);
      checkbox.hidden = Boolean(model.detector) && !areCalibrated && !model.calibration; // they would be refused
      if (checkbox.hidden) input.checked = false;
      show();
    },
  };
}
