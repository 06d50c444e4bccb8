// The models that the service offers, and the one that the views use.

import { Refusal, requestJson } from "./api.js";
import { modelName } from "./session.js";

/**
 * Dispatches "list" when the description of any model changes, and "change" when `current`, the one that the views use,
 * becomes another one or gets another calibration.
 */
class Catalogue extends EventTarget {
  models = [];
  unusable = {}; // the reason by name
  loading = null; // the promise of the latest `load`, until it settles
  current = null;
  description = ""; // of all models and limits, as JSON
  calibrationAllowed = false;
  webhooksAllowed = false;
  maxImages = 64; // of a request
  maxTiles = 4096; // of an image
  maxBytes = Infinity; // of the body of a request

  /** Load the models. While the service offers none, as after its start, `current` stays. */
  load() {
    const loading = this.replaceModels().finally(() => {
      if (this.loading === loading) this.loading = null;
    });
    this.loading = loading;
    return loading;
  }

  async replaceModels() {
    const document = await requestJson("models");
    const { models, unusable } = document;
    const name = modelName.get() ?? this.current?.name;
    const versions = models.filter((model) => model.name === name);
    const sameVersion = versions.find(({ version }) => version === this.current?.version);
    const current = sameVersion ?? versions[0] ?? models.find((model) => model.default) ?? models[0] ?? this.current;
    const currentChanged = identity(current) !== identity(this.current);
    const description = JSON.stringify(document);
    const listChanged = description !== this.description;
    Object.assign(this, { models, unusable, current, description });
    this.calibrationAllowed = document.calibration_allowed;
    this.webhooksAllowed = document.webhooks_allowed;
    this.maxImages = document.max_images;
    this.maxTiles = document.max_tiles;
    this.maxBytes = document.max_body_bytes;
    if (listChanged) this.dispatchEvent(new Event("list"));
    if (currentChanged) this.dispatchEvent(new Event("change"));
  }

  /** The name of the selected model if the service no longer offers it, else null. */
  get missing() {
    const name = modelName.get();
    return this.models.length && name && name !== this.current.name ? name : null;
  }

  /** The current model, once the models are loaded; throws a `Refusal` if the service offers none. */
  async requireCurrent() {
    if (!this.models.length) await (this.loading ?? this.load());
    if (this.models.length) return this.current;
    const remedy = "Wait until a worker has loaded one; the Models view shows the workers.";
    throw new Refusal("No model is available yet.", { remedy });
  }

  /** The model of a result {name, version}; undefined if the service no longer offers it. */
  modelOf({ name, version }) {
    return this.models.find((model) => model.name === name && model.version === version);
  }

  /** The name of a model, with its version if several are offered, as during an update of workers. */
  label(model) {
    const isUnique = this.models.filter(({ name }) => name === model.name).length === 1;
    return isUnique ? model.name : reference(model);
  }

  select(model) {
    this.current = model;
    modelName.set(model.name);
    this.dispatchEvent(new Event("change"));
  }

  /** Select the model of a `reference`; throws a `Refusal` if it is not offered. */
  selectVersion(text) {
    const model = this.models.find((offered) => reference(offered) === text);
    const remedy = "Another model gives other images for the same settings.";
    if (!model) throw new Refusal(`${text} is no longer available.`, { remedy });
    if (model !== this.current) this.select(model);
  }
}

/** What distinguishes a model from its other versions and calibrations. */
function identity(model) {
  if (!model) return null;
  const { name, version, calibrations, tiles, detector } = model;
  const versions = Object.entries(calibrations).map(([key, calibration]) => [key, calibration.version]);
  return JSON.stringify([name, version, versions, tiles?.version, detector?.version]);
}

export const catalogue = new Catalogue();

/** Whether a model is offered where images are generated; a detector only judges. */
export const isGenerator = (model) => model.generates && !model.detector;

/** `name@version`, with a version that is short enough to read and long enough to be unique. */
export const reference = (model) => `${model.name}@${model.version.slice(0, 12)}`;
