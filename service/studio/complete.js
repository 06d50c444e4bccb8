// Complete: one half is kept, the other imagined, several times over.

import { submit } from "./api.js";
import { catalogue, jobs } from "./catalogue.js";
import { settings } from "./controls.js";
import { CARDS, canvas, card, exact, fit, open } from "./picture.js";
import { run } from "./run.js";
import { announce, button, chips, dropzone, empty, failure, h, plural } from "./ui.js";

const SIDE = 320; // of the pad, in CSS pixels
const HALVES = ["top", "bottom", "left", "right"];

export function mount(host, { hand }) {
  let picture = null; // {file, seen, halves, said}: halves that can be kept; `said` when the picture itself says which
  const drawing = settings({ few: 4, most: 16, count: "Variants", aside: true });
  const half = chips({ legend: "Keep this half", options: [], value: "top", onchange: paint });
  const [pad, ink] = canvas(SIDE, SIDE);
  pad.className = "pad";
  pad.setAttribute("role", "img");
  const padHint = h("p", { class: "hint" }, "Draw over the half to keep, or choose it below.");
  const chosen = h("div", { class: "stack", hidden: true }, pad, padHint, half.el);
  const trouble = h("div");
  const runs = h("div", { class: "runs" });
  const start = h("button", { type: "submit", class: "primary", disabled: true }, "Complete");
  const samples = h("div", { class: "row start" }, ...Object.keys(CARDS).filter((name) => name !== "noise").map((name) => button(name, async () => {
    if (catalogue.current) take([await card(name, catalogue.current.width, catalogue.current.height)]);
  }, "small")));
  const nothing = empty("No picture yet", "Choose one to the left, or press “Complete it” on a picture that was drawn.");
  const form = h("form", { class: "controls stack", onsubmit: (event) => { event.preventDefault(); complete(); } },
    dropzone({ title: "Drop, paste or pick a picture", text: "Whole, or just a half: half as high or half as wide", onfiles: take }),
    h("div", { class: "field" }, h("p", { class: "hint" }, "Or try a test card:"), samples),
    chosen, drawing.el, start, trouble);
  host.append(h("div", { class: "bench" }, form, h("div", { class: "stage" }, nothing, runs)));
  runs.addEventListener("removed", tidy);
  for (const record of jobs.of("complete")) show(record);
  tidy();
  catalogue.addEventListener("change", () => picture && take([picture.file]));
  strokes();

  return { take };

  function tidy() {
    nothing.hidden = runs.children.length > 0;
  }

  async function take([file]) {
    const model = catalogue.current;
    if (!file || !model) return;
    trouble.replaceChildren();
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

  /** [x, y, w, h] of a half of a square. */
  function area(name, side) {
    const middle = side / 2;
    return { top: [0, 0, side, middle], bottom: [0, middle, side, middle], left: [0, 0, middle, side], right: [middle, 0, middle, side] }[name];
  }

  function paint(stroke = []) {
    if (!picture) return;
    const keep = half.value || "top";
    ink.imageSmoothingEnabled = false;
    ink.clearRect(0, 0, SIDE, SIDE);
    if (picture.seen) {
      const source = exact(picture.seen, "");
      if (picture.part) ink.drawImage(source, ...area(keep, SIDE));
      else {
        ink.globalAlpha = picture.said ? 1 : 0.16;
        ink.drawImage(source, 0, 0, SIDE, SIDE);
        ink.globalAlpha = 1;
        const [x, y, w, h_] = area(keep, SIDE);
        const scale = picture.seen.width / SIDE;
        if (!picture.said) ink.drawImage(source, x * scale, y * scale, w * scale, h_ * scale, x, y, w, h_);
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
      return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
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
        const order = flat ? [mean(ys) < SIDE / 2 ? "top" : "bottom", mean(xs) < SIDE / 2 ? "left" : "right"] : [mean(xs) < SIDE / 2 ? "left" : "right", mean(ys) < SIDE / 2 ? "top" : "bottom"];
        const wanted = order.find((name) => picture.halves.includes(name));
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
    run(record, runs, {
      before: original ? [original] : [],
      again: (former) => drawing.write(former.asked),
      use: (action, { file, seed }) => (action === "seed" ? drawing.seed.reuse(seed) : action === "complete" ? take([file]) : hand(action, file)),
    });
    tidy();
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
      const record = { id: job.id, view: "complete", task: "complete", asked, keep, file: picture.file.name || "picture.png", source: picture.seen && !picture.part ? exact(picture.seen, "").toDataURL() : undefined,
        size: [model.width, model.height], title: `${plural(asked.n, "variant")} of ${picture.file.name || "a pasted picture"}` };
      jobs.add(record);
      drawing.seed.next();
      show(record);
    } catch (error) {
      trouble.replaceChildren(failure(error));
    }
    start.disabled = false;
  }
}
