// The files that are dropped on the page, also those in folders.

/** Return the dropped files; those of folders follow in the order of their paths. */
export async function droppedFiles({ files, items }) {
  const entries = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean); // only available right now
  if (!entries.some((entry) => entry.isDirectory)) return [...files];
  return (await Promise.all(entries.map(entryFiles))).flat();
}

async function entryFiles(entry) {
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const entries = await folderEntries(entry.createReader());
  return (await Promise.all(entries.map(entryFiles))).flat();
}

/** All entries of a folder; a reader returns them in batches, the last of which is empty. */
async function folderEntries(reader) {
  const entries = [];
  while (true) {
    const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!batch.length) return entries.sort((a, b) => a.name.localeCompare(b.name));
    entries.push(...batch);
  }
}
