// The sampling options (initial noise, refinement, solver, guidance and temperature), as form fields and as text.

import { catalogue } from "./catalogue.js";
import { greyLevels, h, plural } from "./dom.js";
import { explainGreyLevels, selectField, slider } from "./fields.js";
import { explainTerm } from "./terms.js";

const NOISE_STEP = 0.5; // grey levels
const MAX_STEPS = 32; // unless the default of a model is higher

/** The fields of all sampling options, whose values `read(model, className)` returns; see `settingsForm`. */
export function samplingFields({ steps = 1, trajectory = false }) {
  const refinement = refinementFields({ steps, trajectory });
  const tilt = tiltFields();
  return {
    elements: [refinement.elements, trajectory ? [] : tilt.elements], // a trajectory uses the defaults of its model
    read: (model, className) => ({ ...refinement.read(model), ...tilt.read(className) }),
    write(parameters) {
      refinement.write(parameters);
      tilt.write(parameters);
    },
    useModel(model) {
      refinement.useModel(model);
      tilt.useModel(model);
    },
  };
}

/** The defaults of a model in a sentence. */
export function defaultsText(model) {
  const { name, guidance, temperature, classes } = model;
  const noise = `noise of ${greyLevels(model.start_noise ?? model.noise)}`;
  const tilt = classes.length ? [`guidance ${guidance}`] : [];
  return `Defaults of ${name}: ${[noise, model.solver, ...tilt, `temperature ${temperature}`].join(", ")}.`;
}

/** The fields for initial noise, refinement steps and solver. */
function refinementFields({ steps: initialSteps, trajectory }) {
  const noise = slider({
    label: "Initial noise",
    field: "noise",
    explanation: explainGreyLevels(),
    min: trajectory ? NOISE_STEP : 0,
    max: 10,
    step: NOISE_STEP,
    value: 10,
    format: greyLevels,
    onInput: update,
    hint: trajectory ? undefined : "Without noise, images are sampled directly and not refined.",
  });
  const steps = slider({
    label: "Refinement steps",
    field: "steps",
    min: trajectory ? 4 : 1,
    max: MAX_STEPS,
    value: initialSteps,
    onInput: update,
  });
  const hint = h("p", { class: "hint" });
  const solver = selectField({
    label: "Solver",
    field: "solver",
    explanation: explainTerm("solver"),
    onChange: update,
    hint,
  });
  const effectiveSolver = (model) =>
    solver.value || ([1, model.steps].includes(steps.value) ? model.solver : model.stepped_solver);

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
      if (!trajectory) {
        const defaultSteps = model.steps ?? model.solvers[model.solver] ?? 1;
        steps.limit(Math.max(MAX_STEPS, defaultSteps));
        steps.value = defaultSteps;
      }
      const solvers = Object.keys(model.solvers).filter((name) => !(trajectory && name === "tweedie"));
      solver.offer([["", "automatic"], ...solvers.map((name) => [name, name])]);
      // heun adds no noise between steps, so that each frame follows from the previous one.
      solver.value = trajectory && solvers.includes("heun") ? "heun" : "";
      update();
    },
  };
}

/** The fields for guidance and temperature. */
function tiltFields() {
  const guidance = slider({
    label: "Guidance",
    field: "guidance",
    explanation: explainTerm("guidance"),
    min: 0.5,
    max: 10,
    step: 0.5,
    value: 1,
    hint: "Needs a class. Values other than 1 take about three times as long.",
  });
  const temperature = slider({
    label: "Temperature",
    field: "temperature",
    explanation: explainTerm("temperature"),
    min: 0.5,
    max: 1.5,
    step: 0.05,
    value: 1,
  });
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
export const settingsText = ({ class: className, seed, ...sampling }) =>
  [className, `seed ${seed}`, ...samplingParts(sampling)].filter(Boolean).join(" · ");

/** The sampling options in which a request differs from another one, as text. */
export function differenceText(parameters, others) {
  const otherParts = samplingParts(others, true);
  return samplingParts(parameters, true)
    .filter((part) => !otherParts.includes(part))
    .join(" · ");
}

/** The sampling options of a request as texts; those that change nothing are omitted unless `isComplete`. */
function samplingParts({ noise, steps, solver, guidance, temperature }, isComplete = false) {
  const refinement = noise
    ? [`noise of ${greyLevels(noise)}`, `${plural(steps, "step")} of ${solver}`]
    : ["sampled directly"];
  const isShown = (value) => value !== undefined && (isComplete || value !== 1);
  const tilt = [isShown(guidance) && `guidance ${guidance}`, isShown(temperature) && `temperature ${temperature}`];
  return [...refinement, ...tilt].filter(Boolean);
}

/** A title for the images that a request generates. */
export const imagesText = (parameters) =>
  parameters.class ? `${parameters.n} × ${parameters.class}` : plural(parameters.n, "image");
