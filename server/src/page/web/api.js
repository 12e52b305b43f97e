// The page's JSON, which programs may use as well (docs/page.md).

const path = (...parts) => parts.map(encodeURIComponent).join("/");

async function get(url, signal) {
  const response = await fetch(url, { signal, headers: { accept: "application/json" } });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error ?? `the service answered ${response.status}`);
  return body;
}

/** What names each run's data in the addresses of pictures: ids of runs are used again, for other data. */
const data = new Map();
function noted(run) {
  if (run.data) data.set(run.run, run.data);
  return run;
}

export const about = () => get("/api/about");
export const run = async (id, signal) => noted(await get(`/api/runs/${path(id)}`, signal));

/** All runs, some hundred at a time. */
export async function* runs(signal) {
  let next = null;
  do {
    const found = await get(`/api/runs${next === null ? "" : `?before=${encodeURIComponent(next)}`}`, signal);
    found.runs.forEach(noted);
    yield found;
    next = found.next;
  } while (next !== null);
}

export const timeline = (id, from, signal) => get(`/api/runs/${path(id)}/timeline?from=${from}`, signal);
export const step = (id, number, generation, signal) =>
  get(`/api/runs/${path(id)}/steps/${number}${generation === undefined ? "" : `?generation=${generation}`}`, signal);
export const captions = (id, keys, signal) => get(`/api/runs/${path(id)}/captions?rows=${keys.join(",")}`, signal);
export const example = async (id, key, signal) => noted(await get(`/api/runs/${path(id)}/examples/${path(key)}`, signal));
export const pairs = (id, number, signal) => get(`/api/runs/${path(id)}/steps/${number}/pairs`, signal);
export const redraw = (id, number, asked, signal) => get(`/api/runs/${path(id)}/steps/${number}/redraw?${new URLSearchParams(asked)}`, signal);
export const mix = (id, signal) => get(`/api/runs/${path(id)}/mix`, signal);
export const mixRows = (id, signal) => get(`/api/runs/${path(id)}/mix/rows`, signal);

export function pictureUrl(id, key, size) {
  const named = data.has(id) ? `&data=${data.get(id)}` : "";
  return `/api/runs/${path(id)}/pictures/${path(key)}?size=${size}${named}`;
}
export const receiptUrl = (id, number) => `/api/runs/${path(id)}/steps/${number}/receipt`;

export const link = {
  run: (id) => `#/runs/${path(id)}`,
  step: (id, number) => `#/runs/${path(id)}/steps/${number}`,
  example: (id, key) => `#/runs/${path(id)}/examples/${path(key)}`,
  mix: (id) => `#/runs/${path(id)}/mix`,
  compare: (a, b) => `#/compare/${path(a)}${b ? `/${path(b)}` : ""}`,
};
