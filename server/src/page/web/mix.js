// What the data is made of, and what selection makes of it.
import * as api from "./api.js";
import { Group, Lines } from "./chart.js";
import { choice, fill, h, part } from "./dom.js";
import { count, number, percent, plural } from "./format.js";

const COLORS = ["--chosen", "--warn", "--good", "--bad", "--stage-6", "--passed"];

export async function mix(view, id) {
  fill(view.place, h("header.title", {}, h("h1", {}, h("a", { href: api.link.run(id) }, id), h("span.dim", {}, " / "), "mix"), h("p", {}, "Reading the steps' receipts …")));
  const found = await api.mix(id, view.signal);
  const head = h("header.title", {}, h("h1", {}, h("a", { href: api.link.run(id) }, id), h("span.dim", {}, " / "), "mix"),
    h("p", {}, `Of ${plural(found.steps.length, "step")}${found.stride > 1 ? ` (one in ${count(found.stride)})` : ""}: ${count(found.scanned)} scanned, ${count(found.chosen)} chosen. `,
      "Lift is the share among the chosen over the share among the scanned: 1 is what a uniform draw gives."));
  if (!found.steps.length) return fill(view.place, head, h("div.notice", {}, "No step that was drawn by scores is committed yet."));
  const place = h("div");
  const orders = [["high", "Highest lift"], ["low", "Lowest lift"], ["name", "By name"]];
  const show = (order) => fill(place, shares(sorted(found.shards, order)));
  const never = found.shards_never;
  fill(view.place, head, h("h2", {}, "Sources"), shares(found.sources), found.sources.length > 1 ? drift(view, id, found) : null,
    h("div.section-head", {}, h("h2", {}, "Shards"), choice("Order", orders, "high", show)),
    h("p.dim.note", {}, `${plural(found.shards_scanned, "shard")} scanned; ${never ? `of ${count(never)} no row was chosen.` : "of each at least one row was chosen."}`), place);
  show("high");
}

function sorted(shards, order) {
  const by = { high: (a, b) => b.lift - a.lift, low: (a, b) => a.lift - b.lift, name: (a, b) => a.name.localeCompare(b.name) };
  return [...shards].sort(by[order]).slice(0, 60);
}

function shares(rows) {
  const most = rows.reduce((most, row) => Math.max(most, row.scanned_share, row.chosen_share), 1e-9);
  const bar = (share, kind) => part(h(`i.${kind}`), { left: 0, width: share / most });
  const line = (row) =>
    h("tr", {}, h("td", {}, h("code", {}, row.name)), h("td.wide", {}, h("span.lift-track", {}, bar(row.chosen_share, "chosen"), bar(row.scanned_share, "scanned"))),
      h("td.number", {}, percent(row.scanned_share)), h("td.number", {}, percent(row.chosen_share)), h("td.number", {}, h("b", {}, number(row.lift))),
      h("td.number.dim", {}, count(row.scanned)));
  const heads = ["Name", "", "Of scanned", "Of chosen", "Lift", "Rows scanned"];
  return h("div.scroll", {}, h("table", {}, h("thead", {}, h("tr", {}, heads.map((text, n) => h(n > 1 ? "th.number" : "th", { scope: "col" }, text)))), h("tbody", {}, rows.map(line))));
}

function drift(view, id, found) {
  const series = found.sources.slice(0, COLORS.length).map((source, n) => ({ key: String(n), label: source.name, color: COLORS[n] }));
  const lines = new Lines({ title: "Lift over the steps", group: new Group(), series, onpick: (step) => (location.hash = api.link.step(id, step)) });
  lines.set(found.steps, Object.fromEntries(series.map(({ key }) => [key, found.lift[Number(key)]])));
  view.redraw = () => lines.draw();
  return h("div.after", {}, lines.element);
}
