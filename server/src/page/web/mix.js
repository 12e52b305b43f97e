// What the data is made of, and what selection makes of it.
import * as api from "./api.js";
import { Group, Lines } from "./chart.js";
import { choice, fill, h, part } from "./dom.js";
import { count, number, percent, plural } from "./format.js";

const COLORS = ["--chosen", "--warn", "--good", "--bad", "--stage-6", "--passed"];

export async function mix(view, id) {
  const name = () => h("h1", {}, h("a", { href: api.link.run(id) }, id), h("span.dim", {}, " / "), "mix");
  fill(view.place, h("header.title", {}, name(), h("p", {}, "Reading the steps' receipts …")));
  const found = await api.mix(id, view.signal);
  const head = h("header.title", {}, name(),
    h("p", {}, `Of ${plural(found.steps.length, "step")}${found.stride > 1 ? ` (one in ${count(found.stride)})` : ""}: ${count(found.scanned)} scanned, ${count(found.chosen)} chosen of a pool of ${count(found.pool)}. `,
      "Lift is the share among the chosen over the share among the scanned: 1 is what a uniform draw gives."));
  if (!found.steps.length) return fill(view.place, head, h("div.notice", {}, "No step that was drawn by scores is committed yet."));
  fill(view.place, head, h("h2", {}, "Sources"), shares(found.sources), shards(found),
    h("h2", {}, "Over the steps"), h("div.charts", {}, drifts(view, id, found)),
    h("h2", {}, "Duplicates and rules"), h("div.facts", {}, h("dl", {}, duplicates(found))), columns(found),
    h("h2", {}, "Captions and images"), sample(view, id));
}

const ORDERS = [["high", "Highest lift"], ["low", "Lowest lift"], ["name", "By name"]];

function shards(found) {
  const place = h("div");
  const by = { high: (a, b) => b.lift - a.lift, low: (a, b) => a.lift - b.lift, name: (a, b) => a.name.localeCompare(b.name) };
  const show = (order) => fill(place, shares([...found.shards].sort(by[order]).slice(0, 60)));
  show("high");
  const never = found.shards_never;
  const scanned = `${count(found.shards_scanned)} of ${plural(found.shards_pool, "shard")} were scanned in these steps; ${never ? `of ${count(never)} no row was chosen.` : "of each at least one row was chosen."}`;
  return [h("div.section-head", {}, h("h2", {}, "Shards"), choice("Order", ORDERS, "high", show)), h("p.dim.note", {}, scanned), place,
    never ? neverChosen(found) : null];
}

function neverChosen({ never, shards_never: all }) {
  const line = ({ name, scanned }) => h("li", {}, h("code", {}, name), h("span.dim", {}, ` ${plural(scanned, "row")} scanned`));
  const rest = all > never.length ? h("p.dim", {}, `${plural(all - never.length, "more shard")}.`) : null;
  return h("details.never", {}, h("summary", {}, `Shards without a chosen row: ${count(all)}`), h("ul", {}, never.map(line)), rest);
}

const cells = (heads) => h("thead", {}, h("tr", {}, heads.map((text, n) => h(n > 1 ? "th.number" : "th", { scope: "col" }, text))));

/** Two bars: the share among the chosen above that among the scanned. */
function bars(row, most) {
  const bar = (share, kind) => part(h(`i.${kind}`), { left: 0, width: share / most });
  return h("td.wide", {}, h("span.lift-track", {}, bar(row.chosen_share, "chosen"), bar(row.scanned_share, "scanned")));
}

const widest = (rows) => rows.reduce((most, row) => Math.max(most, row.scanned_share, row.chosen_share), 1e-9);

function shares(rows) {
  const most = widest(rows);
  const line = (row) =>
    h("tr", {}, h("td", {}, h("code", {}, row.name)), bars(row, most), h("td.number.dim", {}, percent(row.pool_share)),
      h("td.number", {}, percent(row.scanned_share)), h("td.number", {}, percent(row.chosen_share)), h("td.number", {}, h("b", {}, number(row.lift))),
      h("td.number.dim", {}, count(row.scanned)));
  return h("div.scroll", {}, h("table.mix", {}, cells(["Name", "", "Of the pool", "Of scanned", "Of chosen", "Lift", "Rows scanned"]), h("tbody", {}, rows.map(line))));
}

function drifts(view, id, found) {
  const group = new Group(), shown = [];
  const add = (options, steps, values) => {
    const lines = new Lines({ group: options.apart ? new Group() : group, onpick: (step) => (location.hash = api.link.step(id, step)), ...options });
    lines.set(steps, values);
    shown.push(lines);
  };
  const series = (names) => names.map((label, n) => ({ key: String(n), label, color: COLORS[n] }));
  const columns = (lists) => Object.fromEntries(lists.map((list, n) => [String(n), list]));
  if (found.sources.length > 1) {
    // The sources that most was chosen of.
    const first = found.sources.map((source, n) => [source, n]).sort(([a], [b]) => b.chosen - a.chosen).slice(0, COLORS.length);
    const note = found.sources.length > first.length ? `The ${count(first.length)} of ${plural(found.sources.length, "source")} that most was chosen of.` : null;
    add({ title: "Lift of sources", note, series: series(first.map(([source]) => source.name)) }, found.steps, columns(first.map(([, n]) => found.lift[n])));
  }
  const { step, shards } = found.parts;
  if (shards.length > 1 && step.length > 1) {
    const note = `Of the highest and the lowest lift, in ${plural(step.length, "part")} of the run. A gap: the part scanned no row of it.`;
    add({ title: "Lift of shards", note, apart: true, series: series(shards.map((shard) => shard.name)) }, step, columns(shards.map((shard) => shard.lift)));
  }
  add({
    title: "Losses of the chosen, and of a sample of those passed over", note: "Means of own pairs. What is chosen drifts with what the learner knows by now.", wide: true,
    series: [
      { key: "learner_chosen", label: "learner, chosen", color: "--chosen" }, { key: "learner_passed", label: "learner, passed over", color: "--chosen", dash: [5, 4] },
      { key: "reference_chosen", label: "reference, chosen", color: "--warn" }, { key: "reference_passed", label: "reference, passed over", color: "--warn", dash: [5, 4] },
    ],
  }, found.steps, found.losses);
  view.redraw = () => shown.forEach((lines) => lines.draw());
  return shown.map((lines) => lines.element);
}

function duplicates({ left_out: rules, contents, scanned }) {
  const fact = (name, ...value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  const near = rules === null || rules.duplicates_rule === null
    ? "No rule looks for them (duplicates_above of a phase's tuning), so receipts do not count them."
    : `${count(rules.duplicates_above)} of ${count(scanned)} scanned (${percent(rules.duplicates_above / scanned)}) were left out: an image of a cosine above ${number(rules.duplicates_rule)} was there.`;
  const others = rules === null ? [] : [["clip_score_at_least", "CLIPScore"], ["neg_clip_loss_keep", "negCLIPLoss"], ["score_columns", "score columns"]].filter(([rule]) => rules[rule]);
  const left = others.map(([rule, name]) => `${count(rules[rule])} by ${name}`).join(", ");
  const same = contents === null ? "Receipts of these steps hold no content hashes."
    : `Of ${plural(contents.chosen, "chosen row")}, ${count(contents.again)} had been chosen before in these steps, and ${count(contents.copies)} had picture and caption of another row that was.`;
  return [fact("Near-duplicates", near), fact("The same again", same), left ? fact("Other rules", `Left out: ${left}.`) : null];
}

function columns({ columns: found }) {
  if (!found.length) return null;
  const line = (column) => h("tr", {}, h("td", {}, h("code", {}, column.name)), h("td", {}), h("td.number", {}, number(column.chosen)), h("td.number", {}, number(column.passed)));
  return h("div.after", {}, h("p.dim.note", {}, "Mean values of the phase's score columns."),
    h("div.scroll", {}, h("table", {}, cells(["Column", "", "Chosen", "Passed over, a sample"]), h("tbody", {}, found.map(line)))));
}

/** What receipts do not hold is measured when it is asked for: whole blocks of the data are read for it. */
function sample(view, id) {
  const place = h("div", { "aria-live": "polite" });
  const button = h("button", { type: "button", onclick: show }, "Measure a sample of rows");
  async function show() {
    button.disabled = true;
    fill(place, h("p.dim", {}, "Reading blocks of the data …"));
    try {
      fill(place, measured(await api.mixRows(id, view.signal)));
    } catch (error) {
      if (view.signal.aborted) return;
      button.disabled = false;
      fill(place, button, h("div.notice", { role: "status" }, h("b", {}, "It cannot be measured. "), error.message));
    }
  }
  fill(place, h("p", {}, button, h("span.dim", {}, " Receipts hold neither captions nor images: up to 32 blocks of the data are read.")));
  return place;
}

/** Bytes: 12 B, 3.4 kB. */
const bytes = (n) => (n < 1000 ? `${count(n)} B` : n < 1e6 ? `${number(n / 1e3)} kB` : `${number(n / 1e6)} MB`);

function measured(found) {
  const head = h("p.dim.note", {}, `Measured on ${plural(found.scanned, "candidate")}, ${count(found.chosen)} of them chosen, in ${plural(found.blocks, "block")} of ${plural(found.steps.length, "step")}.`,
    found.unread ? ` ${plural(found.unread, "block")} could not be read.` : null);
  return [head, h("div.charts", {},
    numbers("Length of captions", "characters", found.caption_chars, count, "No caption was read: the rows have none."),
    numbers("Size of images", "as stored", found.image_bytes, bytes, "Images lie beside the files, or are none: their sizes were not read."))];
}

function numbers(title, unit, found, text, none) {
  const head = h("div.chart-head", {}, h("h3", {}, title, h("span.unit", {}, unit)));
  if (found === null) return h("section.chart", {}, head, h("p.dim", {}, none));
  const most = widest(found.bins);
  const line = (bin) =>
    h("tr", {}, h("td", {}, bin.least === bin.most ? text(bin.least) : `${text(bin.least)} – ${text(bin.most)}`), bars(bin, most),
      h("td.number", {}, percent(bin.scanned_share)), h("td.number", {}, percent(bin.chosen_share)), h("td.number", {}, h("b", {}, number(bin.lift))));
  const medians = h("p.dim", {}, `Median ${text(found.median_scanned)} of the scanned, ${found.median_chosen === null ? "–" : text(found.median_chosen)} of the chosen.`);
  return h("section.chart", {}, head, medians,
    h("div.scroll.plain", {}, h("table.mix", {}, cells([unit, "", "Of scanned", "Of chosen", "Lift"]), h("tbody", {}, found.bins.map(line)))));
}
