// The settings of a generation, shared by three views.

import { catalogue, reference } from "./catalogue.js";
import { announce, button, copyButton, greyLevels, h, plural, uid } from "./dom.js";
import { chips, selectField, slider } from "./fields.js";

const randomSeed = () => Math.floor(Math.random() * 1e6);

/**
 * Class, number of images, seed, and how to sample. `trajectory` omits settings without a trajectory; `classInDetails`
 * moves the class into the collapsed settings.
 */
export function settingsForm({
  maxImages = 64,
  images = 8,
  countLabel = "Images",
  steps = 1,
  trajectory = false,
  classInDetails = false,
}) {
  const classes = chips({ legend: "Class", options: [["", "any"]], value: "" });
  const count = slider({ label: countLabel, min: 1, max: maxImages, value: images });
  const seed = seedField();
  const refinement = refinementFields({ steps, trajectory });
  const tilt = tiltFields();
  const summary = `${classInDetails ? "Class, noise" : "Noise"}, solver${trajectory ? "" : ", guidance"} and more`;
  const details = h(
    "details",
    { open: trajectory },
    h("summary", {}, summary),
    classInDetails && classes.element,
    refinement.elements,
    !trajectory && tilt.elements,
  );

  function useModel() {
    const model = catalogue.current;
    if (!model) return;
    const selected = model.classes.includes(classes.value) ? classes.value : "";
    classes.offer([["", "any"], ...model.classes.map((name) => [name, name])], selected);
    classes.element.hidden = !model.classes.length;
    refinement.useModel(model);
    tilt.useModel(model);
  }
  catalogue.addEventListener("change", useModel);
  useModel();

  return {
    element: h("div", { class: "stack" }, !classInDetails && classes.element, count.element, seed.element, details),
    seed,
    /** The parameters of a request. Every one is explicit, so that they give the same images if defaults change. */
    read() {
      const model = catalogue.current;
      const parameters = {
        model: reference(model),
        n: count.value,
        seed: seed.value,
        ...refinement.read(model),
        ...(trajectory ? {} : tilt.read(classes.value)),
      };
      return classes.value ? { ...parameters, class: classes.value } : parameters;
    },
    /** Set the fields to the parameters of an earlier request. */
    write(parameters) {
      classes.value = parameters.class ?? "";
      count.value = parameters.n;
      refinement.write(parameters);
      tilt.write(parameters);
      details.open = true;
      seed.reuse(parameters.seed);
    },
  };
}

/** A seed field: it can be edited, randomised, copied, and kept for the next request. */
function seedField() {
  const id = uid();
  const limits = { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, required: true };
  const input = h("input", { type: "number", id, ...limits, value: randomSeed(), class: "mono" });
  const renewed = h("input", { type: "checkbox", checked: true });
  const renew = () => {
    input.value = randomSeed();
  };
  return {
    element: h(
      "div",
      { class: "field" },
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
    get value() {
      return Number(input.value);
    },
    /** Use a seed again: the next request keeps it. */
    reuse(seed) {
      input.value = seed;
      renewed.checked = false;
      announce(`Seed ${seed} is set`);
    },
    /** Called when a request has used the seed. */
    advance() {
      if (renewed.checked) renew();
    },
  };
}

/** The fields for initial noise, refinement steps and solver. */
function refinementFields({ steps: initialSteps, trajectory }) {
  const noise = slider({
    label: "Initial noise",
    term: "grey levels",
    min: trajectory ? 1 : 0,
    max: 10,
    step: 0.5,
    value: 10,
    words: greyLevels,
    onInput: update,
    hint: trajectory ? undefined : "Without noise, images are sampled directly and not refined.",
  });
  const minSteps = trajectory ? 4 : 1;
  const steps = slider({ label: "Refinement steps", min: minSteps, max: 32, value: initialSteps, onInput: update });
  const hint = h("p", { class: "hint" });
  const solver = selectField({ label: "Solver", term: "tweedie", onChange: update, hint });
  const effectiveSolver = (model) => solver.value || (steps.value === 1 ? model.solver : model.stepped_solver);

  function update() {
    const isDirect = noise.value === 0;
    if (solver.value === "tweedie") steps.value = 1;
    steps.enable(!isDirect && solver.value !== "tweedie");
    solver.enable(!isDirect);
    const model = catalogue.current;
    const isAutomatic = model && !isDirect && !solver.value;
    const stepsText = steps.value === 1 ? "one step" : `${steps.value} steps`;
    hint.textContent = isAutomatic ? `Automatic: ${effectiveSolver(model)} for ${stepsText}.` : "";
  }

  return {
    elements: [noise.element, steps.element, solver.element],
    read(model) {
      if (noise.value === 0) return { noise: 0 };
      return { noise: noise.value, steps: steps.value, solver: effectiveSolver(model) };
    },
    write(parameters) {
      noise.value = parameters.noise;
      if (parameters.steps) steps.value = parameters.steps;
      solver.value = parameters.solver ?? "";
      update();
    },
    useModel(model) {
      noise.limit(model.noise);
      noise.value = trajectory ? model.noise : (model.start_noise ?? model.noise);
      if (!trajectory && model.steps) steps.value = model.steps;
      const solvers = Object.keys(model.solvers).filter((name) => !(trajectory && name === "tweedie"));
      solver.offer([["", "automatic"], ...solvers.map((name) => [name, name])]);
      // heun adds no noise between steps, so that each frame follows from the previous one.
      if (trajectory && solvers.includes("heun")) solver.value = "heun";
      update();
    },
  };
}

/** The fields for guidance and temperature. */
function tiltFields() {
  const guidance = slider({
    label: "Guidance",
    term: "guidance",
    min: 0.5,
    max: 10,
    step: 0.5,
    value: 1,
    hint: "Acts on images of a class, and takes about three times the time.",
  });
  const temperature = slider({ label: "Temperature", term: "temperature", min: 0.5, max: 1.5, step: 0.05, value: 1 });
  return {
    elements: [guidance.element, temperature.element],
    /** The parameters; guidance only with a class, which it needs. */
    read(className) {
      return { temperature: temperature.value, ...(className && { guidance: guidance.value }) };
    },
    write(parameters) {
      guidance.value = parameters.guidance ?? guidance.value;
      temperature.value = parameters.temperature ?? temperature.value;
    },
    useModel(model) {
      guidance.value = model.guidance;
      temperature.value = model.temperature;
    },
  };
}

/** The parameters of a request in one line, with the class if there is one. */
export function settingsText({ class: className, seed, noise, steps, solver, guidance, temperature }) {
  const refinement = noise
    ? [`noise of ${greyLevels(noise)}`, `${plural(steps, "step")} of ${solver}`]
    : ["sampled directly"];
  const tilt = [
    (guidance ?? 1) !== 1 && `guidance ${guidance}`,
    (temperature ?? 1) !== 1 && `temperature ${temperature}`,
  ];
  return [className, `seed ${seed}`, ...refinement, ...tilt].filter(Boolean).join(" · ");
}

/** A title for the images that a request generates. */
export const imagesText = (parameters) =>
  parameters.class ? `${parameters.n} × ${parameters.class}` : plural(parameters.n, "image");
