// curl lines that reproduce what the page does.

import { copyButton, h } from "./dom.js";
import { apiKey } from "./session.js";

/** A word for a shell, quoted where it needs it. */
export const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

/** A curl line. The API key is never shown: the line takes it from the environment. */
export function curl(...parts) {
  const authorization = apiKey.get() ? ['-H "Authorization: Bearer $NCML_API_KEY"'] : [];
  return ["curl", ...authorization, ...parts].join(" ");
}

/** The quoted address of a path of the service with its parameters. */
export function endpoint(path, parameters) {
  const query = String(new URLSearchParams(parameters)).replaceAll("%40", "@").replaceAll("+", "%20");
  return quoted(`${new URL(path, document.baseURI).href}?${query}`);
}

/** A line for a terminal, which may wrap after a parameter, and a button that copies it. */
export function terminal(line, kind = "curl") {
  const parts = line.split(/(?<=[?&])/).flatMap((part) => [part, h("wbr")]);
  return [
    h("pre", { class: "curl", tabindex: 0, "aria-label": `${kind} line` }, parts),
    h(
      "div",
      {},
      copyButton(`Copy ${kind}`, () => line, "small"),
    ),
  ];
}
