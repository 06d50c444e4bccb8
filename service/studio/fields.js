// Form fields: sliders, a drop zone, and explanations of terms.

import { button, h, uid } from "./dom.js";

/** A question-mark button that explains a term in a text. */
export function explain(term, text) {
  const id = uid();
  const explanation = h("span", { popover: "auto", id, class: "explanation" }, text);
  const place = () => {
    const [{ left, top, bottom }, { clientWidth, clientHeight }] = [
      questionMark.getBoundingClientRect(),
      document.documentElement,
    ];
    const x = Math.max(12, Math.min(left - 20, clientWidth - 332));
    const fitsBelow = bottom < clientHeight - 240;
    const y = scrollY + (fitsBelow ? bottom + 8 : top - 8);
    explanation.style.inset = `${y}px auto auto ${x}px`;
    explanation.style.translate = fitsBelow ? "" : "0 -100%";
  };
  const questionMark = h(
    "button",
    { type: "button", class: "explain", popovertarget: id, "aria-label": `Explain ${term}`, onclick: place },
    "?",
  );
  return [questionMark, explanation];
}

export const explainGreyLevels = () =>
  explain(
    "grey levels",
    "A colour value is one of 256 levels, from 0 to 255. " +
      "Noise of 10 grey levels moves each value by about 10, up or down.",
  );

/**
 * A labelled slider for the parameter `field`. `format(value)` is its text; `explanation` stands beside the label. A
 * value that is set is kept exactly, also between two steps.
 */
export function slider({ label, field, explanation, min, max, step = 1, value, format = String, hint, onInput }) {
  const [id, hintId] = [uid(), hint && uid()];
  const output = h("output", { for: id, "aria-live": "off" });
  let [exact, maximum] = [value, max];
  const oninput = () => {
    exact = Math.min(Number(input.value), maximum);
    show();
    onInput?.();
  };
  const input = h("input", { type: "range", id, min, max, step, value, "aria-describedby": hintId, oninput });
  const heading = h("span", {}, h("label", { for: id }, label), explanation);

  function show() {
    const text = format(exact);
    output.textContent = text;
    input.setAttribute("aria-valuetext", text);
    const range = Number(input.max) - Number(input.min);
    input.style.setProperty("--fill", range > 0 ? (Number(input.value) - Number(input.min)) / range : 1);
  }
  function set(next) {
    exact = next;
    input.value = next < maximum ? next : input.max;
    show();
  }
  show();

  return {
    element: h(
      "div",
      { class: "field", "data-field": field },
      h("div", { class: "row" }, heading, output),
      input,
      hint && h("p", { class: "hint", id: hintId }, hint),
    ),
    get value() {
      return exact;
    },
    set value(next) {
      set(next);
    },
    limit(next) {
      maximum = next;
      input.max = step * Math.ceil(next / step); // the last step reaches a maximum between two steps
      set(Math.min(exact, next));
    },
    enable(enabled) {
      input.disabled = !enabled;
    },
  };
}

/** A labelled select; `offer` replaces its [value, label] options and keeps the selected one if it is among them. */
export function selectField({ label, field, explanation, onChange, hint }) {
  const id = uid();
  const select = h("select", { id, onchange: onChange });
  return {
    element: h(
      "div",
      { class: "field", "data-field": field },
      h("span", {}, h("label", { for: id }, label), explanation),
      select,
      hint,
    ),
    offer(options) {
      const selected = select.value;
      const option = ([value, text]) => h("option", { value, selected: value === selected }, text);
      select.replaceChildren(...options.map(option));
    },
    enable(enabled) {
      select.disabled = !enabled;
    },
    get value() {
      return select.value;
    },
    set value(next) {
      select.value = next;
    },
  };
}

/** A labelled number field; further `attributes` are those of its input. */
export function numberField({ label, field, hint, ...attributes }) {
  const [id, hintId] = [uid(), uid()];
  const input = h("input", { type: "number", id, "aria-describedby": hintId, ...attributes });
  return {
    element: h(
      "div",
      { class: "field", "data-field": field },
      h("label", { for: id }, label),
      input,
      h("p", { class: "hint", id: hintId }, hint),
    ),
    /** The number; undefined if the field is empty. */
    get value() {
      return input.value === "" ? undefined : Number(input.value);
    },
    get isValid() {
      return input.validity.valid;
    },
    get min() {
      return input.min;
    },
    set min(minimum) {
      input.min = minimum;
    },
  };
}

/** A button that selects the files of a whole folder. */
export function folderButton(onFiles) {
  const onchange = () => {
    onFiles([...input.files]);
    input.value = "";
  };
  const input = h("input", { type: "file", webkitdirectory: true, onchange });
  return button("Select a folder", () => input.click(), "small");
}

/** An area to drop or select image files; with the class `filled`, it shrinks to one line with `filledTitle`. */
export function dropZone({ title, filledTitle, text, multiple, accept = "image/*,.tif,.tiff", onFiles }) {
  const onchange = () => {
    onFiles([...input.files]);
    input.value = "";
  };
  const input = h("input", {
    type: "file",
    accept,
    multiple,
    class: "visually-hidden",
    onchange,
  });
  const arrow = h("path", { d: "M12 16V5m-4 4l4-4 4 4M5 15v4h14v-4" });
  const zone = h(
    "label",
    { class: "drop" },
    input,
    h("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, arrow),
    h("span", { class: "strong empty-title" }, title),
    h("span", { class: "hint" }, text),
    h("span", { class: "strong filled-title" }, filledTitle),
  );
  const highlights = { dragenter: true, dragover: true, dragleave: false, drop: false };
  for (const [event, highlighted] of Object.entries(highlights)) {
    zone.addEventListener(event, () => zone.classList.toggle("over", highlighted));
  }
  return zone;
}
