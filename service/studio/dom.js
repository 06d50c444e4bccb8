// Helpers: create elements, save files, and format numbers.

const SVG_TAGS = new Set(["svg", "path", "rect", "line", "text"]);
const SVG_NAMESPACE = "http://www.w3.org/2000/svg";
let ids = 0;

/** An id that no other element has. */
export function uid() {
  ids += 1;
  return `u${ids}`;
}

/**
 * Create an element: attributes named `on…` are listeners; attributes and children that are null, undefined or false
 * are skipped.
 */
export function h(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG_NAMESPACE, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (isAbsent(value)) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => !isAbsent(child)));
  return element;
}

const isAbsent = (value) => value === undefined || value === null || value === false;

export function button(label, onclick, className = "") {
  return h("button", { type: "button", class: className, onclick }, label);
}

/**
 * Disable or enable a button so that it keeps the focus, also one that has just been pressed; see the listener below.
 */
export function disable(element, disabled) {
  if (disabled) element.setAttribute("aria-disabled", "true");
  else element.removeAttribute("aria-disabled");
}

const ignoreDisabled = (event) => {
  if (!event.target.closest?.("[aria-disabled]")) return;
  event.preventDefault(); // also the submission of a form, with Enter in one of its fields
  event.stopImmediatePropagation();
};
addEventListener("click", ignoreDisabled, { capture: true });

/** Perform `change()`, which removes elements of `area`; if one of them has the focus, `target` gets it. */
export function keepFocus(area, target, change) {
  const isFocused = area.contains(document.activeElement);
  change();
  if (!isFocused) return;
  if (target.tabIndex < 0) target.tabIndex = -1; // a heading
  target.focus({ preventScroll: true });
}

/** The heading of the view that contains an element. */
export const viewTitle = (element) => element.closest("section:has(h1)").querySelector("h1");

/** A listener for the submission of a form that the page handles itself. */
export const onSubmit = (handle) => (event) => {
  event.preventDefault();
  handle();
};

/** Announce a change to screen readers; while a dialog is open, they hear only what is in it. */
export function announce(text) {
  const live = document.querySelector("dialog[open] .live") ?? document.getElementById("live");
  live.textContent = text;
}

export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A number with its noun: `plural(2, "image")` is "2 images". */
export const plural = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

/** A number of bytes in MiB, the unit of the limits. */
export const mebibytes = (bytes) => (bytes / 2 ** 20).toFixed(1);

export function seconds(s) {
  if (s < 1) return `${Math.round(1000 * s)} ms`;
  if (s < 90) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  return `${Math.round(s / 60)} min`;
}

/** A noise level in words. */
export const greyLevels = (value) => (value === 0 ? "none" : plural(value, "grey level"));

/** A file's name without its extension. */
export const stem = (name) => name.replace(/\.\w+$/, "");
