// Two runs side by side, over the steps and in one of them.
import * as api from "./api.js";
import { Group, Lines } from "./chart.js";
import { fill, h } from "./dom.js";
import { count, flops, number, percent, plural, seconds, words } from "./format.js";
import { redraw } from "./redraw.js";
import { thumbs } from "./thumbs.js";

export async function compare(view, a, b) {
  const ids = b ? [a, b] : [a];
  const [about, facts] = await Promise.all([api.about(), Promise.all(ids.map((id) => api.run(id, view.signal)))]);
  const pick = h("select", { "aria-label": "Other run", onchange: (event) => event.target.value && (location.hash = api.link.compare(a, event.target.value)) },
    h("option", { value: "" }, "Pick a run"), b ? h("option", { value: b, selected: true }, b) : null);
  const rest = h("span.dim", { role: "status" });
  const title = h("header.title", {}, h("div.stepper", {}, h("h1", {}, h("a", { href: api.link.run(a) }, a), h("span.dim", {}, " beside ")), pick, rest));
  const again = redraw(view, a, facts[0].newest ?? 0, about);
  const note = h("p.dim", {}, "Two runs on the same data, such as two policies or two seeds.");
  fill(view.place, title, b ? null : [note, again]);
  offer(view, pick, ids).then((found) => found || b || fill(note, "The state holds no other run."),
    (error) => view.signal.aborted || fill(rest, `Other runs cannot be listed. ${error.message}`));
  if (!b) return;
  const lines = await Promise.all(ids.map((id) => api.timeline(id, 0, view.signal)));
  const group = new Group();
  const charts = [
    ["Batch score over uniform", null, (line) => line.batch_score.map((score, n) => (score === null || line.uniform_score[n] === null ? null : score - line.uniform_score[n])), number],
    ["Trainer's wait", "a step", (line) => line.trainer_wait.map((wait) => wait ?? 0), seconds, (x) => seconds(x, 2), true],
    ["Time", "a step", (line) => line.seconds.total, seconds, (x) => seconds(x, 2), true],
    ["FLOPs so far", "selection, with scoring and probes", (line) => line.selection_so_far, flops, (x) => flops(x, "")],
  ].map(([title, unit, of, text, tick, cut]) => both(view, group, ids, lines, { title, unit, of, text, tick, cut }));
  const place = h("div");
  const last = Math.min(...facts.map((run) => run.newest ?? -1));
  const input = h("input", { type: "number", min: 0, max: Math.max(0, last), value: Math.max(0, last), "aria-label": "Step" });
  const look = () => one(view, ids, Number(input.value)).then((shown) => fill(place, shown), (error) => fill(place, h("div.notice", {}, error.message)));
  input.addEventListener("change", look);
  fill(view.place, title, table(facts), h("div.charts.after", {}, charts), h("div.section-head", {}, h("h2", {}, "In one step"), h("div.stepper", {}, h("span.dim", {}, "step"), input)), place, again);
  if (last >= 0) await look();
}

/** Offers all other runs, as they are read; says whether there is one. */
async function offer(view, pick, ids) {
  let others = 0;
  for await (const { runs } of api.runs(view.signal)) {
    const names = runs.map((run) => run.run).filter((id) => id !== ids[0]);
    others += names.length;
    pick.append(...names.filter((id) => id !== ids[1]).map((id) => h("option", { value: id }, id)));
  }
  return others > 0;
}

function both(view, group, ids, lines, { title, unit, of, text, tick, cut }) {
  const steps = [...new Set(lines.flatMap((line) => line.step))].sort((x, y) => x - y);
  const column = (line) => {
    const at = new Map(line.step.map((step, n) => [step, of(line)[n]]));
    return steps.map((step) => at.get(step) ?? null);
  };
  const chart = new Lines({ title, unit, group, text, tick, cut, zero: cut, series: [{ key: "a", label: ids[0], color: "--chosen" }, { key: "b", label: ids[1], color: "--warn" }] });
  chart.set(steps, { a: column(lines[0]), b: column(lines[1]) });
  const before = view.redraw;
  view.redraw = () => (before?.(), chart.draw());
  return chart.element;
}

function table(facts) {
  const rows = [
    ["State", (run) => run.state], ["Newest step", (run) => count(run.newest)], ["Policy", (run) => words(run.phases.at(-1)?.policy)],
    ["Scanned, chosen a step", (run) => `${count(run.phases.at(-1)?.super_batch_size)}, ${count(run.phases.at(-1)?.sub_batch_size)}`],
    ["Seed", (run) => run.seed], ["Lag", (run) => run.lag], ["Examples chosen", (run) => count(run.totals?.examples_selected)],
    ["Selection so far", (run) => flops(run.selection_flops)],
    ["Training so far", (run) => flops(run.totals?.train_flops)],
  ];
  return h("div.scroll", {}, h("table", {}, h("thead", {}, h("tr", {}, h("th"), facts.map((run) => h("th", { scope: "col" }, run.run)))),
    h("tbody", {}, rows.map(([name, of]) => h("tr", {}, h("td.dim", {}, name), facts.map((run) => h("td", {}, of(run))))))));
}

/** What two runs chose in the same step. */
async function one(view, ids, step) {
  const receipts = await Promise.all(ids.map((id) => api.step(id, step, undefined, view.signal)));
  const keys = receipts.map((receipt) => new Set(receipt.chosen.key));
  const shared = [...keys[0]].filter((key) => keys[1].has(key));
  const [first, second] = receipts.map((receipt) => receipt.summary);
  const spans = (summary) => JSON.stringify(summary.scanned.map(({ source, epoch, start, count }) => [source, epoch, start, count]));
  const same = first.dataset_manifest === second.dataset_manifest && first.seed === second.seed && spans(first) === spans(second);
  const union = keys[0].size + keys[1].size - shared.length;
  const alone = (n) => [...keys[n]].filter((key) => !keys[1 - n].has(key));
  const names = receipts.map(({ chosen }) => new Map(chosen.key.map((key, n) => [key, chosen.id[n]])));
  const show = (n) => thumbs(ids[n], alone(n).map((key) => ({ key, title: names[n].get(key) })));
  return h("div", {},
    h("p", {}, same ? "Both looked at the same super-batch. " : "They looked at different super-batches: other seeds, sizes or data. ",
      `${plural(shared.length, "example")} of ${count(keys[0].size)} and ${count(keys[1].size)} are in both (${percent(union ? shared.length / union : 0)} of all). `,
      `Batch scores: ${number(receipts[0].has_scores ? first.batch_score : null)} and ${number(receipts[1].has_scores ? second.batch_score : null)}.`),
    h("div.charts.after", {}, ids.map((id, n) => h("section.chart", {}, h("div.chart-head", {}, h("h3", {}, `Chosen by ${id} alone`, h("span.unit", {}, count(alone(n).length)))), show(n)))));
}
