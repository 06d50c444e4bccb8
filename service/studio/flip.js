// The paper's sanity test: flip the least significant bit of every value and compare the likelihoods.

import { submit } from "./api.js";
import { reference } from "./catalogue.js";
import { announce, button, h, keepFocus } from "./dom.js";
import { failure } from "./feedback.js";
import { jobMonitor } from "./job.js";

export function flipTest({ file, model, name }) {
  const holder = h("section", { class: "flip", "aria-label": "Flipped bits" });
  const show = (...elements) => keepFocus(holder, holder, () => holder.replaceChildren(...elements));
  const explanation =
    "Flip the lowest bit of every value: the change is invisible, but an exact likelihood can detect it.";
  const unavailable =
    "To flip the lowest bits, choose the image again: the page does not keep files when it is reloaded.";
  if (file) offer();
  else show(h("p", { class: "hint" }, unavailable));
  return holder;

  function offer() {
    const start = button("Flip the lowest bits", test, "small");
    show(h("div", { class: "row" }, h("p", { class: "hint grow" }, explanation), start));
  }

  async function test() {
    show(h("p", { class: "hint" }, "Submitting"));
    try {
      const form = new FormData();
      form.append("image", file, name);
      form.set("sanity", "1");
      form.set("ood", "0"); // the likelihood is enough
      form.set("model", reference(model));
      const { id } = await submit("score", form);
      const labels = { queued: "Scoring the flipped image" };
      const notice = h("div");
      const { status, bar, cancelButton, result } = jobMonitor(id, { notice, labels, fraction: null });
      show(h("div", { class: "row" }, status, bar, cancelButton), notice);
      const scored = await result();
      if (!scored) return offer(); // canceled
      const [{ bpd, sanity }] = scored.results;
      show(...comparison(bpd, sanity.flipped_bpd));
    } catch (error) {
      show(failure(error, test));
    }
  }
}

function comparison(bpd, flippedBpd) {
  const change = flippedBpd - bpd;
  const signed = `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(3)}`;
  announce(`Flipped: ${flippedBpd.toFixed(3)} bits per dimension instead of ${bpd.toFixed(3)}`);
  return [
    h("p", { class: "strong" }, "Lowest bits flipped"),
    h("p", { class: "mono" }, `${bpd.toFixed(3)} → ${flippedBpd.toFixed(3)} bits/dim (${signed})`),
    h("p", { class: "hint" }, interpretation(change)),
  ];
}

function interpretation(change) {
  if (change > 0.0005) return "The flipped image is less likely: the model has learned even the lowest bits.";
  if (change < -0.0005) return "The flipped image is more likely: the lowest bits of this image carry no structure.";
  return "No difference: the lowest bits of this image carry no information for the model.";
}
