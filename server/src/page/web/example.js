// One example: each time it was a candidate.
import * as api from "./api.js";
import { Group, Lines } from "./chart.js";
import { Captions } from "./captions.js";
import { fill, h } from "./dom.js";
import { count, number, plural, signed, words } from "./format.js";

export async function example(view, id, row) {
  const input = h("input", { type: "search", value: row ?? "", placeholder: "00000.parquet#17", "aria-label": "Row's id", size: 34 });
  const go = (event) => {
    event.preventDefault();
    if (input.value.trim()) location.hash = api.link.example(id, input.value.trim());
  };
  const form = h("form.controls", { onsubmit: go }, input, h("button", {}, "Show"));
  view.keys["/"] = () => input.focus();
  if (!row) {
    fill(view.place, h("header.title", {}, h("h1", {}, "Example"), h("p", {}, "Give the id of a row, as receipts name it, or pick an example of a step.")), form);
    return;
  }
  fill(view.place, form, h("p.dim.note", {}, "Looking through the run's steps …"));
  const found = await api.example(id, row, view.signal);
  const captions = new Captions(id, view.signal);
  const times = found.times;
  const chosen = times.filter((time) => time.outcome === "chosen").length;
  const head = h("header.example", {}, h("img", { src: api.pictureUrl(id, found.key, 256), alt: "", width: 160, height: 160 }),
    h("div", {}, h("h1", {}, captions.place(found.key)), h("p.dim", {}, h("code", {}, found.id)),
      h("p", {}, times.length ? `${plural(times.length, "time")} a candidate, ${count(chosen)} ${chosen === 1 ? "time" : "times"} chosen.` : "It was not a candidate so far."),
      found.next === null ? null : h("p.dim", {}, `Next in step ${count(found.next)}.`)));
  captions.load([found.key]);
  fill(view.place, form, head, times.length > 1 ? chart(view, id, times) : null, times.length ? table(id, times) : null,
    found.more ? h("p.dim", {}, `${plural(found.more, "earlier time")} not shown.`) : null);
}

function chart(view, id, times) {
  const lines = new Lines({
    title: "Own losses over its times", note: "How the learner comes to know it. The reference does not change.", group: new Group(), onpick: (step) => (location.hash = api.link.step(id, step)),
    series: [{ key: "learner_loss", label: "learner", color: "--chosen" }, { key: "reference_loss", label: "reference", color: "--dim", dash: [5, 4] }],
  });
  const column = (key) => times.map((time) => time[key] ?? null);
  lines.set(column("step"), { learner_loss: column("learner_loss"), reference_loss: column("reference_loss") });
  view.redraw = () => lines.draw();
  return lines.element;
}

function table(id, times) {
  const heads = ["Step", "Outcome", "Weights", "Score", "Own", "By batch-mates", "Learner's loss", "Reference's loss", "Chunk"];
  const row = (time) => {
    const outcome = time.outcome === "chosen" ? h("b", {}, "chosen") : h("span.dim", {}, words(time.outcome));
    const added = time.score === null || time.own === null || time.outcome !== "chosen" ? "–" : signed(time.score - time.own);
    const cells = [time.version === null ? "–" : `v${count(time.version)}`, number(time.score), number(time.own), added, number(time.learner_loss), number(time.reference_loss), time.chunk === null ? "–" : count(time.chunk)];
    return h("tr", {}, h("td", {}, h("a", { href: api.link.step(id, time.step) }, count(time.step))), h("td", {}, outcome), cells.map((cell) => h("td.number", {}, cell)));
  };
  return h("div", {}, h("h2", {}, "Each time it was a candidate"), h("div.scroll", {}, h("table", {},
    h("thead", {}, h("tr", {}, heads.map((text, n) => h(n > 1 ? "th.number" : "th", { scope: "col" }, text)))), h("tbody", {}, times.map(row)))),
    h("p.dim.note.after", {}, "“Passed over” without figures: the step's receipt keeps those of the best and of a sample only."));
}
