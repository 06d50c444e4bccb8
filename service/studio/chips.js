// Chips, which the first view does not need.

import { h, uid } from "./dom.js";

/** Radio buttons that look like chips. `options` are [value, label, disabled] triples. */
export function chips({ legend, field, options, value, onChange, kind = "chips" }) {
  const name = uid();
  const holder = h("div", { class: kind });

  function chip([key, label, disabled], selected) {
    const onchange = () => onChange?.(key);
    const input = h("input", { type: "radio", name, value: key, checked: key === selected, disabled, onchange });
    return h("label", {}, input, h("span", {}, label));
  }
  const offer = (offered, selected) => holder.replaceChildren(...offered.map((option) => chip(option, selected)));
  offer(options, value);

  return {
    element: h("fieldset", { class: "field", "data-field": field }, h("legend", {}, legend), holder),
    offer,
    get value() {
      return holder.querySelector("input:checked")?.value ?? "";
    },
    set value(next) {
      const inputs = [...holder.querySelectorAll("input:enabled")];
      const match = inputs.find((input) => input.value === String(next));
      if (match) match.checked = true;
    },
  };
}
