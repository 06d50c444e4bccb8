// Tables, and the Markdown of model cards: headings, lists, tables, paragraphs, bold and code.

import { h } from "./dom.js";

/** A table whose first column names its rows; `caption` is shown above it. */
export function table({ caption, headings, rows }) {
  const head = headings.map((heading) => h("th", { scope: "col" }, heading));
  const body = rows.map(([first, ...cells]) => {
    const name = h("th", { scope: "row" }, first);
    return h(
      "tr",
      {},
      name,
      cells.map((cell) => h("td", {}, cell)),
    );
  });
  return scrollable(caption, h("caption", {}, caption), h("thead", {}, h("tr", {}, head)), h("tbody", {}, body));
}

/** A table that scrolls by itself if it is wider than the page. */
const scrollable = (label, ...parts) =>
  h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, h("table", {}, parts));

export function markdown(text) {
  let title = ""; // the last heading, which distinguishes tables of the same columns
  return text
    .trim()
    .split(/\n\s*\n/)
    .flatMap((block) => {
      if (block.startsWith("|")) return markdownTable(block, title);
      const elements = textBlock(block);
      title = elements.findLast(({ tagName }) => tagName === "H4")?.textContent ?? title;
      return elements;
    });
}

function markdownTable(block, title) {
  const rows = block.split("\n").map((line) => line.split("|").slice(1, -1));
  const [headings, , ...body] = rows.map((cells) => cells.map((cell) => cell.trim()));
  const head = headings.map((cell) => h("th", { scope: "col" }, spans(cell)));
  const lines = body.map((cells) =>
    h(
      "tr",
      {},
      cells.map((cell) => h("td", {}, spans(cell))),
    ),
  );
  const label = [title, headings.join(", ")].filter(Boolean).join(": ");
  return scrollable(label, h("thead", {}, h("tr", {}, head)), h("tbody", {}, lines));
}

/** Headings, lists and paragraphs, which may follow each other without an empty line. */
function textBlock(block) {
  const elements = [];
  let list = null;
  let paragraph = null;
  for (const line of block.split("\n")) {
    const [, title] = /^#+ (.*)/.exec(line) ?? [];
    const [, item] = /^[-*] (.*)/.exec(line) ?? [];
    if (title) {
      elements.push(h("h4", {}, title));
      list = null;
      paragraph = null;
    } else if (item) {
      if (!list) {
        list = h("ul");
        paragraph = null;
        elements.push(list);
      }
      list.append(h("li", {}, spans(item)));
    } else if (list && /^\s/.test(line)) {
      list.lastChild.append(" ", ...spans(line.trim()));
    } else {
      if (!paragraph) {
        paragraph = h("p");
        list = null;
        elements.push(paragraph);
      }
      paragraph.append(...spans(line), " ");
    }
  }
  return elements;
}

/** A line with its bold and code parts. */
function spans(line) {
  return line.split(/(\*\*[^*]+\*\*|`[^`]+`)/).map((part) => {
    if (part.startsWith("**")) return h("strong", {}, part.slice(2, -2));
    return part.startsWith("`") ? h("code", {}, part.slice(1, -1)) : part;
  });
}
