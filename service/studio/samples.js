// A grid of samples of a model, generated on request and always with the same seeds.

import { cancel, submit } from "./api.js";
import { reference } from "./catalogue.js";
import { announce, button, h } from "./dom.js";
import { failure } from "./feedback.js";
import { persistentResult } from "./job.js";
import { jobs } from "./session.js";

const PER_CLASS = 4;
const WITHOUT_CLASSES = 16;

const grids = new Map(); // by the reference of their model: they outlive the table that shows them

export function sampleGrid(model) {
  const key = reference(model);
  if (!grids.has(key)) grids.set(key, new SampleGrid(model));
  return grids.get(key);
}

class SampleGrid {
  element = h("div", { class: "samples" });

  constructor(model) {
    this.model = model;
    const records = jobs.of("samples").filter((record) => record.model === reference(model));
    if (records.length) this.show(records);
    else this.offer();
  }

  offer() {
    const samples = this.model.classes.length ? `${PER_CLASS} of each class` : `${WITHOUT_CLASSES} samples`;
    this.element.replaceChildren(button(`Generate ${samples}`, () => this.generate(), "small"));
  }

  /** Submit a job for each class. */
  async generate() {
    this.element.replaceChildren(h("p", { class: "hint" }, "Submitting"));
    const { name, classes } = this.model;
    const requests = classes.length
      ? classes.map((className, i) => ({ class: className, n: PER_CLASS, seed: PER_CLASS * i }))
      : [{ n: WITHOUT_CLASSES, seed: 0 }];
    const model = reference(this.model);
    const records = [];
    try {
      for (const parameters of requests) {
        const { id } = await submit("generate", { ...parameters, model, priority: "low" });
        const record = { id, view: "samples", model, label: parameters.class ?? name };
        jobs.add(record);
        records.push(record);
      }
      this.show(records);
    } catch (error) {
      this.fail(error, records);
    }
  }

  /** Show the samples of each job when it has finished. */
  async show(records) {
    const rows = records.map(({ label }) =>
      h("li", {}, h("span", { class: "name" }, label), h("span", { class: "samples-of-class" })),
    );
    const bar = h("progress", { max: records.length, value: 0, "aria-label": "Progress" });
    const cancelAll = () => {
      discard(records);
      this.offer();
    };
    const status = h("p", { class: "hint grow" }, "Generating samples with seeds from 0");
    const header = h("div", { class: "row" }, status, bar, button("Cancel", cancelAll, "small"));
    const notice = h("div");
    this.element.replaceChildren(header, notice, h("ul", { class: "classes" }, rows));
    try {
      for (const [i, { id, label }] of records.entries()) {
        const result = await persistentResult(id, notice);
        if (!result) return; // canceled
        rows[i].lastChild.replaceChildren(...result.images.map((image) => sampleImage(image, label)));
        bar.value = i + 1;
      }
    } catch (error) {
      if (error.status !== 404) {
        this.fail(error, records);
        return;
      }
      discard(records);
      this.offer();
      return;
    }
    this.showFinished(header, records);
  }

  showFinished(header, records) {
    const repeat = () => {
      discard(records);
      this.generate();
    };
    header.replaceChildren(
      h("p", { class: "hint grow" }, "Samples with seeds from 0, not hand-picked"),
      button("Generate again", repeat, "small"),
    );
  }

  fail(error, records) {
    discard(records);
    this.element.replaceChildren(failure(error, () => this.generate()));
  }
}

/** Remove jobs from the page, and cancel those that have not finished. */
function discard(records) {
  for (const { id } of records) {
    jobs.remove(id);
    cancel(id).catch(() => announce("A job could not be canceled")); // it will end by itself
  }
}

const sampleImage = ({ seed, png }, label) =>
  h("img", { class: "pixels", src: `data:image/png;base64,${png}`, alt: `${label}, seed ${seed}` });
