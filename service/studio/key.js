// The dialog for the API key.

import { openDialog } from "./dialog.js";
import { announce, button, h, onSubmit, uid } from "./dom.js";
import { apiKey, jobs } from "./session.js";

/** Open the dialog; `onChange` is called once the key is set or removed. */
export function openKeyDialog(onChange) {
  const id = uid();
  const hintId = uid();
  const input = h("input", {
    type: "password",
    id,
    "aria-describedby": hintId,
    autocomplete: "off",
    value: apiKey.get(),
    class: "mono",
    pattern: "\\s*[!-~]*\\s*", // a header cannot contain other characters
    title: "An API key consists of Latin letters, digits and punctuation, without spaces.",
  });
  const hint = "Stored in this tab until you close it, and sent only to this service. Some services need no key.";
  const useKey = (key) => {
    const former = apiKey.get();
    apiKey.set(key);
    if (former && key !== former) {
      jobs.write([]); // the results of a key are not shown to the user of another one
      location.reload();
      return;
    }
    dialog.close();
    announce(key ? "API key set" : "API key removed");
    onChange();
  };
  const buttons = h(
    "div",
    { class: "row start" },
    h("button", { type: "submit", class: "primary" }, "Use key"),
    button("Remove key", () => useKey("")),
  );
  const described = h("p", { id: hintId, class: "hint" }, hint);
  const field = h("div", { class: "field" }, h("label", { for: id }, "Key"), input, described);
  const form = h("form", { class: "stack", onsubmit: onSubmit(() => useKey(input.value.trim())) }, field, buttons);
  const dialog = openDialog("API key", form);
  input.focus();
}
