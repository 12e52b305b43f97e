// One step: what was chosen beside what was passed over, and why.
import * as api from "./api.js";
import { Dots } from "./chart.js";
import { choice, command, fill, h, part } from "./dom.js";
import { Captions } from "./captions.js";
import { pairs } from "./pairs.js";
import { count, mean, number, percent, plural, seconds, signed, words } from "./format.js";

/** Rows that are put on the page at once. */
const PAGE = 40;

const SORTS = [
  ["drawn", "Order drawn"], ["score", "Score, high first"], ["own", "Own score, high first"], ["added", "Added by batch-mates, high first"],
  ["learner_loss", "Learner's loss, high first"], ["reference_loss", "Reference's loss, low first"], ["position", "Place in the data"],
];

export async function step(view, id, asked) {
  const [about, run] = await Promise.all([api.about(), api.run(id, view.signal)]);
  if (asked === "newest") {
    if (run.newest === null) return view.fail(new Error(`no step of run ${id} is committed yet`));
    return location.replace(api.link.step(id, run.newest));
  }
  const number_ = Number(asked);
  steer(view, id, number_, run.newest ?? number_);
  const receipt = await api.step(id, number_, undefined, view.signal);
  const captions = new Captions(id, view.signal);
  const chosen = rows(receipt.chosen, true), passed = rows(receipt.passed_over, false);
  const table = new Table(view, id, receipt, chosen, passed, captions);
  const open = (row) => detail(view, id, row, captions);
  table.onpick = open;
  const summary = receipt.summary;
  const head = h("header.title", {}, stepper(id, number_, run.newest ?? number_), facts(summary, receipt));
  const charts = h("div.charts.two", {}, plot(chosen, passed, open, view), chunks(chosen, summary, view));
  const map = pairs(view, id, number_, about);
  fill(view.place, head, charts, map, table.element, bad(receipt.bad_rows), h("h2", {}, "The same elsewhere"),
    h("p", {}, h("a", { href: api.receiptUrl(id, number_), download: `${id}-${number_}.json` }, "The whole receipt as JSON")),
    command("In a terminal", `superbatch receipts ${id} --step ${number_} --state ${about.state}`),
    command("Drawn again, under another policy", `superbatch replay ${id} --step ${number_} --policy independent --state ${about.state}`),
    command("Over HTTP", `curl ${location.origin}${api.receiptUrl(id, number_)}`));
}

/** A receipt's columns as rows. What a batch adds is what the score has beyond the example's own. */
function rows(columns, isChosen) {
  const { key = [] } = columns;
  return key.map((_, n) => {
    const row = Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values[n]]));
    row.drawn = n;
    row.chosen = isChosen;
    row.added = isChosen && row.own !== null && row.score !== null ? row.score - row.own : null;
    return row;
  });
}

function steer(view, id, step, newest) {
  const go = (to) => () => to >= 0 && to <= newest && (location.hash = api.link.step(id, to));
  Object.assign(view.keys, { ArrowLeft: go(step - 1), k: go(step - 1), ArrowRight: go(step + 1), j: go(step + 1) });
  view.keys["/"] = () => view.place.querySelector("input[type=search]")?.focus();
}

function stepper(id, step, newest) {
  const to = (target, text, label) =>
    target < 0 || target > newest
      ? h("span.button", { "aria-disabled": "true" }, text)
      : h("a.button", { href: api.link.step(id, target), "aria-label": label }, text);
  const input = h("input", { type: "number", min: 0, max: newest, value: step, "aria-label": "Step" });
  const go = (event) => {
    event.preventDefault();
    if (input.value !== "" && Number(input.value) <= newest) location.hash = api.link.step(id, Number(input.value));
  };
  return h("div.stepper", {}, h("h1", {}, h("a", { href: api.link.run(id) }, id), h("span.dim", {}, " / "), "step"),
    to(step - 1, "‹", "Step before"), h("form", { onsubmit: go }, input), to(step + 1, "›", "Step after"), h("span.dim", {}, `of ${count(newest)}`));
}

function facts(s, receipt) {
  const cost = s.cost ?? {};
  const scored = s.policy === "uniform" ? "" : ` by ${words(s.criterion)}, ${s.loss} loss, ${plural(s.n_chunks, "chunk")}`;
  const learner = s.learner ? `learner v${s.learner.version}, lag ${plural(s.lag_steps, "step")}` : "no learner asked";
  const mode = s.mode === "normal" ? null : h("span.badge.warn", {}, words(s.mode));
  const scores = receipt.has_scores
    ? [h("span", {}, "batch score ", h("b", {}, number(s.batch_score))),
      s.uniform_score === null ? null : h("span", {}, "uniform would score ", h("b", {}, number(s.uniform_score)))]
    : [h("span", {}, "no loss was read")];
  return [h("p", {}, `${words(s.policy)}${scored} · ${learner} `, mode),
    h("p.line", {}, scores, h("span", {}, "scanned ", h("b", {}, count(cost.candidates_scanned))), h("span", {}, "chosen ", h("b", {}, count(receipt.chosen_total))),
      h("span", {}, "holes ", h("b", {}, count(s.holes))), h("span", {}, "took ", h("b", {}, seconds(cost.seconds?.total))),
      s.trainer_wait_seconds === null ? null : h("span", {}, "trainer waited ", h("b", {}, seconds(s.trainer_wait_seconds))))];
}

/** Learner's loss against the reference's: what lies above the diagonal is learnable. */
function plot(chosen, passed, open, view) {
  const both = (row) => row.learner_loss !== null && row.reference_loss !== null && row.learner_loss !== undefined && row.reference_loss !== undefined;
  const dot = (color) => (row) => ({ x: row.reference_loss, y: row.learner_loss, color, row });
  const dots = [...passed.filter(both).map(dot("--passed")), ...chosen.filter(both).map(dot("--chosen"))];
  if (!dots.length) return h("section.chart", {}, h("div.chart-head", {}, h("h3", {}, "Losses"), h("p.dim", {}, "This step's receipt holds no pair of losses: not both models were asked.")));
  const dotted = new Dots({
    title: "Losses", note: "Each example's own pair. Above the dashed line the learner is worse than the reference: there is something to learn.",
    xTitle: "reference's loss", yTitle: "learner's loss", diagonal: true, onpick: (dot) => open(dot.row),
  });
  dotted.set(dots, [["--chosen", "chosen"], ["--passed", "passed over"]]);
  redraws(view, () => dotted.draw());
  return dotted.element;
}

const redraws = (view, draw) => {
  const before = view.redraw;
  view.redraw = () => (before?.(), draw());
};

/** By chunk, the mean own score and what batch-mates added. */
function chunks(chosen, summary, view) {
  const byChunk = Map.groupBy ? Map.groupBy(chosen, (row) => row.chunk) : new Map();
  const means = [...byChunk].map(([chunk, rows]) => ({ chunk, rows, own: mean(rows.map((row) => row.own)), added: mean(rows.map((row) => row.added)) }));
  const known = means.filter(({ own }) => own !== null);
  const head = h("div.chart-head", {}, h("h3", {}, "Score by chunk"),
    h("p.dim", {}, "Chunks are drawn one after the other. What batch-mates add is the conditional part: what an example is worth beside those drawn before it."));
  if (!known.length) return h("section.chart", {}, head, h("p.dim", {}, "This step was not drawn by scores."));
  const low = Math.min(0, ...known.map(({ own, added }) => Math.min(own, own + added)));
  const high = Math.max(0, ...known.map(({ own, added }) => Math.max(own, own + added)));
  const at = (value) => (value - low) / (high - low || 1);
  const bar = (from, to, kind) => part(h(`i.${kind}`), { left: at(Math.min(from, to)), width: at(Math.max(from, to)) - at(Math.min(from, to)) });
  const line = ({ chunk, rows, own, added }) =>
    h("div.chunk", { title: plural(rows.length, "example") }, h("span.dim.number", {}, chunk), h("div.track", {}, part(h("i.zero"), { left: at(0), width: 0 }), bar(0, own, "own"), bar(own, own + added, "added")),
      h("span.number", {}, number(own + added)));
  return h("section.chart", {}, head, h("div.legend", {}, h("span", {}, h("i.own"), "own"), h("span", {}, h("i.added"), "added by batch-mates"), h("span.dim", {}, "mean of a chunk")),
    h("div.chunks", {}, known.map(line)));
}

/** Chosen beside passed over, with sorting, filter and search. */
class Table {
  constructor(view, id, receipt, chosen, passed, captions) {
    Object.assign(this, { view, id, receipt, captions, sort: "drawn", chunk: "", search: "", side: "chosen" });
    this.lists = [new List(this, "Chosen", chosen), new List(this, "Passed over", passed)];
    const sort = h("select", { "aria-label": "Sort by", onchange: (event) => this.change({ sort: event.target.value }) }, SORTS.map(([value, text]) => h("option", { value }, text)));
    const drawn = [...new Set(chosen.map((row) => row.chunk))];
    const chunk = h("select", { "aria-label": "Chunk", onchange: (event) => this.change({ chunk: event.target.value }) },
      h("option", { value: "" }, "All chunks"), drawn.map((chunk) => h("option", { value: chunk }, `Chunk ${chunk}`)));
    const search = h("input", { type: "search", placeholder: "Search captions and ids  ( / )", "aria-label": "Search captions and ids" });
    search.addEventListener("input", () => this.change({ search: search.value.trim().toLowerCase() }));
    const side = choice("Side", [["chosen", `Chosen ${count(receipt.chosen_total)}`], ["passed", "Passed over"]], "chosen", (side) => {
      this.sides.dataset.side = side;
    });
    side.classList.add("only-narrow");
    this.sides = h("div.sides", { "data-side": "chosen" }, this.lists.map((list) => list.element));
    const total = receipt.passed_over_total, kept = passed.length;
    const note = kept < total ? `A receipt keeps ${count(kept)} of the ${count(total)} that were passed over: those with the best own scores, and a sample of the rest.` : null;
    this.element = h("div", {}, h("div.section-head", {}, h("h2", {}, "Examples"), side, h("div.controls", {}, sort, drawn.length > 1 ? chunk : null, search)), note ? h("p.dim.note", {}, note) : null, this.sides);
    const scores = [...chosen, ...passed.filter((row) => !row.sampled)].flatMap((row) => [row.own, row.score]).filter((score) => score !== null && score !== undefined);
    this.scale = [scores.reduce((a, b) => Math.min(a, b), 0), scores.reduce((a, b) => Math.max(a, b), 1e-9)];
    this.change({});
  }

  change(settings) {
    Object.assign(this, settings);
    this.lists.forEach((list) => list.show());
    if (this.search) this.searchCaptions();
  }

  /** Captions are read in the background while there is something to search for. */
  async searchCaptions() {
    const wanted = this.search;
    for (const list of this.lists) {
      for (let at = 0; at < list.rows.length && wanted === this.search && !this.view.signal.aborted; at += 64) {
        const more = await this.captions.load(list.rows.slice(at, at + 64).map((row) => row.key));
        if (more && wanted === this.search) list.show();
      }
    }
  }

  wanted(row) {
    if (this.chunk !== "" && row.chosen && String(row.chunk) !== this.chunk) return false;
    if (!this.search) return true;
    return row.id.toLowerCase().includes(this.search) || (this.captions.of(row.key) ?? "").toLowerCase().includes(this.search);
  }

  order(a, b) {
    const key = this.sort;
    const [x, y] = [a[key] ?? a.own ?? a.position, b[key] ?? b.own ?? b.position];
    if (key === "drawn") return a.chosen ? a.drawn - b.drawn : 0;
    return key === "position" || key === "reference_loss" ? x - y : y - x;
  }
}

class List {
  constructor(table, name, rows) {
    Object.assign(this, { table, rows, shown: PAGE });
    this.head = h("h3");
    this.name = name;
    this.body = h("ol.rows");
    this.more = h("button.more", { type: "button", onclick: () => this.show((this.shown += PAGE)) });
    this.element = h("section", { class: `side ${name === "Chosen" ? "chosen" : "passed"}` }, this.head, this.body, this.more);
  }

  show() {
    const { table } = this;
    const found = this.rows.filter((row) => table.wanted(row)).sort((a, b) => table.order(a, b));
    const page = found.slice(0, this.shown);
    fill(this.head, this.name, " ", h("span.dim", {}, found.length === this.rows.length ? count(found.length) : `${count(found.length)} of ${count(this.rows.length)}`));
    fill(this.body, page.map((row) => this.line(row)));
    if (!found.length) fill(this.body, h("li.dim", {}, this.rows.length ? "None match." : "None are in the receipt."));
    this.more.hidden = found.length <= this.shown;
    this.more.textContent = `Show ${count(Math.min(PAGE, found.length - this.shown))} more`;
    table.captions.load(page.map((row) => row.key));
  }

  line(row) {
    const { table } = this;
    const losses = row.learner_loss === null && row.reference_loss === null ? null
      : h("span.losses", {}, "loss ", h("b", {}, number(row.learner_loss)), " learner, ", h("b", {}, number(row.reference_loss)), " reference");
    const score = row.chosen ? row.score : row.own;
    const note = row.chosen ? (row.added ? `${number(row.own)} own, ${signed(row.added)} by batch-mates` : "own score") : row.own === null || row.own === undefined ? "no score" : row.sampled ? "own score, sampled" : "own score";
    const button = h("button.row", { type: "button", onclick: () => table.onpick(row) },
      h("img", { src: api.pictureUrl(table.id, row.key, 128), alt: "", loading: "lazy", width: 64, height: 64 }),
      h("span.what", {}, table.captions.place(row.key), h("span.id.dim", {}, row.chosen && table.receipt.summary.n_chunks > 1 ? `chunk ${row.chunk} · ` : "", row.id), losses),
      h("span.score", {}, h("b", {}, number(score)), bars(row, table.scale), h("small.dim", {}, note)));
    return h("li", {}, button);
  }
}

/** Own score and what batch-mates added, on one scale for all rows. */
function bars(row, [low, high]) {
  if (row.own === null || row.own === undefined) return null;
  // A sampled example may lie far below all others.
  const at = (value) => Math.max(0, (value - low) / (high - low));
  const bar = (from, to, kind) => part(h(`i.${kind}`), { left: at(Math.min(from, to)), width: Math.abs(at(to) - at(from)) });
  return h("span.track", {}, bar(0, row.own, "own"), row.added ? bar(row.own, row.own + row.added, "added") : null, part(h("i.zero"), { left: at(0) }));
}

function detail(view, id, row, captions) {
  const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  const caption = captions.place(row.key);
  fill(view.dialog,
    h("div.detail", {}, h("img", { src: api.pictureUrl(id, row.key, 384), alt: "", width: 320, height: 320 }),
      h("div", {}, h("p.caption", {}, caption),
        h("dl", {}, fact("Score it was drawn with", row.chosen ? number(row.score, 5) : "passed over"), fact("Own score", number(row.own, 5)),
          row.chosen ? fact("Added by batch-mates", row.added === null ? "–" : signed(row.added, 5)) : null,
          fact("Learner's loss", number(row.learner_loss, 5)), fact("Reference's loss", number(row.reference_loss, 5)),
          row.chosen ? fact("Chunk", String(row.chunk)) : null, row.chosen && row.weight !== 1 ? fact("Weight", number(row.weight)) : null,
          fact("Place in the data", count(row.position)), fact("Row", h("code", {}, row.id))),
        h("a.button", { href: api.link.example(id, row.key) }, "Each time it was a candidate"))),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
  captions.load([row.key]);
  view.dialog.showModal();
}

function bad(rows) {
  if (!rows.length) return null;
  const line = (row) => h("tr", {}, h("td", {}, h("code", {}, row.id)), h("td", {}, words(row.reason)), h("td.dim", {}, row.detail));
  return h("section", {}, h("h2", {}, "Rows that could not be used"), h("div.scroll", {}, h("table", {},
    h("thead", {}, h("tr", {}, ["Row", "Reason", "Detail"].map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, rows.slice(0, 200).map(line)))),
    rows.length > 200 ? h("p.dim", {}, `${count(rows.length - 200)} more are in the receipt.`) : null);
}
