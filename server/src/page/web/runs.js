// All runs of the state.
import * as api from "./api.js";
import { fill, h } from "./dom.js";
import { ago, count, plural, words } from "./format.js";

/** Parts of the list that are read without being asked for; each has up to 200 runs. */
const PARTS = 5;

export async function runs(view) {
  const about = await api.about();
  const head = h("header.title", {}, h("h1", {}, "Runs"), h("p.dim", {}, `In ${about.state}`));
  const place = h("div"), note = h("p.dim.note.after");
  fill(view.place, head, place, note);
  let found = [], parts = 0;
  for await (const part of api.runs(view.signal)) {
    // Each part has the newest commit first, and so has the whole.
    found = [...found, ...part.runs].sort((a, b) => (b.committed_unix_ms ?? 0) - (a.committed_unix_ms ?? 0));
    parts += 1;
    fill(place, found.length ? table(found) : h("div.notice", {}, "There is no run yet. A run appears here when a trainer opens it."));
    const left = `${plural(part.more, "run")} more, by name before ${part.next}`;
    fill(note, part.more ? [left, parts < PARTS ? " …" : ". "] : []);
    if (part.more && parts >= PARTS) {
      await new Promise((done) => note.append(h("button", { type: "button", onclick: done }, "Read more")));
    }
  }
}

function table(found) {
  const heads = [["Run"], ["State"], ["Newest step", "number"], ["Policy"], ["Scanned a step", "number"], ["Chosen a step", "number"], ["Last commit"]];
  return h("div.scroll", {}, h("table", {},
    h("thead", {}, h("tr", {}, heads.map(([text, kind]) => h(`th${kind ? `.${kind}` : ""}`, { scope: "col" }, text)))),
    h("tbody", {}, found.map((run) => (run.error ? unreadable(run) : row(run))))));
}

function row(run) {
  return h("tr", {},
    h("td", {}, h("a", { href: api.link.run(run.run) }, run.run)),
    h("td", {}, badge(run.state)),
    h("td.number", {}, run.newest === null ? "–" : count(run.newest)),
    h("td", {}, words(run.policy)),
    h("td.number", {}, count(run.super_batch_size)),
    h("td.number", {}, count(run.sub_batch_size)),
    h("td.dim", {}, ago(run.committed_unix_ms)));
}

/** A run that cannot be read, with the reason. */
function unreadable(run) {
  return h("tr", {}, h("td", {}, run.run), h("td", {}, badge(run.state)), h("td.wrap", { colspan: 5 }, run.error));
}

export const badge = (state) => h(`span.badge.${state}`, {}, state);
