// The scored images: a strip to select one, and the selected one in detail.

import { Refusal } from "./api.js";
import { button, h, keepFocus, plural, save, viewTitle } from "./dom.js";
import { emptyState } from "./feedback.js";

let articles = null; // their modules

/** Load the modules that show a reading, which the first view does not need. */
export async function loadArticles() {
  try {
    articles = await import("./reading.js");
  } catch {
    // Browsers cache a failed import: only a reload of the page can succeed.
    throw new Refusal("The result could not be shown.", { remedy: "Reload the page." });
  }
}

/** The verdict on a reading, in a line. */
export function verdictText(reading) {
  const { label, title } = articles.verdict(reading);
  return `${reading.name}: ${label}. ${title}.`;
}

/** How many images were scored and, of those with verdicts, flagged. */
export function countText(readings) {
  const verdicts = readings.flatMap(({ score }) => score.ood ?? []);
  const flagged = verdicts.filter(({ is_ood: isOod }) => isOod).length;
  return `${plural(readings.length, "image")} scored${verdicts.length ? `, ${flagged} flagged` : ""}`;
}

/** The readings, newest first. `isRunning()` is whether jobs are running; `onClear(readings)` follows their removal. */
export class Results {
  readings = [];
  selected = null;
  isPinned = false; // whether the user has selected it or works with it, so that new readings do not replace it
  shown = null; // the reading of the article, which keeps its state until another one is selected
  items = new Map(); // of the strip, by their reading
  count = h("p", { class: "hint" });
  header = h(
    "div",
    { class: "row" },
    this.count,
    h(
      "div",
      { class: "row start" },
      button("Download scores (CSV)", () => this.download(), "small"),
      button("Remove results", () => this.clear(), "small"),
    ),
  );
  strip = h("ul", { class: "strip", "aria-label": "Scored images" });
  article = h("div", { onpointerdown: () => this.keep(), onkeydown: () => this.keep() });
  elements = [this.header, this.strip, this.article];

  constructor({ isRunning, onClear }) {
    Object.assign(this, { isRunning, onClear });
  }

  /**
   * Add the readings of a job, in the `order` of the jobs. Select the first unless the selected one is newer, or the user
   * works with it; returns whether the first is selected.
   */
  add(readings) {
    const [first] = readings;
    const newer = this.readings.filter(({ order }) => order > first.order).length;
    const next = this.strip.children[newer] ?? null;
    this.readings = this.readings.toSpliced(newer, 0, ...readings);
    for (const reading of readings) {
      const item = this.stripItem(reading);
      this.items.set(reading, item);
      this.strip.insertBefore(item, next);
    }
    const isSelected = !this.selected || !(this.isPinned || this.selected.order > first.order);
    if (isSelected) this.selected = first;
    this.render();
    return isSelected;
  }

  select(reading) {
    this.selected = reading;
    this.keep();
    this.render();
  }

  /** Keep the selected reading when others arrive. */
  keep() {
    this.isPinned = true;
  }

  clear() {
    const { readings } = this;
    for (const { mapUrl, fileUrl } of readings) {
      if (fileUrl) URL.revokeObjectURL(fileUrl);
      mapUrl?.then(URL.revokeObjectURL, () => {});
    }
    Object.assign(this, { readings: [], selected: null, shown: null, isPinned: false });
    this.items.clear();
    this.strip.replaceChildren();
    keepFocus(this.header, viewTitle(this.header), () => this.render());
    this.onClear(readings);
  }

  download() {
    save(new Blob([articles.csv(this.readings)], { type: "text/csv" }), "scores.csv");
  }

  render() {
    this.header.hidden = !this.readings.length;
    this.count.textContent = countText(this.readings);
    this.strip.hidden = this.readings.length < 2;
    for (const [reading, item] of this.items) {
      item.firstChild.setAttribute("aria-pressed", reading === this.selected);
    }
    if (this.selected) this.showArticle();
    else this.article.replaceChildren(...(this.isRunning() ? [] : [nothingScored()]));
  }

  showArticle() {
    if (this.shown === this.selected) return;
    this.shown = this.selected;
    this.article.replaceChildren(articles.readingArticle(this.selected, this.readings));
  }

  /** Render again after a change of the model. */
  refresh() {
    this.shown = null;
    this.render();
  }

  stripItem(reading) {
    const { name } = reading;
    const { kind, label } = articles.verdict(reading);
    const symbol = { in: "✓", out: "✕" }[kind];
    const attributes = {
      type: "button",
      class: `tile ${kind}`,
      title: `${name}: ${label.toLowerCase()}`,
      onclick: () => this.select(reading),
    };
    return h(
      "li",
      {},
      h(
        "button",
        attributes,
        articles.stripImage(reading),
        h(
          "span",
          { class: "row" },
          h("span", { class: "mono" }, articles.headline(reading)),
          h("span", { "aria-hidden": "true" }, symbol),
        ),
        h("span", { class: "name" }, h("bdi", {}, name)),
        h("span", { class: "visually-hidden" }, label),
      ),
    );
  }
}

const nothingScored = () => emptyState("No scores yet", "Add images of your own: their scores appear here.");
