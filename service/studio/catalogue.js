// The models that the service offers, and the one that the views use.

import { Refusal, requestJson } from "./api.js";
import { modelName } from "./session.js";

/** Dispatches "list" when the models change, and "change" when `current`, the one that the views use, does. */
class Catalogue extends EventTarget {
  models = [];
  current = null;
  identities = "";
  calibrationAllowed = false;

  async load() {
    const { models, calibration_allowed: calibrationAllowed } = await requestJson("models");
    const name = this.current?.name ?? modelName.get();
    const byName = models.find((model) => model.name === name);
    const current = byName ?? models.find((model) => model.default) ?? models[0] ?? null;
    const currentChanged = identity(current) !== identity(this.current);
    const identities = [calibrationAllowed, ...models.map(identity)].join();
    const listChanged = identities !== this.identities;
    Object.assign(this, { models, current, identities, calibrationAllowed });
    if (listChanged) this.dispatchEvent(new Event("list"));
    if (currentChanged) this.dispatchEvent(new Event("change"));
  }

  /** The current model; throws a `Refusal` if there is none. */
  requireCurrent() {
    if (this.current) return this.current;
    const remedy = "Wait until a worker has loaded one; the Models view shows the workers.";
    throw new Refusal("No model is available yet.", { remedy });
  }

  select(name) {
    this.current = this.models.find((model) => model.name === name) ?? this.current;
    modelName.set(name);
    this.dispatchEvent(new Event("change"));
  }

  /** Select the model of a `reference`; throws a `Refusal` if it is not offered any more. */
  selectVersion(text) {
    const model = this.models.find((offered) => reference(offered) === text);
    const remedy = "Another model gives other images for the same settings.";
    if (!model) throw new Refusal(`${text} is no longer available.`, { remedy });
    if (model !== this.current) this.select(model.name);
  }
}

/** What distinguishes a model from its other versions and calibrations. */
const identity = (model) => model && `${model.name} ${model.version} ${model.calibration?.version}`;

export const catalogue = new Catalogue();

/** `name@version`, with a version that is short enough to read and long enough to be unique. */
export const reference = (model) => `${model.name}@${model.version.slice(0, 12)}`;
