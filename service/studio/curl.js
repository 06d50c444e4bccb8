// curl commands that reproduce what the page does.

import { catalogue } from "./catalogue.js";
import { copyButton } from "./copy.js";
import { h } from "./dom.js";
import { apiKey } from "./session.js";

/** Quote a word for a shell, if necessary. */
export const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

/** A curl command. It never contains the API key, but reads it from the environment. */
export function curl(...parts) {
  const authorization = apiKey.get() ? ['-H "Authorization: Bearer $NCML_API_KEY"'] : [];
  return ["curl", ...authorization, ...parts].join(" ");
}

/** The quoted value of `-F` that uploads a file as `image`; curl itself reads commas, semicolons and quotes. */
export function imageField(name) {
  const file = /[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;
  return quoted(`image=@${file}`);
}

/** The quoted URL of a path of the service, with query parameters. */
export function endpoint(path, parameters) {
  const query = String(new URLSearchParams(parameters)).replaceAll("%40", "@").replaceAll("+", "%20");
  return quoted(`${new URL(path, document.baseURI).href}?${query}`);
}

/** A command for a terminal, which may wrap after a parameter, a button that copies it, and what curl can add. */
export function terminal(command, kind = "curl") {
  const parts = command.split(/(?<=[?&])/).flatMap((part) => [part, h("wbr")]);
  return [
    h("pre", { class: "curl", tabindex: 0, role: "group", "aria-label": "Command" }, parts),
    h(
      "div",
      {},
      copyButton(`Copy ${kind}`, () => command, "small"),
    ),
    ...(kind === "curl" && catalogue.webhooksAllowed ? [webhookHint()] : []), // no false: callers may append it as text
  ];
}

function webhookHint() {
  const option = h("code", {}, "-F webhook=https://…");
  const docs = h("a", { href: "docs#/webhooks/job_ended" }, "API docs");
  const text = " to have the end of a long job sent to an address that the operator allows: see the ";
  return h("p", { class: "hint" }, "Add ", option, text, docs, ".");
}
