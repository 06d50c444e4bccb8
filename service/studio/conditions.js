// The fields of a score: tiles, the class and noise level that it is conditioned on, and the calibration.

import { greyLevels, h } from "./dom.js";
import { selectField, slider } from "./fields.js";

export function conditionFields({ onTiledChange }) {
  const tiledInput = h("input", { type: "checkbox", onchange: onTiledChange });
  const classes = selectField({ label: "Class", field: "class" });
  const calibrations = selectField({ label: "Calibration", field: "calibration" });
  const noise = slider({
    label: "Noise level",
    field: "noise",
    term: "grey levels",
    min: 0,
    max: 10,
    step: 0.5,
    value: 0,
    words: greyLevels,
    hint: "Without noise, you get the exact likelihood of the image.",
  });
  const hint = "Class and noise level affect only the likelihood, not the verdict. They are ignored for tiles.";
  return {
    elements: [
      h("div", { "data-field": "tile" }, h("label", { class: "check" }, tiledInput, "Score in tiles (large images)")),
      h(
        "details",
        {},
        h("summary", {}, "Class, noise level and calibration"),
        classes.element,
        noise.element,
        h("p", { class: "hint" }, hint),
        calibrations.element,
      ),
    ],
    get tiled() {
      return tiledInput.checked;
    },
    /** The parameters of a request. */
    read() {
      if (tiledInput.checked) return { tile: 1 };
      return {
        class: classes.value || undefined,
        noise: noise.value || undefined,
        calibration: calibrations.value || undefined,
      };
    },
    useModel(model) {
      classes.offer([["", "none"], ...model.classes.map((name) => [name, name])]);
      noise.limit(model.noise);
      const names = Object.keys(model.calibrations ?? {}).filter((name) => name !== "default");
      calibrations.offer([["", "default"], ...names.map((name) => [name, name])]);
      calibrations.element.hidden = !names.length;
    },
  };
}
