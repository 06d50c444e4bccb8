// Follows the state and the progress of a job, by its event stream or by polling.
// Events are read through fetch: EventSource cannot send an API key.

import { Refusal, request, requestJson } from "./api.js";

// A browser opens six connections to a host for all of its tabs: streams must leave some for other requests.
const MAX_STREAMS = 2;
const MAX_FAILURES = 30;
const SILENCE_MS = 35_000; // of a stream that is lost: the service sends a comment every 15 s
const POSITION_MS = 5000; // between two requests for the position of a waiting job
const POLLING_MS = 500; // between two requests for the state of any polled job
const MAX_POLLING_MS = 10_000; // between two requests for that of the same job
const FINAL_STATES = new Set(["succeeded", "failed", "canceled", "expired"]);
let openStreams = 0;
let polledJobs = 0;

/**
 * Follow a job: call `onEvent({status} | {progress} | {position} | {lost})` for each change; resolves to its final
 * {status, error}. `position` is the number of jobs ahead of a waiting one. `lost` is whether the connection is lost;
 * it resumes after the last event received. If several streams are already open, the job is polled instead.
 */
export async function follow(id, onEvent) {
  const waiting = new AbortController(); // aborted when the job no longer waits
  const report = (event) => {
    if (event.progress || (event.status && event.status !== "queued")) waiting.abort();
    onEvent(event);
  };
  const isStreamed = openStreams < MAX_STREAMS;
  if (isStreamed) reportPositions(id, waiting.signal, onEvent);
  openStreams += isStreamed;
  polledJobs += !isStreamed;
  try {
    return await retry(isStreamed ? streamer(id, report) : poller(id, report), onEvent);
  } finally {
    openStreams -= isStreamed;
    polledJobs -= !isStreamed;
    waiting.abort();
  }
}

/** Report the position of a waiting job, which the events of its stream do not contain. */
async function reportPositions(id, signal, onEvent) {
  while (true) {
    await pause(POSITION_MS);
    if (signal.aborted) return;
    const { position } = await requestJson(`jobs/${id}`, { signal }).catch(() => ({})); // `follow` reports failures
    if (Number.isInteger(position) && !signal.aborted) onEvent({ position });
  }
}

/** Call `attempt(onAlive)` until it returns something, or fails permanently or more than `maxFailures` times. */
export async function retry(attempt, onEvent, maxFailures = MAX_FAILURES) {
  let failures = 0;
  const onAlive = () => {
    if (failures) onEvent({ lost: false });
    failures = 0;
  };
  while (true) {
    try {
      const end = await attempt(onAlive);
      if (end) return end;
    } catch (error) {
      failures += 1;
      if (isPermanent(error) || failures > maxFailures) throw error;
      onEvent({ lost: true });
    }
    await pause(Math.min(500 * 2 ** failures, 5000));
  }
}

const isPermanent = (error) =>
  error instanceof Refusal && error.status !== 0 && error.status < 500 && error.status !== 429;

/** An attempt to follow the event stream of a job; it returns null if the stream ends early. */
function streamer(id, onEvent) {
  let lastId = "0";
  async function followStream(onAlive, { signal, restart }) {
    const headers = { "Last-Event-ID": lastId };
    const response = await request(`jobs/${id}/events`, { headers, isQuick: false, signal });
    onAlive();
    if (response.status === 204) return requestJson(`jobs/${id}`); // the job has ended, and there are no more events
    for await (const event of messages(response.body, restart)) {
      if (event.name === "stopping") return null; // the service restarts
      lastId = event.id || lastId;
      const data = JSON.parse(event.data);
      onEvent(event.name === "progress" ? { progress: data } : { status: event.name });
      if (FINAL_STATES.has(event.name)) return { status: event.name, error: data.error };
    }
    return null;
  }
  return async (onAlive) => {
    const silence = alarm(SILENCE_MS);
    try {
      return await followStream(onAlive, silence);
    } finally {
      silence.stop();
    }
  };
}

/** A signal that is aborted unless `restart` or `stop` is called within some time. */
function alarm(ms) {
  const controller = new AbortController();
  let timer = null;
  const stop = () => clearTimeout(timer);
  const restart = () => {
    stop();
    timer = setTimeout(() => controller.abort(), ms);
  };
  restart();
  return { signal: controller.signal, restart, stop };
}

/** An attempt to poll a job until it has ended; the more jobs are polled, the less often each. */
function poller(id, onEvent) {
  let [lastStatus, lastPosition] = ["", null];
  return async (onAlive) => {
    while (true) {
      const { status, error, progress, position } = await requestJson(`jobs/${id}`);
      onAlive();
      if (status !== lastStatus) onEvent({ status });
      if (Number.isInteger(position) && position !== lastPosition) onEvent({ position });
      [lastStatus, lastPosition] = [status, position];
      if (FINAL_STATES.has(status)) return { status, error };
      if (progress) onEvent({ progress });
      await pause(Math.min(POLLING_MS * polledJobs, MAX_POLLING_MS));
    }
  };
}

/** The messages of a text/event-stream; `onBytes` is called whenever something arrives, also comments. */
async function* messages(body, onBytes) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    onBytes();
    buffer += value.replaceAll("\r", "");
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop(); // the incomplete one
    for (const block of blocks) {
      const event = parseMessage(block);
      if (event.data) yield event;
    }
  }
}

function parseMessage(block) {
  const event = { name: "message", id: "", data: "" };
  for (const line of block.split("\n")) {
    const [, field, text] = /^(\w*):? ?(.*)$/.exec(line) ?? [];
    if (field === "event") event.name = text;
    else if (field === "id") event.id = text;
    else if (field === "data") event.data += text;
  }
  return event;
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
