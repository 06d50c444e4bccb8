// Models and health: a table of the models with their details, and the load on the service.

import { averageBpd } from "./average.js";
import { catalogue, reference } from "./catalogue.js";
import { modelDetails } from "./details.js";
import { button, h, plural, uid } from "./dom.js";
import { emptyState, failure } from "./feedback.js";
import { lanesTable, latencyTable } from "./health.js";
import { detected, foundSizes, missed, missedKinds } from "./power.js";

const HEADINGS = ["Model", "Size", "Classes", "Bits/dim", "Verdicts"];
const MOST_LISTED = 20; // models, until all are wanted: hundreds take as many screens, and health is below them
const expanded = new Set(); // the references of models

export function mount(host) {
  const health = h("div", { class: "health" });
  const models = modelTable();
  const finder = modelFinder(showModels);
  const placeholder = emptyState(
    "No models",
    "Models appear here when a worker has loaded them, a few seconds after it starts.",
  );
  const calibrate = h("a", { class: "button", href: "#calibrate" }, "Calibrate a model on your own images");
  const unusable = h("div", { class: "stack offer" });
  host.append(
    finder.element,
    models.element,
    placeholder,
    unusable,
    h("p", { class: "offer" }, calibrate),
    h("h2", {}, "Health"),
    health,
  );
  catalogue.addEventListener("list", showModels);
  showModels();

  function showModels() {
    models.show(finder.select(catalogue.models));
    placeholder.hidden = catalogue.models.length > 0;
    const faults = Object.entries(catalogue.unusable).filter(([name]) => finder.matches(name));
    unusable.replaceChildren(
      ...faults.map(([name, remedy]) => failure({ message: `${name} cannot be used`, remedy, calm: true })),
    );
  }

  return {
    /** Show the metrics of the service, or null if they are not available. */
    showHealth(metrics) {
      const unavailable = h("p", { class: "hint" }, "Not available: the metrics of the service cannot be loaded.");
      update(health, metrics ? [lanesTable(metrics), latencyTable(metrics)] : [unavailable]);
    },
  };
}

/** A field that finds models by parts of their names; without it, some of many models are listed, or all of them. */
function modelFinder(onChange) {
  const id = uid();
  const input = h("input", { type: "search", id, autocomplete: "off", spellcheck: "false", oninput: onChange });
  const count = h("span", { class: "hint", role: "status" });
  let listsAll = false;
  function toggle() {
    listsAll = !listsAll;
    onChange();
  }
  const all = button("", toggle, "small");
  const element = h(
    "div",
    { class: "field find", hidden: true },
    h("label", { for: id }, "Find a model by a part of its name"),
    h("div", { class: "row start" }, input, count, all),
  );

  function matches(name) {
    const words = input.value.toLowerCase().split(/\s+/);
    return words.every((word) => name.toLowerCase().includes(word));
  }

  /** Return the models that are listed, and show how many they are. */
  function select(models) {
    const found = models.filter((model) => matches(catalogue.label(model)));
    const listed = listsAll ? found : found.slice(0, MOST_LISTED);
    const text = `${listed.length} of ${plural(models.length, "model")}`;
    if (count.textContent !== text) count.textContent = text; // a repeated status would be announced again
    all.textContent = listsAll ? `List ${MOST_LISTED}` : `List all ${found.length}`;
    all.hidden = found.length <= MOST_LISTED;
    element.hidden = models.length + Object.keys(catalogue.unusable).length <= MOST_LISTED;
    return listed;
  }
  return { element, matches, select };
}

/** Show elements in `host`. A table that is already there only gets new rows, so that it keeps its scroll and focus. */
function update(host, elements) {
  const merged = elements.map((element, i) => {
    const [shown, rows] = [host.children[i], element.querySelector("tbody")];
    const body = shown?.querySelector("tbody");
    if (!body || !rows) return element;
    body.replaceWith(rows);
    return shown;
  });
  const isSame = merged.length === host.children.length && merged.every((element, i) => element === host.children[i]);
  if (!isSame) host.replaceChildren(...merged);
}

/** A table of models. The rows of a model stay until it changes, and with them the focus and an open card. */
function modelTable() {
  const head = h(
    "tr",
    {},
    HEADINGS.map((heading, i) => h("th", { scope: "col", class: isWide(i) }, heading)),
  );
  const caption = h("caption", { class: "visually-hidden" }, "Models");
  const element = h("table", { class: "models" }, caption, h("thead", {}, head));
  const bodies = new Map(); // {key, body} of each model, by its reference

  function bodyOf(model) {
    const { batching, ...shownParts } = model; // it is known seconds after a model appears, and nothing shows it
    const key = JSON.stringify([catalogue.label(model), shownParts]);
    const shown = bodies.get(reference(model));
    if (shown?.key === key) return shown.body;
    const body = h("tbody", {}, modelRows(model));
    bodies.set(reference(model), { key, body });
    if (shown) replace(shown.body, body);
    return body;
  }

  function show(models) {
    const shown = models.map(bodyOf);
    for (const [name, { body }] of bodies) {
      if (shown.includes(body)) continue;
      body.remove();
      bodies.delete(name); // its reviews would not follow changes
    }
    shown.forEach((body, i) => {
      const next = element.tBodies[i] ?? null;
      if (next !== body) element.insertBefore(body, next); // moving a body would cost it the focus
    });
    element.hidden = !models.length;
  }
  return { element, show };
}

/**
 * Replace the body of a model that has changed: an open card stays open, the name that is typed for a new version stays,
 * and the focus moves to the model's button.
 */
function replace(body, successor) {
  const [card, nextCard] = [body, successor].map((rows) => rows.querySelector("details"));
  if (card?.open && nextCard) nextCard.open = true;
  const [name, nextName] = [body, successor].map((rows) => rows.querySelector("input"));
  if (name && nextName) nextName.value = name.value;
  const isFocused = body.contains(document.activeElement);
  body.replaceWith(successor);
  if (isFocused) successor.querySelector("button").focus();
}

/** The class of columns that only wide screens show. */
const isWide = (i) => i > 0 && i < HEADINGS.length - 1 && "wide";

/** The row of a model, and the one with its details. */
function modelRows(model) {
  const id = uid();
  const key = reference(model);
  const cell = h("td", { colspan: HEADINGS.length });
  const details = h("tr", { id, class: "details" }, cell);
  const toggle = h(
    "button",
    { type: "button", class: "expand", "aria-controls": id, onclick: () => expand(!expanded.has(key)) },
    catalogue.label(model),
  );
  function expand(isExpanded) {
    if (isExpanded) expanded.add(key);
    else expanded.delete(key);
    if (isExpanded && !cell.children.length) cell.append(useLink(model), modelDetails(model));
    toggle.setAttribute("aria-expanded", isExpanded);
    details.hidden = !isExpanded;
  }
  expand(expanded.has(key));
  const cells = [
    model.detector ? "any" : `${model.width} × ${model.height}`,
    classCount(model),
    averageBpd(model)?.bpd ?? "–",
    verdictsCell(model),
  ];
  const row = h(
    "tr",
    {},
    h("th", { scope: "row" }, toggle, model.default && h("span", { class: "badge" }, "default")),
    cells.map((content, i) => h("td", { class: isWide(i + 1) }, content)),
  );
  return [row, details];
}

/** A link that selects a model. */
function useLink(model) {
  const select = () => catalogue.selectVersion(reference(model));
  const link = h("a", { class: "button small", href: "#score", onclick: select }, "Score images with this model");
  return h("p", { class: "use" }, link);
}

/** The number of a model's classes; those of its base say nothing about a detector. */
function classCount({ detector, classes }) {
  if (detector) return "–";
  return classes.length ? String(classes.length) : "none";
}

/** Whether a model gives verdicts, and what they miss and detect. */
function verdictsCell({ calibration, detector }) {
  if (detector) return detectorCell(detector);
  if (!calibration) return [h("span", { class: "badge plain" }, "none"), h("p", { class: "hint" }, "Not calibrated")];
  const { weakness, power, n_rank: ranked } = calibration;
  const badge = weakness
    ? h("span", { class: "badge weak" }, "weak")
    : h("span", { class: "badge" }, `calibrated on ${plural(ranked, "image")}`);
  const lines = [
    weakness && sentence(weakness),
    power && missed(power) && `Misses ${missed(power)}.`,
    power && `Detects ${detected(power) || "nothing"}.`,
  ];
  return [
    badge,
    h("p", { class: "hint" }, lines.filter(Boolean).join(" ") || "What it detects has not been measured."),
  ];
}

/** What a detector misses and finds. */
function detectorCell({ weakness, power, n_rank: ranked }) {
  const badge = h("span", { class: weakness ? "badge weak" : "badge" }, weakness ? "weak detector" : "detector");
  const lines = [
    weakness && sentence(weakness),
    power && missedKinds(power) && `Mostly misses, even at the largest size measured: ${missedKinds(power)}.`,
    power && `Smallest sizes found in nine of ten: ${foundSizes(power) || "none"}.`,
    !power && "What it finds has not been measured.",
    `Ranks among ${plural(ranked, "good image")}.`,
  ];
  return [badge, h("p", { class: "hint" }, lines.filter(Boolean).join(" "))];
}

const sentence = (clause) => `${clause[0].toUpperCase()}${clause.slice(1)}.`;
