// What the page knows of the models, and which of their jobs it started: a reload finds them again.

import { Refusal, json } from "./api.js";

const JOBS = "ncml.jobs";
const KEPT = 48; // jobs remembered for each browser tab

/** The models that are served; `current` is the one that the views use. "list" tells of other models, "change" of another current one. */
class Catalogue extends EventTarget {
  models = [];
  current = null;
  listed = "";

  async load() {
    const { models } = await json("models");
    this.models = models;
    const name = this.current?.name ?? sessionStorage.getItem("ncml.model");
    const next = models.find((model) => model.name === name) ?? models[0] ?? null;
    const changed = mark(next) !== mark(this.current);
    const listed = models.map(mark).join();
    this.current = next;
    if (listed !== this.listed) this.dispatchEvent(new Event("list"));
    this.listed = listed;
    if (changed) this.dispatchEvent(new Event("change"));
  }

  /** The current model; throws a `Refusal` while there is none. */
  need() {
    if (this.current) return this.current;
    throw new Refusal("No model is served yet.", { remedy: "Wait until a worker has loaded one; the Models view tells." });
  }

  choose(name) {
    this.current = this.models.find((model) => model.name === name) ?? this.current;
    sessionStorage.setItem("ncml.model", name);
    this.dispatchEvent(new Event("change"));
  }
}

/** What tells a model from its successor. */
const mark = (model) => model && `${model.name} ${model.version} ${model.calibration?.version}`;

export const catalogue = new Catalogue();

/** `name@version`, short enough to read and long enough to mean one. */
export const reference = (model) => `${model.name}@${model.version.slice(0, 12)}`;

/** The jobs that this tab started, oldest first; newest are kept. Records are plain JSON with an `id` and a `view`. */
export const jobs = {
  all: () => JSON.parse(sessionStorage.getItem(JOBS) ?? "[]"),
  of: (view) => jobs.all().filter((job) => job.view === view),
  write(list) {
    for (let kept = list.slice(-KEPT); ; kept = kept.slice(1)) {
      try {
        sessionStorage.setItem(JOBS, JSON.stringify(kept));
        return;
      } catch (error) {
        if (!kept.length) throw error; // not for want of room
      }
    }
  },
  add: (record) => jobs.write([...jobs.all(), record]),
  remove: (id) => jobs.write(jobs.all().filter((job) => job.id !== id)),
};
