// A button that copies text.

import { announce, button, h } from "./dom.js";

/** A button that copies `text()` to the clipboard and confirms it. */
export function copyButton(label, text, className = "quiet") {
  const element = button(
    label,
    async () => {
      element.textContent = (await copy(text())) ? "Copied" : "Copying failed: select the text";
      announce(element.textContent);
      setTimeout(() => element.replaceChildren(label), 1600);
    },
    className,
  );
  return element;
}

async function copy(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return false; // the user denied the permission
    }
  }
  const area = h("textarea", { class: "visually-hidden" }); // pages served over plain HTTP have no clipboard
  area.value = text;
  const { activeElement } = document;
  (activeElement.closest("dialog") ?? document.body).append(area); // an open dialog makes everything else inert
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  activeElement.focus();
  return copied;
}
