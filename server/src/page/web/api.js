// The page's JSON, which programs may use as well (docs/page.md).

const path = (...parts) => parts.map(encodeURIComponent).join("/");

async function get(url, signal) {
  const response = await fetch(url, { signal, headers: { accept: "application/json" } });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error ?? `the service answered ${response.status}`);
  return body;
}

export const about = () => get("/api/about");
export const runs = (signal) => get("/api/runs", signal);
export const run = (id, signal) => get(`/api/runs/${path(id)}`, signal);
export const timeline = (id, from, signal) => get(`/api/runs/${path(id)}/timeline?from=${from}`, signal);
export const step = (id, number, generation, signal) =>
  get(`/api/runs/${path(id)}/steps/${number}${generation === undefined ? "" : `?generation=${generation}`}`, signal);
export const captions = (id, keys, signal) => get(`/api/runs/${path(id)}/captions?rows=${keys.join(",")}`, signal);
export const example = (id, key, signal) => get(`/api/runs/${path(id)}/examples/${path(key)}`, signal);
export const pairs = (id, number, signal) => get(`/api/runs/${path(id)}/steps/${number}/pairs`, signal);
export const redraw = (id, number, asked, signal) => get(`/api/runs/${path(id)}/steps/${number}/redraw?${new URLSearchParams(asked)}`, signal);
export const mix = (id, signal) => get(`/api/runs/${path(id)}/mix`, signal);

export const pictureUrl = (id, key, size) => `/api/runs/${path(id)}/pictures/${path(key)}?size=${size}`;
export const receiptUrl = (id, number) => `/api/runs/${path(id)}/steps/${number}/receipt`;

export const link = {
  run: (id) => `#/runs/${path(id)}`,
  step: (id, number) => `#/runs/${path(id)}/steps/${number}`,
  example: (id, key) => `#/runs/${path(id)}/examples/${path(key)}`,
  mix: (id) => `#/runs/${path(id)}/mix`,
  compare: (a, b) => `#/compare/${path(a)}${b ? `/${path(b)}` : ""}`,
};
