// A grid of samples of a model, generated on request and always with the same seeds.

import { cancel, submit } from "./api.js";
import { reference } from "./catalogue.js";
import { announce, button, h, keepFocus } from "./dom.js";
import { failure } from "./feedback.js";
import { persistentResult } from "./job.js";
import { jobs } from "./session.js";

const PER_CLASS = 4;
const MAX_CLASSES = 20; // each takes a job
const WITHOUT_CLASSES = 16;

const grids = new Map(); // by the reference of their model: they outlive the table that shows them

export function sampleGrid(model) {
  const key = reference(model);
  if (!grids.has(key)) grids.set(key, new SampleGrid(model));
  return grids.get(key);
}

class SampleGrid {
  element = h("section", { class: "samples", "aria-label": "Samples" });

  constructor(model) {
    this.model = model;
    const record = jobs.of("sampleGrid").find((stored) => stored.model === reference(model));
    if (record) this.show(record.samples);
    else this.offer();
  }

  /** The requests of the grid: for each class or, if there are none or too many, for any. */
  get requests() {
    const { classes } = this.model;
    if (!classes.length || classes.length > MAX_CLASSES) return [{ n: WITHOUT_CLASSES, seed: 0 }];
    return classes.map((className, i) => ({ class: className, n: PER_CLASS, seed: PER_CLASS * i }));
  }

  offer() {
    const samples = this.requests[0].class ? `${PER_CLASS} of each class` : `${WITHOUT_CLASSES} samples`;
    this.replace(button(`Generate ${samples}`, () => this.generate(), "small"));
  }

  /** Replace the content of the grid; if a button in it has the focus, the grid gets it. */
  replace(...elements) {
    keepFocus(this.element, this.element, () => this.element.replaceChildren(...elements));
  }

  /** Submit the jobs of the grid, which are stored as one record. */
  async generate() {
    this.replace(h("p", { class: "hint" }, "Submitting"));
    const model = reference(this.model);
    const samples = [];
    try {
      for (const parameters of this.requests) {
        const { id } = await submit("generate", { ...parameters, model, priority: "low" });
        samples.push({ id, label: parameters.class ?? this.model.name });
      }
      jobs.add({ id: samples[0].id, view: "sampleGrid", model, samples });
      this.show(samples);
    } catch (error) {
      this.fail(error, samples);
    }
  }

  /** Show the samples [{id, label}] of each job when it has finished. */
  async show(samples) {
    const rows = samples.map(({ label }) =>
      h("li", {}, h("span", { class: "name" }, label), h("span", { class: "samples-of-class" })),
    );
    const bar = h("progress", { max: samples.length, value: 0, "aria-label": "Progress" });
    const cancelAll = () => {
      discard(samples);
      this.offer();
    };
    const status = h("p", { class: "hint grow" }, "Generating samples with seeds from 0");
    const header = h("div", { class: "row" }, status, bar, button("Cancel", cancelAll, "small"));
    const notice = h("div");
    this.replace(header, notice, h("ul", { class: "classes" }, rows));
    try {
      for (const [i, { id, label }] of samples.entries()) {
        const result = await persistentResult(id, notice);
        if (!result) {
          if (this.element.contains(header)) cancelAll(); // it was canceled elsewhere
          return;
        }
        rows[i].lastChild.replaceChildren(...result.images.map((image) => sampleImage(image, label)));
        bar.value = i + 1;
      }
    } catch (error) {
      if (error.status !== 404) return this.fail(error, samples);
      jobs.remove(samples[0].id);
      return this.offer();
    }
    this.showFinished(header, samples);
  }

  showFinished(header, samples) {
    const repeat = () => {
      discard(samples);
      this.generate();
    };
    const elements = [
      h("p", { class: "hint grow" }, "Samples with seeds from 0, not hand-picked"),
      button("Generate again", repeat, "small"),
    ];
    keepFocus(header, this.element, () => header.replaceChildren(...elements));
    announce(`Samples of ${this.model.name} generated`);
  }

  fail(error, samples) {
    discard(samples);
    this.replace(failure(error, () => this.generate()));
  }
}

/** Remove the jobs of a grid from the page, and cancel those that have not finished. */
function discard(samples) {
  jobs.remove(samples[0]?.id);
  for (const { id } of samples) {
    // A job that could not be canceled will end by itself; one that has expired has ended.
    cancel(id).catch(({ status }) => status !== 404 && announce("A job could not be canceled"));
  }
}

const sampleImage = ({ seed, png }, label) =>
  h("img", { class: "pixels", src: `data:image/png;base64,${png}`, alt: `${label}, seed ${seed}` });
