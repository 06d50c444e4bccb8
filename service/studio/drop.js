// The files that are dropped on the page, also those in folders.

/** The dropped `files`, those of folders in the order of their paths, each with its `path`, and the `unreadable` names in them. */
export async function droppedFiles({ files, items }) {
  const entries = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean); // only available right now
  if (!entries.some((entry) => entry.isDirectory)) return { files: [...files], unreadable: [] };
  const unreadable = [];
  return { files: await filesOf(entries, unreadable), unreadable };
}

async function filesOf(entries, unreadable) {
  const read = async (entry) => {
    try {
      if (entry.isFile) {
        const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
        return [Object.assign(file, { path: entry.fullPath.slice(1) })];
      }
      return await filesOf(await folderEntries(entry.createReader()), unreadable);
    } catch {
      unreadable.push(entry.name);
      return [];
    }
  };
  return (await Promise.all(entries.map(read))).flat();
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
