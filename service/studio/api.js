// The service as the page knows it: requests, problems as sentences, and following a job to its end.
// Events are read through fetch rather than EventSource, which could send no API key.

const KEY = "ncml.key";
const STREAMS = 3; // a browser opens six connections to a host: streams must leave some for everything else
let streams = 0;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

const REMEDIES = {
  400: "Choose another file, or reload the page if it goes on.",
  401: "Enter the key that you were given for this service.",
  403: "Ask whoever runs the service for a key that may do this.",
  404: "Start it again to get a new one.",
  410: "",
  413: "Make the picture smaller, or send fewer at once.",
  415: "Save it as PNG or JPEG and try again.",
  422: "",
  429: "The service is busy or this is more than your share: wait a moment, then try again.",
  500: "Try again; if it happens again, tell whoever runs the service, with the request’s id.",
  503: "Wait a few seconds and try again; if it goes on, look at the Models view or ask whoever runs the service.",
  504: "Try fewer pictures or fewer steps, or try again when less is waiting.",
};

/** A request that was not answered as wished: `message` says why, `remedy` what to do, `fields` what was at fault. */
export class Refusal extends Error {
  constructor(message, { status = 0, remedy, id = "", after = 0, calm = false, fields = [] } = {}) {
    super(message);
    Object.assign(this, { status, calm, fields });
    this.remedy = remedy ?? REMEDIES[status] ?? "Try again.";
    if (status >= 500 && id) this.remedy += ` Request ${id}.`;
    else if (after > 1) this.remedy += ` The service suggests ${after} s.`;
  }
}

/** fetch with the key; throws a `Refusal` for anything but success. Paths are relative to the page. */
export async function ask(path, { headers = {}, ...rest } = {}) {
  const own = key.get();
  let response;
  try {
    response = await fetch(path, { ...rest, headers: own ? { Authorization: `Bearer ${own}`, ...headers } : headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service cannot be reached.", { remedy: "Check that it is running and that you are connected, then try again." });
  }
  if (response.ok) return response;
  const after = Number(response.headers.get("retry-after")) || 0;
  const { detail = `The service answered ${response.status} ${response.statusText}.`, errors = [] } = response.headers.get("content-type")?.includes("json") ? await response.json() : {};
  throw new Refusal(detail, { status: response.status, id: response.headers.get("x-request-id"), after, fields: errors.map(({ field }) => field) });
}

export const json = async (path, options) => (await ask(path, { ...options, headers: { Accept: "application/json", ...options?.headers } })).json();

/** Submit a job; returns its document. `body` is a FormData, or an object for JSON. */
export function submit(path, body) {
  const form = body instanceof FormData;
  return json(path, {
    method: "POST",
    headers: { Prefer: "respond-async", ...(form ? {} : { "Content-Type": "application/json" }) },
    body: form ? body : JSON.stringify(body),
  });
}

export const cancel = (id) => json(`jobs/${id}/cancel`, { method: "POST" });
export const result = (id) => json(`jobs/${id}/result`);

/**
 * Fetches a running job's pictures as they look now: call what this returns whenever there are new ones, and
 * `onpreview(bitmap, {stage, step, total, done})` follows. One at a time: calls meanwhile are answered by the next one.
 */
export function previews(id, onpreview) {
  let busy = false;
  let again = false;
  return async () => {
    again = true;
    if (busy) return;
    busy = true;
    while (again) {
      again = false;
      const response = await ask(`jobs/${id}/preview`).catch(() => null); // the next one will do
      const bitmap = await response?.blob().then(createImageBitmap).catch(() => null);
      if (!bitmap) continue;
      const { stage, ...numbers } = Object.fromEntries(response.headers.get("X-Progress").split(", ").map((part) => part.split("=")));
      onpreview(bitmap, { stage, step: +numbers.step, total: +numbers.total, done: +numbers.done });
    }
    busy = false;
  };
}

export const TERMINAL = new Set(["succeeded", "failed", "canceled", "expired"]);

/**
 * Follow a job: `onevent({status} | {progress})` for each change; resolves to {status, error} of its end.
 * A dropped stream is taken up where it ended; beyond a few streams at once, jobs are asked after instead.
 */
export async function follow(id, onevent) {
  if (streams >= STREAMS) return poll(id, onevent);
  streams += 1;
  try {
    let last = "0";
    for (let failures = 0; ; ) {
      try {
        const response = await ask(`jobs/${id}/events`, { headers: { "Last-Event-ID": last } });
        if (response.status === 204) { // it has ended, and all was told
          const { status, error } = await json(`jobs/${id}`);
          return { status, error };
        }
        for await (const event of messages(response.body)) {
          failures = 0;
          last = event.id || last;
          const data = JSON.parse(event.data);
          if (event.name === "progress") onevent({ progress: data });
          else onevent({ status: event.name });
          if (TERMINAL.has(event.name)) return { status: event.name, error: data.error };
        }
      } catch (error) {
        if (error instanceof Refusal && error.status && error.status < 500 && error.status !== 429) throw error;
        if ((failures += 1) > 30) throw error;
      }
      await pause(Math.min(500 * 2 ** failures, 5000));
    }
  } finally {
    streams -= 1;
  }
}

async function poll(id, onevent) {
  for (let status = ""; ; await pause(1000)) {
    const job = await json(`jobs/${id}`);
    if (job.status !== status) onevent({ status: (status = job.status) });
    if (TERMINAL.has(status)) return { status, error: job.error };
    if (job.progress) onevent({ progress: job.progress });
  }
}

/** The messages of a text/event-stream. */
async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value.replaceAll("\r", "");
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      const event = { name: "message", id: "", data: "" };
      for (const line of rest.slice(0, end).split("\n")) {
        const [, field, text] = /^(\w*):? ?(.*)$/.exec(line) ?? [];
        if (field === "event") event.name = text;
        else if (field === "id") event.id = text;
        else if (field === "data") event.data += text;
      }
      if (event.data) yield event;
    }
  }
}

export const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** The service's address as curl needs it. */
export const address = () => new URL(".", document.baseURI).href.replace(/\/$/, "");

/** A word for a shell. */
export const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

/** A curl line. The key itself is never shown: the line takes it from the environment. */
export function curl(...parts) {
  return ["curl", ...(key.get() ? ['-H "Authorization: Bearer $NCML_API_KEY"'] : []), ...parts].join(" ");
}
