// Messages: failures with their remedies, and empty states.

import { button, h, plural } from "./dom.js";

const MAX_NAMES = 5; // that a message lists

/** The reason and the remedy of an error, with buttons to `retry` and for another `action`. */
export function failure(error, retry, action) {
  return h(
    "div",
    { class: error.calm ? "failure calm" : "failure", role: error.calm ? "status" : "alert" },
    h("p", {}, error.message),
    error.remedy && h("p", {}, error.remedy),
    h(
      "div",
      { class: "row start" },
      error.status === 401 && button("Enter an API key", () => document.getElementById("key").click(), "small"),
      retry && button("Try again", retry, "small"),
      action,
    ),
  );
}

/** Perform an action, and show in `element` why it failed. */
export function attempt(action, element) {
  try {
    action();
  } catch (error) {
    element.replaceChildren(failure(error));
  }
}

/** Show an error in an element and scroll to it. */
export function showFailure(element, error) {
  element.replaceChildren(failure(error));
  element.scrollIntoView({ block: "nearest", behavior: scrollBehavior() });
}

/** Show an error beside the control of the parameter that it names, else in `notice`, instead of earlier ones. */
export function showRefusal(form, notice, error) {
  clearRefusals(form, notice);
  const control = form.querySelector(`[data-field="${CSS.escape(error.fields?.[0] ?? "")}"]`);
  const details = control?.closest("details");
  if (details) details.open = true;
  for (const input of control?.querySelectorAll("select, input:not([type=radio])") ?? []) input.ariaInvalid = true;
  const place = control ? h("div", { class: "refusal" }) : notice;
  control?.append(place);
  showFailure(place, error);
}

export function clearRefusals(form, notice) {
  notice.replaceChildren();
  for (const refusal of form.querySelectorAll(".refusal")) refusal.remove();
  for (const input of form.querySelectorAll("[aria-invalid]")) input.ariaInvalid = null;
}

/** Return the images among files that are not empty; the others are reported in `notice`. */
export function imageFiles(files, notice) {
  const others = files.filter(fault);
  const images = files.filter((file) => !fault(file));
  notice.replaceChildren();
  if (others.length) {
    showFailure(notice, {
      message: `Skipped: ${listed(others.map((file) => `${file.name} (${fault(file)})`))}.`,
      remedy: !images.length && "Choose a PNG, JPEG, WebP, BMP, TIFF or GIF file.",
      calm: images.length > 0,
    });
  }
  return images;
}

const fault = (file) => (isImage(file) ? !file.size && "empty" : "not an image");

/** Whether the service may read a file, by its type or name: other types, such as SVG, are refused. */
export const isImage = ({ name, type }) =>
  /^image\/(png|jpeg|webp|bmp|tiff|gif)$/.test(type) || /\.(png|jpe?g|webp|bmp|tiff?|gif)$/i.test(name);

export const UNDISPLAYABLE = "This browser cannot display this file; the service may still be able to read it.";

/** Whether a file is a TIFF, which most browsers cannot display. */
export const isTiff = ({ name, type }) => type === "image/tiff" || /\.tiff?$/i.test(name);

/** The first of many names. */
export const listed = (names) =>
  names.length > MAX_NAMES
    ? `${names.slice(0, MAX_NAMES).join(", ")} and ${plural(names.length - MAX_NAMES, "other file")}`
    : names.join(", ");

/** The placeholder of a view without results. */
export function emptyState(title, text) {
  return h("div", { class: "empty" }, h("p", { class: "strong" }, title), h("p", {}, text));
}

/** Scroll to an element unless its top is visible. */
export function reveal(element) {
  const { top } = element.getBoundingClientRect();
  if (top >= 0 && top < innerHeight - 200) return;
  element.scrollIntoView({ behavior: scrollBehavior() });
}

const scrollBehavior = () => (matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth");
