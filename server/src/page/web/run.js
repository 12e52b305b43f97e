// One run over its steps, live.
import * as api from "./api.js";
import { Group, Lines } from "./chart.js";
import { choice, command, fill, h } from "./dom.js";
import { ago, count, flops, mean, number, pace, percent, plural, seconds, signed, waited, words } from "./format.js";
import { badge } from "./runs.js";

/** How often a run that goes on is asked, in milliseconds. */
const EVERY = 2000;
/** Steps that the figures above the charts are of. */
const RECENT = 20;
/** A run goes on if its last commit is younger than this, in milliseconds, or than so many of its steps take. */
const QUIET = 30000, QUIET_STEPS = 3;

const STAGES = [
  ["fetch", "fetch", "--stage-1"], ["decode", "decode", "--stage-2"], ["embed_reference", "reference", "--stage-3"],
  ["embed_learner", "learner", "--stage-4"], ["wait_weights", "waiting for weights", "--stage-5"], ["select", "select", "--stage-6"],
];

export async function run(view, id) {
  const [about, first] = await Promise.all([api.about(), api.run(id, view.signal)]);
  const shown = { range: "all" };
  const charts = new Charts((step) => (location.hash = api.link.step(id, step)));
  const parts = { title: h("header.title"), tiles: h("div.tiles"), table: h("div.scroll"), more: h("div.facts") };
  const ranges = [["100", "Last 100"], ["1000", "Last 1,000"], ["all", "All steps"]];
  const range = choice("Steps", ranges, "all", (value) => {
    shown.range = value;
    load(true).catch(view.fail);
  });
  const note = h("p.dim.note");
  fill(view.place, parts.title, parts.tiles, h("div.section-head", {}, h("h2", {}, "Over the steps"), range), note, charts.element,
    h("h2", {}, "Newest steps"), parts.table, h("h2", {}, "The run"), parts.more,
    command("In a terminal", `superbatch receipts ${id} --state ${about.state}`));
  ranges.forEach(([, text], n) => (view.keys[String(n + 1)] = () => [...range.children].find((b) => b.textContent === text).click()));
  view.redraw = () => charts.redraw();
  let known = null, alive = QUIET;

  async function load(again, facts) {
    facts ??= await api.run(id, view.signal);
    if (facts.newest !== null && (again || facts.newest !== known)) {
      const from = shown.range === "all" ? 0 : Math.max(0, facts.newest + 1 - Number(shown.range));
      const [line, recent] = await Promise.all([
        api.timeline(id, from, view.signal),
        api.timeline(id, Math.max(0, facts.newest + 1 - RECENT), view.signal),
      ]);
      known = facts.newest;
      alive = Math.max(QUIET, QUIET_STEPS * 1000 * (pace(recent) ?? 0));
      charts.set(line);
      tiles(parts.tiles, facts, recent);
      newest(parts.table, id, recent);
      note.textContent = line.stride > 1 ? `One step in ${count(line.stride)} is drawn. Click a chart to look into a step.` : "Click a chart to look into a step.";
    }
    title(parts.title, facts);
    more(parts.more, facts);
    if (facts.newest === null) fill(parts.tiles, h("div.notice", {}, "No step is committed yet."));
    const goes = facts.state === "open" && facts.ms_since_commit !== null && facts.ms_since_commit < alive;
    const still = facts.newest === null ? "no commit yet" : `last commit ${ago(facts.committed_unix_ms)}`;
    view.live(goes ? "now" : "ended", goes ? "live" : facts.state === "open" ? still : facts.state);
    return facts;
  }

  let facts = await load(true, first);
  while (!view.signal.aborted && facts.state === "open") {
    await new Promise((done) => setTimeout(done, EVERY));
    if (view.signal.aborted) return;
    // Nobody looks: nothing is asked.
    if (document.hidden) continue;
    try {
      facts = await load(false);
    } catch (error) {
      if (view.signal.aborted) return;
      view.live("lost", `the service does not answer: ${error.message}`);
    }
  }
}

function title(place, run) {
  const phase = run.phases.at(-1) ?? {};
  const scored = phase.policy === "uniform" ? "" : ` · ${words(phase.criterion)} · ${run.loss} loss`;
  const steps = run.newest === null ? "no step yet" : `step ${count(run.newest)}${run.steps_total ? ` of ${count(run.steps_total)}` : ""}`;
  fill(place, h("h1", {}, run.run, " ", badge(run.state)),
    h("p", {}, `${words(phase.policy)}${scored} · ${count(phase.super_batch_size)} scanned, ${count(phase.sub_batch_size)} chosen a step · ${steps}`),
    run.failure ? h("div.notice.bad", { role: "alert" }, run.failure) : null);
}

function tile(label, value, unit, note, kind = "") {
  return h(`div.tile${kind}`, {}, h("span.label", {}, label), h("span.value", {}, value, unit ? h("small", {}, unit) : null), h("span.dim", {}, note));
}

function tiles(place, run, recent) {
  const totals = run.totals ?? {};
  const gain = mean(recent.batch_score.map((score, n) => (score === null || recent.uniform_score[n] === null ? null : score - recent.uniform_score[n])));
  const uniform = mean(recent.uniform_score);
  const spent = run.selection_flops ?? 0;
  const training = totals.train_flops ?? 0;
  const wait = waited(recent), each = pace(recent);
  const version = recent.version.at(-1);
  const odd = recent.mode.filter((mode) => mode !== "normal").length;
  const of = `mean of the last ${plural(recent.step.length, "step")}`;
  fill(place,
    tile("Batch score over uniform", gain === null ? "–" : signed(gain), null,
      gain === null ? "this policy reads no scores" : `uniform would score ${number(uniform)}; ${of}`, ".lead"),
    tile("Trainer waited", seconds(wait), wait === null ? null : " a step",
      each && wait !== null ? `${percent(Math.min(1, wait / each))} of ${seconds(each)} a step` : "for its batches"),
    tile("Selection has cost", spent ? flops(spent) : "–", null,
      training ? `${number(spent / training)} times the training's ${flops(training)}` : "training is not known"),
    tile("Learner", version === null || version === undefined ? "–" : `v${count(version)}`, null,
      version === null || version === undefined ? "not asked" : `lag ${plural(recent.lag.at(-1), "step")} (${run.lag})`),
    tile("Scanned", count(totals.candidates_scanned), null, `${count(totals.examples_selected)} chosen, ${count(totals.bad_rows)} bad rows`),
    tile("Mode", words(recent.mode.at(-1)), null, odd ? `${odd} of the last ${recent.step.length} steps were not normal` : "no fallback lately", odd ? ".warn" : ""));
}

function newest(place, id, line) {
  const heads = ["Step", "Mode", "Weights", "Lag", "Batch score", "Uniform", "Waited", "Took", "Holes", ""];
  const rows = line.step.map((step, n) =>
    h("tr", {}, h("td", {}, h("a", { href: api.link.step(id, step) }, count(step))), h("td", {}, words(line.mode[n])),
      h("td.number", {}, line.version[n] === null ? "–" : `v${line.version[n]}`), h("td.number", {}, count(line.lag[n])),
      h("td.number", {}, number(line.batch_score[n])), h("td.number.dim", {}, number(line.uniform_score[n])),
      h("td.number", {}, seconds(line.trainer_wait[n])), h("td.number", {}, seconds(line.seconds.total[n])),
      h("td.number", {}, count(line.holes[n])), h("td.dim", {}, ago(line.committed_unix_ms[n]))));
  fill(place, h("table", {}, h("thead", {}, h("tr", {}, heads.map((text, n) => h(n > 1 && n < 9 ? "th.number" : "th", { scope: "col" }, text)))),
    h("tbody", {}, rows.reverse().slice(0, 12))));
}

function more(place, run) {
  const fact = (name, ...value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  const source = (source) => h("div", {}, h("code", {}, source.uri), h("span.dim", {}, ` ${count(source.rows)} rows in ${plural(source.shards, "shard")}, weight ${number(source.weight)}`));
  const phase = (phase) => h("div", {}, `from step ${count(phase.from_step)}: ${words(phase.policy)}, ${count(phase.super_batch_size)} → ${count(phase.sub_batch_size)}`,
    h("span.dim", {}, phase.policy === "uniform" ? "" : ` ${words(phase.criterion)}, ${plural(phase.n_chunks, "chunk")}`));
  const rewind = (rewind) => h("div", {}, `generation ${rewind.generation} from step ${count(rewind.to_step)} on`);
  fill(place, h("dl", {}, fact("Data", run.sources.map(source)), fact("Phases", run.phases.map(phase)),
    fact("Seed", String(run.seed)), fact("Lag", run.lag), run.rewinds.length ? fact("Rewinds", run.rewinds.map(rewind)) : null));
}

class Charts {
  constructor(onpick) {
    const group = new Group();
    const make = (options) => new Lines({ group, onpick, ...options });
    this.score = make({
      title: "Batch score", note: "Mean conditional score an example of the batch that was chosen, beside what a uniform draw of the same size would be expected to score.", tall: true,
      series: [{ key: "batch_score", label: "chosen", color: "--chosen" }, { key: "uniform_score", label: "uniform, expected", color: "--dim", dash: [5, 4] }],
    });
    this.own = make({
      title: "Own score", note: "Mean score of each example's own pair alone.",
      series: [{ key: "own_chosen", label: "chosen", color: "--chosen" }, { key: "own_candidates", label: "all candidates", color: "--passed" }],
    });
    this.time = make({
      title: "Time by stage", unit: "a step", wide: true, stacked: true, cut: true, text: seconds, tick: (x) => seconds(x, 2),
      series: STAGES.map(([key, label, color]) => ({ key, label, color })),
    });
    this.wait = make({
      title: "Trainer's wait", unit: "a step", zero: true, cut: true, text: seconds, tick: (x) => seconds(x, 2), note: "How long the slowest rank stood still for a batch; 0 where it was ready.",
      series: [{ key: "trainer_wait", label: "waited", color: "--warn" }],
    });
    this.lag = make({
      title: "Lag and holes", zero: true, whole: true, text: count,
      series: [{ key: "lag", label: "lag, steps", color: "--chosen" }, { key: "holes", label: "holes, rows", color: "--bad" }],
    });
    this.flops = make({
      title: "FLOPs so far", unit: "of the run", zero: true, text: flops, tick: (x) => flops(x, ""),
      series: [{ key: "selection_so_far", label: "selection, with scoring and probes", color: "--chosen" }, { key: "training_so_far", label: "training", color: "--passed" }],
    });
    this.all = [this.score, this.own, this.wait, this.time, this.flops, this.lag];
    this.element = h("div.charts", {}, this.all.map((chart) => chart.element));
  }

  set(line) {
    const bands = line.step.flatMap((step, n) => (line.mode[n] === "normal" ? [] : [{ from: step, to: line.step[n + 1] ?? step, color: `--mode-${line.mode[n]}`, label: `${words(line.mode[n])} mode` }]));
    this.score.set(line.step, line, bands);
    this.own.set(line.step, line);
    this.wait.set(line.step, { trainer_wait: line.trainer_wait.map((wait) => wait ?? 0) });
    this.lag.set(line.step, line);
    this.time.set(line.step, line.seconds);
    this.flops.set(line.step, line);
  }

  redraw() {
    this.all.forEach((chart) => chart.draw());
  }
}
