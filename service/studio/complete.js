// Complete: one half is kept, the other imagined, several times over.

import { submit } from "./api.js";
import { catalogue, jobs } from "./catalogue.js";
import { cards, settings } from "./controls.js";
import { CARDS, canvas, exact, fit, open } from "./picture.js";
import { run } from "./run.js";
import { announce, chips, complain, dropzone, empty, h, pictures, plural, reveal } from "./ui.js";

const SIDE = 320; // of the pad, in CSS pixels: its width; its height follows the model's pictures
const HALVES = ["top", "bottom", "left", "right"];

export function mount(host, { hand }) {
  let picture = null; // {file, seen, halves, said}: halves that can be kept; `said` when the picture itself says which
  const drawing = settings({ few: 4, most: 16, count: "Variants", aside: true });
  const half = chips({ legend: "Keep this half", options: [], value: "top", onchange: paint });
  let early = null; // a file that came before a model did
  const [pad, ink] = canvas(SIDE, SIDE);
  pad.className = "pad";
  pad.setAttribute("role", "img");
  const padHint = h("p", { class: "hint" }, "Draw over the half to keep, or choose it below.");
  const chosen = h("div", { class: "stack", hidden: true }, pad, padHint, half.el);
  const trouble = h("div");
  const runs = h("div", { class: "runs" });
  const start = h("button", { type: "submit", class: "primary", disabled: true }, "Complete");
  const nothing = empty("Nothing completed yet", "Choose a picture and the half to keep, or press “Complete it” on one that was drawn. The endings appear here side by side.");
  const form = h("form", { class: "controls stack", onsubmit: (event) => { event.preventDefault(); complete(); } },
    dropzone({ title: "Drop, paste or pick a picture", text: "Whole, or just a half: half as high or half as wide", onfiles: take }),
    cards(take, trouble, Object.keys(CARDS).filter((name) => name !== "noise")), trouble,
    chosen, drawing.el, start);
  host.append(h("div", { class: "bench" }, form, h("div", { class: "stage" }, nothing, runs)));
  runs.addEventListener("removed", tidy);
  for (const record of jobs.of("complete")) show(record);
  tidy();
  catalogue.addEventListener("change", () => look(early ?? picture?.file));
  strokes();

  return { take };

  function tidy() {
    nothing.hidden = runs.children.length > 0;
  }

  async function take(files) {
    const [file] = pictures(files, trouble);
    if (file) await look(file);
  }

  async function look(file) {
    const model = catalogue.current;
    early = model ? null : file;
    if (!file || !model) return;
    pad.height = Math.round((SIDE * model.height) / model.width);
    const can = HALVES.filter((name) => model.keeps.includes(name));
    try {
      const bitmap = await open(file);
      const [w, h_] = [bitmap.width, bitmap.height];
      picture = { file, halves: can, said: false };
      if (2 * h_ * model.width === w * model.height) picture = { ...picture, part: [model.width, Math.floor(model.height / 2)], halves: can.filter((name) => name === "top" || name === "bottom") };
      else if (h_ * model.width === 2 * w * model.height) picture = { ...picture, part: [Math.floor(model.width / 2), model.height], halves: can.filter((name) => name === "left" || name === "right") };
      else picture.said = transparent(bitmap);
      picture.seen = fit(bitmap, ...(picture.part ?? [model.width, model.height]));
    } catch {
      picture = { file, halves: can, said: false, seen: null };
    }
    half.offer(HALVES.map((name) => [name, name, !picture.halves.includes(name)]), picture.halves.includes(half.value) ? half.value : picture.halves[0]);
    half.el.hidden = picture.said;
    padHint.textContent = !picture.seen ? "This browser cannot show this file; the service may be able to read it."
      : picture.said ? "This picture is partly transparent: its opaque half is kept." : "Draw over the half to keep, or choose it below.";
    chosen.hidden = false;
    start.disabled = false;
    paint();
    announce(`${file.name} is ready to be completed`);
  }

  function transparent(bitmap) {
    const [, context] = canvas(bitmap.width, bitmap.height);
    context.drawImage(bitmap, 0, 0);
    const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
    for (let at = 3; at < data.length; at += 4) if (data[at] < 128) return true;
    return false;
  }

  /** [x, y, w, h] of a half of a box. */
  function area(name, { width, height }) {
    const [w, h_] = [width / 2, height / 2];
    return { top: [0, 0, width, h_], bottom: [0, h_, width, h_], left: [0, 0, w, height], right: [w, 0, w, height] }[name];
  }

  /** What was sent, at the model's size: a half lies where it belongs. */
  function sent(keep, width, height) {
    const [whole, context] = canvas(width, height);
    context.drawImage(exact(picture.seen, ""), ...(picture.part ? area(keep, whole) : [0, 0]));
    return whole.toDataURL();
  }

  function paint(stroke = []) {
    if (!picture) return;
    const keep = half.value || "top";
    ink.imageSmoothingEnabled = false;
    ink.clearRect(0, 0, pad.width, pad.height);
    if (picture.seen) {
      const source = exact(picture.seen, "");
      if (picture.part) ink.drawImage(source, ...area(keep, pad));
      else {
        ink.globalAlpha = picture.said ? 1 : 0.16;
        ink.drawImage(source, 0, 0, pad.width, pad.height);
        ink.globalAlpha = 1;
        if (!picture.said) ink.drawImage(source, ...area(keep, source), ...area(keep, pad));
      }
    }
    pad.setAttribute("aria-label", picture.said ? `${picture.file.name}; its opaque half is kept` : `${picture.file.name}; its ${keep} half is kept`);
    if (!Array.isArray(stroke) || !stroke.length) return;
    ink.strokeStyle = getComputedStyle(pad).getPropertyValue("--accent");
    ink.lineWidth = 18;
    ink.lineCap = ink.lineJoin = "round";
    ink.globalAlpha = 0.6;
    ink.beginPath();
    for (const [x, y] of stroke) ink.lineTo(x, y);
    ink.stroke();
    ink.globalAlpha = 1;
  }

  /** A stroke chooses the half that most of it lies in; along the top or bottom if it is wider than high. */
  function strokes() {
    let stroke = null;
    const at = (event) => {
      const box = pad.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * pad.width, ((event.clientY - box.top) / box.height) * pad.height];
    };
    pad.addEventListener("pointerdown", (event) => {
      if (!picture || picture.said) return;
      stroke = [at(event)];
      pad.setPointerCapture(event.pointerId);
    });
    pad.addEventListener("pointermove", (event) => {
      if (!stroke) return;
      stroke.push(at(event));
      paint(stroke);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      pad.addEventListener(end, () => {
        if (!stroke) return;
        const [xs, ys] = [stroke.map(([x]) => x), stroke.map(([, y]) => y)];
        const span = (values) => Math.max(...values) - Math.min(...values);
        const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
        const flat = span(xs) >= span(ys);
        const [rows, columns] = [mean(ys) < pad.height / 2 ? "top" : "bottom", mean(xs) < pad.width / 2 ? "left" : "right"];
        const wanted = (flat ? [rows, columns] : [columns, rows]).find((name) => picture.halves.includes(name));
        stroke = null;
        if (wanted) {
          half.value = wanted;
          announce(`The ${wanted} half is kept`);
        }
        paint();
      });
    }
  }

  function show(record) {
    const { source, keep, size: [width, height] } = record;
    const original = source && h("li", { class: "source" }, h("span", { class: `cell kept-${keep ?? "said"}` }, h("img", { src: source, width, height, alt: `The picture that was sent; ${keep ?? "its opaque"} half kept` })), h("span", { class: "seed" }, keep ? `${keep} kept` : "as sent"));
    const shown = run(record, runs, {
      before: original ? [original] : [],
      again: (former) => drawing.write(former.asked),
      use: (action, { file, seed }) => (action === "seed" ? drawing.seed.reuse(seed) : action === "complete" ? take([file]) : hand(action, file)),
    });
    tidy();
    return shown;
  }

  async function complete() {
    trouble.replaceChildren();
    start.disabled = true;
    try {
      const model = catalogue.need();
      const keep = picture.said ? undefined : half.value;
      const asked = { ...drawing.read(), ...(keep ? { keep } : {}) };
      const body = new FormData();
      body.append("image", picture.file, picture.file.name || "picture.png");
      for (const [name, value] of Object.entries(asked)) body.set(name, value);
      const job = await submit("complete", body);
      const record = { id: job.id, view: "complete", task: "complete", asked, keep, file: picture.file.name || "picture.png", source: picture.seen ? sent(keep, model.width, model.height) : undefined,
        size: [model.width, model.height], title: `${plural(asked.n, "variant")} of ${picture.file.name || "a pasted picture"}` };
      jobs.add(record);
      drawing.seed.next();
      reveal(show(record));
    } catch (error) {
      complain(trouble, error);
    }
    start.disabled = false;
  }
}
