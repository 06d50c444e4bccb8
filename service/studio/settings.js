// The settings of a generation, used by three views.

import { Refusal } from "./api.js";
import { catalogue, reference } from "./catalogue.js";
import { chips } from "./chips.js";
import { copyButton } from "./copy.js";
import { announce, button, h, uid } from "./dom.js";
import { slider } from "./fields.js";
import { defaultsText, samplingFields } from "./sampling.js";

const randomSeed = () => Math.floor(Math.random() * 1e6);

/**
 * Class, number of images, seed, and sampling options. `trajectory` omits options that have no trajectory;
 * `classInDetails` moves the class into the collapsed settings; `comparable` offers a second set of options.
 */
export function settingsForm({
  maxImages = 64,
  images = 8,
  countLabel = "Images",
  steps = 1,
  trajectory = false,
  classInDetails = false,
  comparable = false,
}) {
  const classes = chips({ legend: "Class", field: "class", options: [["", "any"]], value: "" });
  const count = countField(countLabel, images, maxImages);
  const seed = seedField();
  const sampling = samplingFields({ steps, trajectory });
  const other = comparable ? otherSettings() : null;
  const summary = `${classInDetails ? "Class, noise" : "Noise"}, solver${trajectory ? "" : ", guidance"} and more`;
  const reset = button("Use defaults", () => sampling.useModel(catalogue.current), "small");
  const details = h(
    "details",
    { open: trajectory },
    h("summary", {}, summary),
    classInDetails && classes.element,
    sampling.elements,
    !trajectory && h("div", { class: "row defaults" }, defaultsLine(), reset),
  );

  let lastModel = ""; // the reference of the model whose defaults were set: a new calibration of it changes no field
  function useModel() {
    const model = catalogue.current;
    if (!model) return;
    const selected = model.classes.includes(classes.value) ? classes.value : "";
    classes.offer([["", "any"], ...model.classes.map((name) => [name, name])], selected);
    classes.element.hidden = !model.classes.length;
    if (lastModel === reference(model)) return;
    lastModel = reference(model);
    sampling.useModel(model);
    other?.useModel(model);
  }
  catalogue.addEventListener("change", useModel);
  useModel();

  /** The parameters of a request. Every one is explicit, so that they give the same images if defaults change. */
  function parameters(fields, seedValue) {
    const model = catalogue.current;
    const request = { model: reference(model), n: count.value, seed: seedValue, ...fields.read(model, classes.value) };
    return classes.value ? { ...request, class: classes.value } : request;
  }

  const elements = [!classInDetails && classes.element, count.element, seed.element, details, other?.element];
  return {
    element: h("div", { class: "stack" }, elements),
    seed,
    read: () => parameters(sampling, seed.next()),
    /** The parameters of one request, or of two that are to be compared. */
    readAll() {
      const seedValue = seed.next();
      const [first, second] = [sampling, other.fields].map((fields) => fields && parameters(fields, seedValue));
      if (!second) return [first];
      if (JSON.stringify(first) !== JSON.stringify(second)) return [first, second];
      throw new Refusal("Both sets of settings are identical.", { remedy: "Change one of them.", fields: ["other"] });
    },
    /** Set the fields to the parameters of an earlier request. */
    write(earlier) {
      catalogue.selectVersion(earlier.model);
      other?.close();
      classes.value = earlier.class ?? "";
      count.value = earlier.n;
      sampling.write(earlier);
      details.open = true;
      seed.reuse(earlier.seed);
    },
  };
}

/** The defaults of the current model in a sentence; `ncml tune` changes them. */
function defaultsLine() {
  const element = h("p", { class: "hint grow" });
  const show = () => {
    if (catalogue.current) element.textContent = defaultsText(catalogue.current);
  };
  for (const event of ["change", "list"]) catalogue.addEventListener(event, show);
  show();
  return element;
}

/** The number of images, at most as many as the service accepts. */
function countField(label, value, maxImages) {
  const count = slider({ label, field: "n", min: 1, max: maxImages, value });
  const limit = () => count.limit(Math.min(maxImages, catalogue.maxImages));
  catalogue.addEventListener("list", limit);
  limit();
  return count;
}

/** A checkbox that shows a second set of sampling options; `fields` is null while they are hidden. */
function otherSettings() {
  const holder = h("div");
  let fields = null;
  function toggle() {
    fields = input.checked ? samplingFields({ steps: 1 }) : null;
    if (fields && catalogue.current) fields.useModel(catalogue.current);
    const legend = h("legend", {}, "Other settings, for the same seeds");
    holder.replaceChildren(...(fields ? [h("fieldset", { class: "other stack" }, legend, fields.elements)] : []));
  }
  const input = h("input", { type: "checkbox", onchange: toggle });
  return {
    element: h(
      "div",
      { class: "field", "data-field": "other" },
      h("label", { class: "check" }, input, "Compare with other settings"),
      holder,
    ),
    get fields() {
      return fields;
    },
    useModel: (model) => fields?.useModel(model),
    close() {
      input.checked = false;
      toggle();
    },
  };
}

/** A seed field. It shows the seed of the latest images; the next request uses a new one unless the user keeps it. */
function seedField() {
  const id = uid();
  const limits = { min: 0, max: 2 ** 32 - 1, step: 1, required: true };
  const input = h("input", { type: "number", id, ...limits, value: randomSeed(), class: "mono" });
  const renewed = h("input", { type: "checkbox", checked: true });
  let used = null;
  const renew = () => {
    input.value = randomSeed();
  };
  return {
    element: h(
      "div",
      { class: "field", "data-field": "seed" },
      h("label", { for: id }, "Seed"),
      h(
        "div",
        { class: "row start" },
        input,
        button("New", renew, "small"),
        copyButton("Copy", () => input.value, "small"),
      ),
      h("label", { class: "check" }, renewed, "New seed for every run"),
    ),
    /** The seed for a request: a new one if the field still shows that of the last one. */
    next() {
      if (renewed.checked && Number(input.value) === used) renew();
      return Number(input.value);
    },
    /** Use a seed again, also for the next request. */
    reuse(seed) {
      input.value = seed;
      renewed.checked = false;
      announce(`Seed ${seed} is set`);
    },
    /** Record that a request has used a seed; the field may show another one by now. */
    markUsed(seed) {
      used = seed;
    },
  };
}
