// The scored images: a strip to select one, the selected one in detail, and a CSV table of all.

import { button, h, plural, save } from "./dom.js";
import { emptyState } from "./feedback.js";
import { readingArticle } from "./reading.js";
import { headline, verdict } from "./verdict.js";

const COLUMNS = [
  ...["image", "bits_per_dim", "nats", "ood_score", "threshold", "p_value", "out_of_distribution"],
  ...["tile_left", "tile_top", "tile_width", "tile_height", "class", "noise", "model", "version"],
];

/** The readings, newest first. `isRunning()` is whether scoring jobs are still running. */
export class Results {
  readings = [];
  selected = null;
  shown = null; // the reading of the article, which keeps its state until another one is selected
  count = h("p", { class: "hint" });
  header = h(
    "div",
    { class: "row" },
    this.count,
    button("Download scores (CSV)", () => this.download(), "small"),
  );
  strip = h("ul", { class: "strip", "aria-label": "Scored images" });
  article = h("div");
  elements = [this.header, this.strip, this.article];

  constructor(isRunning) {
    this.isRunning = isRunning;
  }

  add(readings) {
    this.readings = [...readings, ...this.readings];
    [this.selected] = readings;
    this.render();
  }

  select(reading) {
    this.selected = reading;
    this.render();
    this.strip.querySelector("[aria-pressed=true]").focus({ preventScroll: true }); // it was replaced
  }

  download() {
    save(new Blob([csv(this.readings)], { type: "text/csv" }), "scores.csv");
  }

  render() {
    this.header.hidden = !this.readings.length;
    this.count.textContent = `${plural(this.readings.length, "image")} scored`;
    this.strip.hidden = this.readings.length < 2;
    this.strip.replaceChildren(...this.readings.map((reading) => this.stripItem(reading)));
    if (this.selected) this.showArticle();
    else this.article.replaceChildren(...(this.isRunning() ? [] : [nothingScored()]));
  }

  showArticle() {
    if (this.shown === this.selected) return;
    this.shown = this.selected;
    this.article.replaceChildren(readingArticle(this.selected, this.readings));
  }

  /** Render again after a change of the model. */
  refresh() {
    this.shown = null;
    this.render();
  }

  stripItem(reading) {
    const { name, modelView } = reading;
    const { kind, label } = verdict(reading);
    const symbol = { in: "✓", out: "✕" }[kind];
    const attributes = {
      type: "button",
      class: `tile ${kind}`,
      title: `${name}: ${label.toLowerCase()}`,
      "aria-pressed": String(reading === this.selected),
      onclick: () => this.select(reading),
    };
    return h(
      "li",
      {},
      h(
        "button",
        attributes,
        modelView ? h("img", { src: modelView, alt: "", class: "pixels" }) : h("span", { class: "blank" }),
        h(
          "span",
          { class: "row" },
          h("span", { class: "mono" }, headline(reading)),
          h("span", { "aria-hidden": "true" }, symbol),
        ),
        h("span", { class: "name" }, name),
        h("span", { class: "visually-hidden" }, label),
      ),
    );
  }
}

const nothingScored = () =>
  emptyState("No scores yet", "Drop your own images, or click an example to score it immediately.");

function csv(readings) {
  const lines = [COLUMNS, ...readings.map(csvRow)].map((cells) => cells.map(csvCell).join());
  return lines.map((line) => `${line}\r\n`).join("");
}

function csvRow({ name, score: { bpd, log_likelihood: nats, score: worst, ood }, scan, model, conditions }) {
  const { score: oodScore = worst, threshold, p_value: pValue } = ood ?? {};
  const { left, top, width, height } = scan?.box ?? {};
  const isOod = ood && (ood.is_ood ? "yes" : "no");
  const noise = scan ? "" : (conditions.noise ?? 0);
  return [
    ...[name, bpd, nats, oodScore, threshold, pValue, isOod],
    ...[left, top, width, height, conditions.class, noise, model.name, model.version],
  ];
}

const csvCell = (value) => (/[",\r\n]/.test(value ?? "") ? `"${value.replaceAll('"', '""')}"` : (value ?? ""));
