// Dialogs, which the first view does not need.

import { button, h, uid } from "./dom.js";

/** Open a modal dialog, which its button, Escape or a click beside it closes and removes. */
export function openDialog(title, ...content) {
  const id = uid();
  const header = h(
    "header",
    { class: "row" },
    h("h2", { id }, title),
    button("Close", () => dialog.close(), "quiet"),
  );
  const dialog = h(
    "dialog",
    {
      "aria-labelledby": id,
      onclose: () => dialog.remove(),
      onpointerdown: (event) => event.target === dialog && dialog.close(),
    },
    h("div", { class: "sheet" }, header, ...content),
    h("div", { class: "live visually-hidden", "aria-live": "polite" }),
  );
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
