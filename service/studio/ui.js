// Building blocks of the page. Knows no service: only elements, words and the pointer.

const DRAWN = new Set(["svg", "path", "rect", "line", "g", "text"]);
let count = 0;

/** An id that no other element has. */
export const uid = () => `u${++count}`;

/** An element: `on…` members are listeners, others attributes; null, undefined and false are left out. */
export function h(tag, given = {}, ...children) {
  const element = DRAWN.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** Say something to whoever cannot see the page change. */
export function announce(text) {
  document.getElementById("live").textContent = text;
}

export function button(label, onclick, kind = "") {
  return h("button", { type: "button", class: kind, onclick }, label);
}

/** A button that puts `text()` on the clipboard and says so. */
export function copier(label, text, kind = "quiet") {
  const self = button(label, async () => {
    self.textContent = (await copy(text())) ? "Copied" : "Select and copy it";
    announce(self.textContent);
    setTimeout(() => (self.textContent = label), 1600);
  }, kind);
  return self;
}

async function copy(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return false; // the browser's user said no
    }
  }
  const area = h("textarea", { class: "unseen" }); // pages served over plain HTTP have no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

const MEANINGS = {
  "bits/dim": "Bits per dimension: what the model needs on average to write down one red, green or blue value of the picture. The fewer, the likelier the picture; a value without a model takes 8.",
  multiscale: "How far the picture lies from held-out ones, by its bits, the pull on its pixels and the spread of its surprise, measured at three levels of noise. The higher, the stranger.",
  "grey levels": "A colour value is one of 256 levels, from 0 to 255. Noise of 10 grey levels moves each by about 10, up or down.",
  tweedie: "A solver brings a noisy sample back to a picture. tweedie does it in one step; heun takes several and adds no noise, euler-maruyama and predictor-corrector add some at each step.",
};

/** A question mark that tells what a word means, to the pointer and the keyboard alike. */
export function why(word) {
  const id = uid();
  const told = h("span", { popover: "auto", id, class: "told" }, MEANINGS[word]);
  const self = h("button", { type: "button", class: "why", popovertarget: id, "aria-label": `What is ${word}?`, onclick: () => {
    const [{ left, top, bottom }, { clientWidth, clientHeight }] = [self.getBoundingClientRect(), document.documentElement];
    const [over, under] = [clientHeight - scrollY - top + 8, scrollY + bottom + 8].map((y) => `${y}px`);
    told.style.inset = `${bottom < clientHeight - 240 ? `${under} auto auto` : `auto auto ${over}`} ${Math.max(12, Math.min(left - 20, clientWidth - 332))}px`;
  } }, "?");
  return [self, told];
}

/** A labelled slider that shows its value in words. `about` is a word of it that is explained. */
export function slider({ label, about, min, max, step = 1, value, words = String, hint, oninput }) {
  const id = uid();
  const shown = h("output", { for: id });
  const hintId = hint && uid();
  const input = h("input", { type: "range", id, min, max, step, value, "aria-describedby": hintId, oninput: () => { show(); oninput?.(); } });
  const self = {
    input,
    el: h("div", { class: "field" }, h("div", { class: "row" }, h("span", {}, h("label", { for: id }, label), about && why(about)), shown), input,
      hint && h("p", { class: "hint", id: hintId }, hint)),
    get value() { return Number(input.value); },
    set value(next) { input.value = next; show(); },
    limit(max) { input.max = max; show(); },
    enable(on) { input.disabled = !on; show(); },
  };
  function show() {
    const text = words(self.value);
    shown.textContent = text;
    input.setAttribute("aria-valuetext", text);
    const span = Number(input.max) - Number(input.min);
    input.style.setProperty("--fill", span > 0 ? (self.value - Number(input.min)) / span : 1);
  }
  show();
  return self;
}

/** A slider that fades a map, `layer`, over the picture `under` it; where there is none, the map alone is shown. */
export function fader(layer, under) {
  const blend = () => { layer.style.opacity = self.value / 100; };
  const self = slider({ label: "Map over picture", min: 0, max: 100, value: under ? 50 : 100, words: (v) => `${v}\u00a0%`, oninput: blend });
  blend();
  return { el: self.el, alone() { self.value = 100; blend(); } };
}

/** One of a few, as chips: radio buttons underneath. `options` are [value, label] pairs. */
export function chips({ legend, options, value, onchange, kind = "chips" }) {
  const name = uid();
  const holder = h("div", { class: kind });
  const self = {
    el: h("fieldset", { class: "field" }, h("legend", {}, legend), holder),
    get value() { return holder.querySelector("input:checked")?.value ?? ""; },
    set value(next) {
      const input = [...holder.querySelectorAll("input")].find((one) => one.value === String(next) && !one.disabled);
      if (input) input.checked = true;
    },
    offer(list, chosen) {
      holder.replaceChildren(...list.map(([key, label, off]) =>
        h("label", {}, h("input", { type: "radio", name, value: key, checked: key === chosen, disabled: off, onchange: () => onchange?.(key) }), h("span", {}, label))));
    },
  };
  self.offer(options, value);
  return self;
}

/** A sentence about what went wrong, what to do about it, and a button that does it where there is one; calm where all that is needed is patience. */
export function failure(error, retry) {
  return h("div", { class: error.calm ? "failure calm" : "failure", role: error.calm ? "status" : "alert" }, h("p", {}, error.message), error.remedy && h("p", {}, error.remedy),
    h("div", { class: "row start" },
      error.status === 401 && button("Enter an API key", () => document.getElementById("key").click(), "small"),
      retry && button("Try again", retry, "small")));
}

/** Say in a place what went wrong, and bring it into sight. */
export function complain(place, error) {
  place.replaceChildren(failure(error));
  place.scrollIntoView({ block: "nearest", behavior: motion() });
}

/** Those of `files` that are pictures by their type or name; `place` tells which are not. */
export function pictures(files, place) {
  const [kept, rest] = [true, false].map((wanted) => files.filter(({ name, type }) => wanted === (type.startsWith("image/") || /\.(tiff?|bmp|webp)$/i.test(name))));
  place.replaceChildren();
  if (rest.length) complain(place, { message: `${rest.map(({ name }) => name).join(", ")} ${rest.length > 1 ? "are no pictures and were" : "is no picture and was"} left out.`, remedy: !kept.length && "Choose a PNG, JPEG, WebP, BMP, TIFF or GIF file.", calm: kept.length });
  return kept;
}

/** What a place says while there is nothing in it. */
export function empty(title, text, ...more) {
  return h("div", { class: "empty" }, h("p", { class: "strong" }, title), h("p", {}, text), ...more);
}

/** A line for a terminal, which may break after a parameter, and a button that copies it. */
export function terminal(text) {
  const parts = text.split(/(?<=[?&])/).flatMap((part) => [part, h("wbr")]);
  return [h("pre", { class: "curl", tabindex: 0, "aria-label": "curl line" }, parts), h("div", {}, copier("Copy curl", () => text, "small"))];
}

/** Bring what has just begun into sight, unless its beginning is there already. */
export function reveal(element) {
  const { top } = element.getBoundingClientRect();
  if (top >= 0 && top < innerHeight - 200) return;
  element.scrollIntoView({ behavior: motion() });
}

const motion = () => (matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth");

/** A file's name without its ending. */
export const stem = (name) => name.replace(/\.\w+$/, "");

export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A dialog that closes by its button, by Escape and by a click beside it; it leaves nothing behind. */
export function dialog(title, ...content) {
  const id = uid();
  const self = h("dialog", { "aria-labelledby": id, onclose: () => self.remove(), onclick: (event) => event.target === self && self.close() },
    h("div", { class: "sheet" }, h("header", { class: "row" }, h("h2", { id }, title), button("Close", () => self.close(), "quiet")), ...content));
  document.body.append(self);
  self.showModal();
  return self;
}

/** A place to drop, paste or pick pictures. */
export function dropzone({ title, text, multiple, onfiles }) {
  const input = h("input", { type: "file", accept: "image/*,.tif,.tiff", multiple, class: "unseen", onchange: () => { onfiles([...input.files]); input.value = ""; } });
  const zone = h("label", { class: "drop" }, input,
    h("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, h("path", { d: "M12 16V5m-4 4l4-4 4 4M5 15v4h14v-4" })),
    h("span", { class: "strong" }, title), h("span", { class: "hint" }, text));
  for (const [name, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
    zone.addEventListener(name, () => zone.classList.toggle("over", over));
  }
  return zone;
}

/** A word with its article's number: `plural(2, "picture")` is "2 pictures". */
export const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

export const seconds = (s) => (s < 1 ? `${Math.round(1000 * s)} ms` : s < 90 ? `${s.toFixed(s < 10 ? 1 : 0)} s` : `${Math.round(s / 60)} min`);
