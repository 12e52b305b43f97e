// The scores of pairs of a step, as a heat map in the order of the draw.
import * as api from "./api.js";
import { Captions } from "./captions.js";
import { css, fill, h } from "./dom.js";
import { count, plural, signed, words } from "./format.js";

/** A section that computes and shows the map when it is asked to: scoring takes a moment. */
export function pairs(view, id, step, about) {
  const place = h("div");
  const section = h("section", {}, h("div.section-head", {}, h("h2", {}, "Pairs in draw order")), place);
  if (!about.replays) {
    fill(place, h("p.dim", {}, "This page belongs to a service, and takes no compute from its steps. A page of its own shows the map: ",
      h("code", {}, `superbatch page --state ${about.state} --listen 127.0.0.1:0`)));
    return section;
  }
  const button = h("button", { type: "button", onclick: show }, "Score the pairs of this step");
  const note = h("span.dim", {}, " with the weights that it was chosen with, on this machine");
  async function show() {
    if (button.disabled) return;
    button.disabled = true;
    note.textContent = " scoring …";
    try {
      const found = await api.pairs(id, step, view.signal);
      const map = new HeatMap(view, id, found);
      fill(place, map.element);
      map.draw();
      map.canvas.focus();
    } catch (error) {
      if (view.signal.aborted) return;
      fill(place, h("div.notice", { role: "status" }, h("b", {}, "There is no map. "), error.message));
    }
  }
  view.keys.p = show;
  fill(place, h("p", {}, button, note));
  return section;
}

/** A cell for each image and text: above zero it adds to the batch's score. */
class HeatMap {
  constructor(view, id, found) {
    Object.assign(this, { id, found, size: found.key.length, at: null });
    this.captions = new Captions(id, view.signal);
    // Own terms are far larger than the others, which would all look alike beside them.
    const others = found.values.filter((_, n) => n % (this.size + 1)).map(Math.abs).sort((a, b) => a - b);
    this.most = others[Math.floor(0.99 * (others.length - 1))] || Math.abs(found.values[0]) || 1;
    this.canvas = h("canvas.heat", { tabindex: 0, role: "application", "aria-label": `Scores of ${count(this.size)} by ${count(this.size)} pairs; arrow keys move` });
    this.scale = h("canvas.scale", { "aria-hidden": "true" });
    this.details = h("div.pair-details", { "aria-live": "polite" });
    const low = h("span", {}, signed(-this.most)), high = h("span", {}, signed(this.most));
    const what = found.loss === "softmax"
      ? "Logits of pairs, the learner's less the reference's: softmax has no score of a single pair."
      : "What each pair of an image (row) and a text (column) adds to the batch's score.";
    const by = found.criterion === "learnability" ? "Learner's loss less the reference's." : found.criterion === "hard" ? "Learner's loss alone." : "The reference's loss alone: little loss adds most.";
    const less = found.chosen_total > this.size ? ` The first ${count(this.size)} of ${plural(found.chosen_total, "chosen example")}.` : "";
    this.element = h("section.chart.pairs", {}, h("div.chart-head", {}, h("h3", {}, `Score of pairs, ${words(found.criterion)}`),
      h("p.dim", {}, `${what} ${by} The diagonal is each example's own pair; lines divide chunks. Colours end at the 99th percentile of the pairs off the diagonal.${less}`),
      found.missing ? h("p.notice", {}, "One model is left out: ", found.missing) : null),
      h("div.legend", {}, low, this.scale, high, h("span", {}, "images go down, texts across")), h("div.heat-place", {}, this.canvas, this.details));
    this.canvas.addEventListener("pointermove", (event) => this.look(this.cell(event)));
    this.canvas.addEventListener("click", (event) => this.look(this.cell(event)));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    this.look([0, 0]);
    const before = view.redraw;
    view.redraw = () => (before?.(), this.draw());
  }

  cell(event) {
    const box = this.canvas.getBoundingClientRect();
    const place = (at, from, size) => Math.max(0, Math.min(this.size - 1, Math.floor(((at - from) / size) * this.size)));
    return [place(event.clientY, box.top, box.height), place(event.clientX, box.left, box.width)];
  }

  move(event) {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    this.look(this.at.map((at, n) => Math.max(0, Math.min(this.size - 1, at + by[n] * (event.shiftKey ? 8 : 1)))));
  }

  look([i, j]) {
    if (this.at && this.at[0] === i && this.at[1] === j) return;
    this.at = [i, j];
    const { key, chunk, values } = this.found;
    const side = (n, what) => h("div.side-of-pair", {},
      h("a", { href: api.link.example(this.id, key[n]) }, h("img", { src: api.pictureUrl(this.id, key[n], 96), alt: "", width: 64, height: 64 })),
      h("div", {}, h("span.dim", {}, `${what} drawn ${n}, chunk ${chunk[n]}`), this.captions.place(key[n])));
    fill(this.details, h("p", {}, h("b", {}, signed(values[i * this.size + j])), i === j ? " of its own pair" : " by this image and this text"), side(i, "Image"), side(j, "Text"));
    this.captions.load(i === j ? [key[i]] : [key[i], key[j]]);
    this.draw();
  }

  /** One pixel a cell, enlarged without smoothing, in the theme's colours. */
  draw() {
    const { size, most } = this;
    const [none, more, less] = ["--surface", "--chosen", "--warn"].map(rgb);
    const pixels = new ImageData(size, size);
    this.found.values.forEach((value, n) => paint(pixels.data, n, value / most, none, more, less));
    const cells = h("canvas", { width: size, height: size });
    cells.getContext("2d").putImageData(pixels, 0, 0);
    const side = Math.round((this.canvas.getBoundingClientRect().width || 480) * (devicePixelRatio || 1));
    this.canvas.width = this.canvas.height = side;
    const g = this.canvas.getContext("2d");
    g.imageSmoothingEnabled = side < size;
    g.drawImage(cells, 0, 0, side, side);
    this.lines(g, side / size, side);
    this.drawScale(none, more, less);
  }

  lines(g, cell, side) {
    g.fillStyle = css("--dim");
    const { chunk } = this.found;
    for (let n = 1; n < this.size; n++) {
      if (chunk[n] === chunk[n - 1]) continue;
      g.fillRect(Math.round(n * cell), 0, 1, side);
      g.fillRect(0, Math.round(n * cell), side, 1);
    }
    const [i, j] = this.at;
    g.strokeStyle = css("--text");
    g.lineWidth = 2;
    g.strokeRect(j * cell - 1, i * cell - 1, Math.max(cell, 3) + 2, Math.max(cell, 3) + 2);
  }

  drawScale(none, more, less) {
    this.scale.width = 129;
    this.scale.height = 1;
    const pixels = new ImageData(129, 1);
    for (let n = 0; n < 129; n++) paint(pixels.data, n, (n - 64) / 64, none, more, less);
    this.scale.getContext("2d").putImageData(pixels, 0, 0);
  }
}

/** Writes the colour of `value`, from -1 to 1. */
function paint(data, n, value, none, more, less) {
  const share = Math.min(1, Math.abs(value)), to = value > 0 ? more : less;
  for (let k = 0; k < 3; k++) data[4 * n + k] = none[k] + share * (to[k] - none[k]);
  data[4 * n + 3] = 255;
}

const rgb = (name) => css(name).match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
