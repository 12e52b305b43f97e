// All runs of the state.
import * as api from "./api.js";
import { fill, h } from "./dom.js";
import { ago, count, plural, words } from "./format.js";

export async function runs(view) {
  const [about, { runs: found, more }] = await Promise.all([api.about(), api.runs(view.signal)]);
  const head = h("header.title", {}, h("h1", {}, "Runs"), h("p.dim", {}, `In ${about.state}`));
  if (!found.length) {
    const how = "There is no run yet. A run appears here when a trainer opens it.";
    fill(view.place, head, h("div.notice", {}, how));
    return;
  }
  const row = (run) =>
    h("tr", {},
      h("td", {}, h("a", { href: api.link.run(run.run) }, run.run)),
      h("td", {}, badge(run.state)),
      h("td.number", {}, run.newest === null ? "–" : count(run.newest)),
      h("td", {}, words(run.policy)),
      h("td.number", {}, count(run.super_batch_size)),
      h("td.number", {}, count(run.sub_batch_size)),
      h("td.dim", {}, ago(run.committed_unix_ms)));
  const heads = [["Run"], ["State"], ["Newest step", "number"], ["Policy"], ["Scanned a step", "number"], ["Chosen a step", "number"], ["Last commit"]];
  fill(view.place, head,
    h("div.scroll", {}, h("table", {},
      h("thead", {}, h("tr", {}, heads.map(([text, kind]) => h(`th${kind ? `.${kind}` : ""}`, { scope: "col" }, text)))),
      h("tbody", {}, found.map(row)))),
    more ? h("p.dim", {}, `${plural(more, "older run")} not listed: open one by its address, #/runs/ID.`) : null);
}

export const badge = (state) => h(`span.badge.${state}`, {}, state);
