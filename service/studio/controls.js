// The settings of a drawing, which three views share.

import { catalogue } from "./catalogue.js";
import { CARDS, card } from "./picture.js";
import { announce, button, chips, complain, copier, h, plural, slider, uid, why } from "./ui.js";

export const grey = (value) => (value === 0 ? "none" : `${value} grey level${value === 1 ? "" : "s"}`);
const randomSeed = () => Math.floor(Math.random() * 1e6);

/** Buttons that hand test cards to `take`; what goes wrong is told in `trouble`. */
export function cards(take, trouble, names = Object.keys(CARDS)) {
  return h("div", { class: "field" }, h("p", { class: "hint" }, "Or try a test card:"), h("div", { class: "row start" }, names.map((name) => button(name, async () => {
    try {
      const { width, height } = catalogue.need();
      await take([await card(name, width, height)]);
    } catch (error) {
      complain(trouble, error);
    }
  }, "small"))));
}

/** A seed: shown, copied, drawn anew, or kept from one drawing to the next. */
function seedField() {
  const id = uid();
  const input = h("input", { type: "number", id, min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, value: randomSeed(), required: true, class: "mono" });
  const fresh = h("input", { type: "checkbox", checked: true });
  const self = {
    el: h("div", { class: "field" }, h("label", { for: id }, "Seed"),
      h("div", { class: "row start" }, input, button("New", () => (input.value = randomSeed()), "small"), copier("Copy", () => input.value, "small")),
      h("label", { class: "check" }, fresh, "A new seed for every drawing")),
    input,
    get value() { return Number(input.value); },
    /** Use a seed again: the next drawing keeps it. */
    reuse(seed) {
      input.value = seed;
      fresh.checked = false;
      announce(`Seed ${seed} is set`);
    },
    /** Called once a drawing has taken the seed. */
    next() { if (fresh.checked) input.value = randomSeed(); },
  };
  return self;
}

/**
 * Class, number, seed, noise, steps and solver. `most` pictures; `few` is the number to begin with; `trajectory` leaves
 * out what has no trajectory; `aside` puts the class among what is rarely set.
 */
export function settings({ most = 64, few = 8, steps: firstSteps = 1, trajectory = false, count = "Pictures", aside = false }) {
  const classes = chips({ legend: "Class", options: [["", "any"]], value: "" });
  const number = slider({ label: count, min: 1, max: most, value: few });
  const seed = seedField();
  const noise = slider({ label: "Start noise", about: "grey levels", min: trajectory ? 1 : 0, max: 10, step: 0.5, value: 10, words: grey, oninput: tell,
    hint: trajectory ? undefined : "None: sampled directly, with nothing to refine." });
  const steps = slider({ label: "Refinement steps", min: trajectory ? 4 : 1, max: 32, value: firstSteps, oninput: tell });
  const id = uid();
  const solver = h("select", { id, onchange: tell });
  const solverHint = h("p", { class: "hint" });
  const more = h("details", {}, h("summary", {}, aside ? "Class, noise, steps and solver" : "Noise, steps and solver"), aside && classes.el, noise.el, steps.el,
    h("div", { class: "field" }, h("span", {}, h("label", { for: id }, "Solver"), why("tweedie")), solver, solverHint));
  more.open = trajectory;

  const model = () => catalogue.current;
  const meant = () => solver.value || (steps.value === 1 ? model().solver : model().stepped_solver);

  function tell() {
    const direct = noise.value === 0;
    steps.enable(!direct && solver.value !== "tweedie");
    if (solver.value === "tweedie") steps.value = 1;
    solver.disabled = direct;
    if (model()) solverHint.textContent = direct ? "" : solver.value ? "" : `Automatic: ${meant()} for ${steps.value === 1 ? "one step" : `${steps.value} steps`}.`;
  }

  function adopt() {
    if (!model()) return;
    const chosen = classes.value;
    classes.offer([["", "any"], ...model().classes.map((name) => [name, name])], model().classes.includes(chosen) ? chosen : "");
    classes.el.hidden = !model().classes.length;
    noise.limit(model().noise);
    noise.value = model().noise;
    const solvers = Object.keys(model().solvers).filter((name) => !(trajectory && name === "tweedie"));
    solver.replaceChildren(h("option", { value: "" }, "automatic"), ...solvers.map((name) => h("option", { value: name }, name)));
    if (trajectory && solvers.includes("heun")) solver.value = "heun"; // adds no noise on its way, so that each moment follows from the last
    tell();
  }
  catalogue.addEventListener("change", adopt);
  adopt();

  return {
    el: h("div", { class: "stack" }, !aside && classes.el, number.el, seed.el, more),
    seed,
    /** What to ask for, everything said: the same words give the same picture under later defaults, too. */
    read() {
      const asked = { model: `${model().name}@${model().version.slice(0, 12)}`, n: number.value, seed: seed.value, noise: noise.value };
      if (classes.value) asked.class = classes.value;
      return noise.value === 0 ? asked : { ...asked, steps: steps.value, solver: meant() };
    },
    /** Set everything as a former drawing had it. */
    write(asked) {
      classes.value = asked.class ?? "";
      number.value = asked.n;
      noise.value = asked.noise;
      if (asked.steps) steps.value = asked.steps;
      solver.value = asked.solver ?? "";
      more.open = true;
      seed.reuse(asked.seed);
      tell();
    },
  };
}

/** The settings of a drawing in a line; its class where there is one. */
export function spoken(asked) {
  const refined = asked.noise ? [`from ${grey(asked.noise)}`, `${plural(asked.steps, "step")} of ${asked.solver}`] : ["sampled directly"];
  return [asked.class, `seed ${asked.seed}`, ...refined].filter(Boolean).join(" · ");
}
