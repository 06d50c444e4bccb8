// What this browser tab stores until it is closed; the model is in the address.

const API_KEY = "ncml.key";
const JOB_RECORDS = "ncml.job-records";
const MAX_RECORDS = 48; // of a view

export const apiKey = {
  get: () => sessionStorage.getItem(API_KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(API_KEY, value) : sessionStorage.removeItem(API_KEY)),
};

let selected = new URLSearchParams(location.search).get("model");

/** The selected model, which a bookmark keeps. */
export const modelName = {
  get: () => selected,
  set(value) {
    selected = value;
    const address = new URL(location.href);
    address.searchParams.set("model", value);
    history.replaceState(history.state, "", address);
  },
};
addEventListener("popstate", () => selected && modelName.set(selected)); // Back restores an earlier address

/** The submitted jobs, oldest first. A record is plain JSON with an `id` and a `view`. */
export const jobs = {
  all: () => JSON.parse(sessionStorage.getItem(JOB_RECORDS) ?? "[]"),
  of: (view) => jobs.all().filter((record) => record.view === view),
  add: (record) => jobs.write([...jobs.all(), record]),
  remove: (id) => jobs.write(jobs.all().filter((record) => record.id !== id)),

  /** Store the newest records of each view, as far as they fit. */
  write(records) {
    const views = Map.groupBy(records, ({ view }) => view);
    const isNew = (record) => views.get(record.view).slice(-MAX_RECORDS).includes(record);
    for (let newest = records.filter(isNew); ; newest = reduced(newest)) {
      try {
        sessionStorage.setItem(JOB_RECORDS, JSON.stringify(newest));
        return;
      } catch (error) {
        if (!newest.length) throw error; // the storage is not merely full
      }
    }
  },
};

/** Records without the images of the oldest score or, if none has any, without the oldest of the largest view. */
function reduced(records) {
  const i = records.findIndex(({ images }) => images?.some(({ modelView }) => modelView));
  const small = ({ modelView, ...image }) => image;
  if (i >= 0) return records.with(i, { ...records[i], images: records[i].images.map(small) });
  const size = (group) => JSON.stringify(group).length;
  const views = [...Map.groupBy(records, ({ view }) => view).values()];
  const [oldest] = views.reduce((largest, group) => (size(group) > size(largest) ? group : largest));
  return records.filter((record) => record !== oldest);
}
