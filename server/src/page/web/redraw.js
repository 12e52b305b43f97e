// A step's super-batch, drawn again under another policy.
import * as api from "./api.js";
import { command, fill, h } from "./dom.js";
import { count, number, percent, plural, seconds, words } from "./format.js";
import { thumbs } from "./thumbs.js";

const POLICIES = ["joint", "joint_top_k", "independent", "top_k", "rank", "proportional", "k_center", "uniform"];
const CRITERIA = ["learnability", "hard", "easy"];

export function redraw(view, id, newest, about) {
  const select = (label, names) => h("select", { "aria-label": label }, h("option", { value: "" }, `${label} as it was`), names.map((name) => h("option", { value: name }, words(name))));
  const input = (label, attributes) => h("input", { type: "number", "aria-label": label, placeholder: label, ...attributes });
  const step = input("Step to redraw", { min: 0, max: Math.max(0, newest), value: Math.max(0, newest) });
  const policy = select("Policy", POLICIES), criterion = select("Criterion", CRITERIA);
  const ratio = input("Filter ratio", { min: 0, max: 0.999, step: "any" }), seed = input("Seed", { min: 0 });
  const place = h("div", { "aria-live": "polite" }), terminal = h("div");
  const asked = () => {
    const given = { policy: policy.value, criterion: criterion.value, filter_ratio: ratio.value, seed: seed.value };
    return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== ""));
  };
  const line = () => {
    const options = Object.entries(asked()).map(([name, value]) => ` --${name.replaceAll("_", "-")} ${value}`).join("");
    fill(terminal, command("In a terminal", `superbatch replay ${id} --step ${step.value}${options} --state ${about.state}`));
  };
  const controls = [step, policy, criterion, ratio, seed];
  controls.forEach((control) => control.addEventListener("input", line));
  line();
  const button = h("button", { type: "submit" }, "Draw again");
  const go = async (event) => {
    event.preventDefault();
    button.disabled = true;
    fill(place, h("p.dim", {}, "Scoring and drawing …"));
    try {
      fill(place, shown(id, await api.redraw(id, step.value, asked(), view.signal)));
    } catch (error) {
      if (!view.signal.aborted) fill(place, h("div.notice", { role: "status" }, h("b", {}, "It cannot be drawn again. "), error.message));
    }
    button.disabled = false;
  };
  const head = h("div.section-head", {}, h("h2", {}, "The same super-batch under another policy"));
  const why = "This page belongs to a service, and takes no compute from its steps. This command line draws again; so does a page of its own, superbatch page.";
  const form = about.replays
    ? h("form.controls.redraw", { onsubmit: go }, controls, button)
    : [h("p.dim.note", {}, why), h("form.controls.redraw", { onsubmit: (event) => event.preventDefault() }, controls)];
  return h("section", {}, head, form, place, terminal);
}

function shown(id, found) {
  const { chosen, redrawn, measured } = found;
  const drawn = (draw) => [words(draw.policy), draw.policy === "uniform" ? "–" : words(draw.criterion), count(draw.sub_batch_size), count(draw.n_chunks), String(draw.seed)];
  const scores = measured ? [number(measured.chosen, 4), number(measured.redrawn, 4), number(measured.uniform, 4)] : ["–", "–", "–"];
  const by = measured ? `Batch score by ${words(measured.criterion)}` : "Batch score";
  const rows = [["As it was chosen", ...drawn(chosen), scores[0]], ["Drawn again", ...drawn(redrawn), scores[1]], ["Uniform, expected", "uniform", "–", count(redrawn.sub_batch_size), "–", "–", scores[2]]];
  const head = ["", "Policy", "Criterion", "Examples", "Chunks", "Seed", by];
  const fresh = found.rows.filter((row) => !row.was_chosen);
  const share = percent(found.rows.length ? found.rows_shared / found.rows.length : 0);
  const same = found.same_draw ? "The same examples in the same order. " : `${plural(found.rows_shared, "example")} of ${count(found.rows.length)} were chosen then (${share}). `;
  const exact = found.losses_differ_by === null ? "" : `Losses differ from the receipt's by at most ${number(found.losses_differ_by)}. `;
  const title = ({ id, score, chunk }) => (redrawn.policy === "uniform" ? id : `${id}, score ${number(score)}, chunk ${chunk}`);
  const pictures = fresh.map((row) => ({ key: `${row.source}.${row.shard}.${row.row}`, title: title(row) }));
  return [
    h("p.redrawn", {}, same, exact, `Scoring took ${seconds(found.seconds.score)} on ${found.device}.`),
    found.missing ? h("p.notice", {}, "Batch scores cannot be compared: ", found.missing) : null,
    h("div.scroll.after", {}, h("table", {}, h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", {}, cell))))))),
    h("section.chart.after", {}, h("div.chart-head", {}, h("h3", {}, "Drawn now and not then", h("span.unit", {}, count(fresh.length)))),
      thumbs(id, pictures)),
  ];
}
