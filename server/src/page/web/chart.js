// Charts on canvas, of what a few hundred points need. Charts of one group share their crosshair.
import { css, h } from "./dom.js";
import { count, number } from "./format.js";

const LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 24;

/** Round steps between two bounds, about `wanted` of them. */
export function ticks(low, high, wanted) {
  const span = high - low || 1;
  const raw = span / wanted, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= raw) ?? 10 * size;
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) found.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return found;
}

/** A canvas at the screen's own resolution; returns its context and its size. */
export function surface(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  g.font = `11px ${css("--font")}`;
  return { g, width, height };
}

/** Ticks' texts, all with as many decimals as the finest needs. */
export function decimals(values) {
  const step = values.length > 1 ? Math.abs(values[1] - values[0]) : Math.abs(values[0] ?? 1);
  const places = Math.max(0, Math.min(6, Math.ceil(-Math.log10(step || 1) - 1e-9)));
  return (value) => (Math.abs(value) >= 10000 ? count(value) : value.toFixed(places).replace("-", "−"));
}

export function axes(g, { x, y, width, height, xTicks, yTicks, yText = decimals(yTicks), xText = count }) {
  g.lineWidth = 1;
  g.strokeStyle = css("--line");
  g.fillStyle = css("--dim");
  g.textAlign = "right";
  g.textBaseline = "middle";
  for (const t of yTicks) {
    const at = Math.round(y(t)) + 0.5;
    g.beginPath();
    g.moveTo(LEFT, at);
    g.lineTo(width - RIGHT, at);
    g.stroke();
    g.fillText(yText(t), LEFT - 8, at);
  }
  g.textBaseline = "top";
  for (const t of xTicks) {
    g.textAlign = x(t) > width - RIGHT - 14 ? "right" : "center";
    g.fillText(xText(t), x(t), height - BOTTOM + 8);
  }
}

/** Charts whose crosshairs move together. */
export class Group {
  constructor() {
    this.charts = [];
  }

  point(index) {
    this.charts.forEach((chart) => chart.point(index));
  }
}

/**
 * Lines, or with `stacked` areas on top of each other, over steps. `series` is [{key, label, color, dash}], `color` the name of
 * a CSS variable. With `whole` the axis has whole numbers only; with `cut` a few values far above all others are cut off, which the
 * legend then says. Its `set` takes the steps and the values by key.
 */
export class Lines {
  constructor({ title, note, unit, series, group, stacked = false, tall = false, wide = false, zero = false, whole = false, cut = false, text = number, tick, onpick }) {
    Object.assign(this, { unit, series, group, stacked, zero, whole, cut, text, tick, onpick, steps: [], values: {}, bands: [], at: null });
    this.canvas = h("canvas", { role: "img", tabindex: "-1" });
    this.legend = h("div.legend");
    this.canvas.addEventListener("pointermove", (event) => this.group.point(this.nearest(event)));
    this.canvas.addEventListener("pointerleave", () => this.group.point(null));
    this.canvas.addEventListener("click", (event) => {
      const index = this.nearest(event);
      if (index !== null && this.onpick) this.onpick(this.steps[index]);
    });
    const head = h("div.chart-head", {}, h("h3", {}, title, unit ? h("span.unit", {}, unit) : null), note ? h("p.dim", {}, note) : null);
    this.element = h(`section.chart${tall ? ".tall" : ""}${wide || tall ? ".wide" : ""}`, {}, head, this.legend, this.canvas);
    group.charts.push(this);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  set(steps, values, bands = []) {
    Object.assign(this, { steps, values, bands });
    if (this.at !== null && this.at >= steps.length) this.at = null;
    this.draw();
  }

  nearest(event) {
    if (!this.steps.length) return null;
    const box = this.canvas.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / Math.max(1, box.width - LEFT - RIGHT);
    const [first, last] = [this.steps[0], this.steps.at(-1)];
    const wanted = first + share * (last - first);
    let low = 0, high = this.steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] < wanted) low = middle + 1;
      else high = middle;
    }
    return low > 0 && wanted - this.steps[low - 1] < this.steps[low] - wanted ? low - 1 : low;
  }

  point(index) {
    this.at = index;
    this.draw();
  }

  /** By series, each step's (bottom, top). */
  layers() {
    const below = this.steps.map(() => 0);
    return this.series.map(({ key }) => (this.values[key] ?? []).map((value, n) => {
      if (!this.stacked) return [null, value];
      const bottom = below[n];
      below[n] += value ?? 0;
      return [bottom, below[n]];
    }));
  }

  range(layers) {
    let [low, high] = [Infinity, -Infinity];
    for (const layer of layers) {
      for (const [, value] of layer) {
        if (value === null || value === undefined) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
    if (this.stacked || this.zero) [low, high] = [Math.min(0, low), Math.max(0, high)];
    if (low > high) return null;
    this.above = null;
    if (this.cut) {
      const seen = this.stacked ? layers.at(-1) : layers.flat();
      const all = seen.map(([, value]) => value).filter((value) => value !== null && value !== undefined);
      const usual = all.sort((a, b) => a - b)[Math.floor(0.95 * (all.length - 1))];
      if (high > 3 * usual && usual > 0) {
        this.above = high;
        high = 1.6 * usual;
      }
    }
    const pad = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.06;
    return [this.stacked || (this.zero && low === 0) ? low : low - pad, high + pad];
  }

  draw() {
    const { g, width, height } = surface(this.canvas);
    if (!width) return;
    const layers = this.layers();
    const range = this.steps.length ? this.range(layers) : null;
    if (!range) {
      g.fillStyle = css("--dim");
      g.textAlign = "center";
      g.fillText("no figures yet", width / 2, height / 2);
      this.tell();
      return;
    }
    const [first, last] = [this.steps[0], this.steps.at(-1)];
    const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (width - LEFT - RIGHT);
    const y = (value) => height - BOTTOM - ((value - range[0]) / (range[1] - range[0])) * (height - TOP - BOTTOM);
    const xTicks = ticks(first, last, Math.max(2, width / 120)).filter(Number.isInteger);
    axes(g, { x, y, width, height, xTicks, yTicks: ticks(...range, height > 200 ? 5 : 3).filter((t) => !this.whole || Number.isInteger(t)), yText: this.tick });
    this.drawBands(g, x, height);
    g.save();
    g.beginPath();
    g.rect(LEFT, 0, width - LEFT - RIGHT + 1, height - BOTTOM + 1);
    g.clip();
    layers.forEach((layer, n) => (this.stacked ? this.area(g, layer, x, y, n) : this.line(g, layer, x, y, n)));
    g.restore();
    if (this.at !== null) this.crosshair(g, layers, x, y, height);
    this.tell();
  }

  drawBands(g, x, height) {
    for (const { from, to, color } of this.bands) {
      g.fillStyle = css(color);
      g.fillRect(x(from), height - BOTTOM, Math.max(2, x(to) - x(from)), 4);
    }
  }

  line(g, layer, x, y, n) {
    const { color, dash } = this.series[n];
    g.strokeStyle = css(color);
    g.fillStyle = css(color);
    g.lineWidth = dash ? 1.5 : 1.75;
    g.lineJoin = "round";
    g.setLineDash(dash ?? []);
    g.beginPath();
    const known = (k) => layer[k]?.[1] !== null && layer[k]?.[1] !== undefined;
    layer.forEach(([, value], k) => {
      if (!known(k)) return;
      const [px, py] = [x(this.steps[k]), y(value)];
      if (known(k - 1)) g.lineTo(px, py);
      else g.moveTo(px, py);
      // Alone it is no line, of which nothing would be drawn.
      if (!known(k - 1) && !known(k + 1)) g.fillRect(px - 2, py - 2, 4, 4);
    });
    g.stroke();
    g.setLineDash([]);
  }

  area(g, layer, x, y, n) {
    g.fillStyle = css(this.series[n].color);
    g.beginPath();
    layer.forEach(([, top], k) => g.lineTo(x(this.steps[k]), y(top)));
    for (let k = layer.length - 1; k >= 0; k--) g.lineTo(x(this.steps[k]), y(layer[k][0]));
    g.fill();
    if (this.steps.length === 1) g.fillRect(x(this.steps[0]), y(layer[0][1]), 6, y(layer[0][0]) - y(layer[0][1]));
  }

  crosshair(g, layers, x, y, height) {
    const at = x(this.steps[this.at]);
    g.strokeStyle = css("--dim");
    g.lineWidth = 1;
    g.beginPath();
    g.moveTo(at, TOP);
    g.lineTo(at, height - BOTTOM);
    g.stroke();
    if (this.stacked) return;
    layers.forEach((layer, n) => {
      const value = layer[this.at]?.[1];
      if (value === null || value === undefined) return;
      g.fillStyle = css(this.series[n].color);
      g.beginPath();
      g.arc(at, y(value), 3.5, 0, 7);
      g.fill();
    });
  }

  /** The legend, with the values under the crosshair, else the newest. */
  tell() {
    const index = this.at ?? this.steps.length - 1;
    const items = this.series.map(({ key, label, color, dash }) => {
      const swatch = h(`i${dash ? ".dashed" : ""}`);
      swatch.style.setProperty("--swatch", `var(${color})`);
      return h("span", {}, swatch, label, " ", h("b", {}, this.text(this.values[key]?.[index] ?? null)));
    });
    const modes = new Map(this.bands.map(({ color, label }) => [label, color]));
    for (const [label, color] of modes) {
      const swatch = h("i.square");
      swatch.style.setProperty("--swatch", `var(${color})`);
      items.push(h("span", {}, swatch, label));
    }
    if (this.above) items.push(h("span", {}, "cut off, up to ", h("b", {}, this.text(this.above))));
    this.legend.replaceChildren(...items, ...(this.at === null || index < 0 ? [] : [h("span.dim", {}, `step ${count(this.steps[index])}`)]));
    const said = this.series.map(({ key, label }) => `${label} ${this.text(this.values[key]?.[index] ?? null)}`);
    this.canvas.setAttribute("aria-label", index < 0 ? "no figures yet" : `at step ${this.steps[index]}: ${said.join(", ")}`);
  }
}

/** Dots: [{x, y, color, key}] with axes' titles; `onpick` gets the dot that is nearest to a click. */
export class Dots {
  constructor({ title, note, xTitle, yTitle, diagonal = false, onpick }) {
    Object.assign(this, { xTitle, yTitle, diagonal, dots: [], near: null });
    this.canvas = h("canvas", { role: "img" });
    this.legend = h("div.legend");
    this.element = h("section.chart", {}, h("div.chart-head", {}, h("h3", {}, title), note ? h("p.dim", {}, note) : null), this.legend, this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.look(this.nearest(event)));
    this.canvas.addEventListener("pointerleave", () => this.look(null));
    this.canvas.addEventListener("click", (event) => {
      const dot = this.nearest(event);
      if (dot) onpick(dot);
    });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  set(dots, legend) {
    this.dots = dots;
    this.legend.replaceChildren(...legend.map(([color, label]) => {
      const swatch = h("i.round");
      swatch.style.setProperty("--swatch", `var(${color})`);
      return h("span", {}, swatch, label);
    }));
    this.canvas.setAttribute("aria-label", `${count(dots.length)} examples, ${this.xTitle} against ${this.yTitle}`);
    this.draw();
  }

  look(dot) {
    this.near = dot;
    this.canvas.style.cursor = dot ? "pointer" : "default";
    this.draw();
  }

  nearest(event) {
    if (!this.x) return null;
    const box = this.canvas.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let [best, found] = [144, null];
    for (const dot of this.dots) {
      const distance = (this.x(dot.x) - px) ** 2 + (this.y(dot.y) - py) ** 2;
      if (distance < best) [best, found] = [distance, dot];
    }
    return found;
  }

  draw() {
    const { g, width, height } = surface(this.canvas);
    if (!this.dots.length || !width) return;
    const bounds = (of) => {
      const values = this.dots.map(of);
      const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
      const pad = (high - low) * 0.06 || 1e-3;
      return [low - pad, high + pad];
    };
    const [xs, ys] = [bounds((dot) => dot.x), bounds((dot) => dot.y)];
    const bottom = height - BOTTOM - 14;
    this.x = (value) => LEFT + ((value - xs[0]) / (xs[1] - xs[0])) * (width - LEFT - RIGHT);
    this.y = (value) => bottom - ((value - ys[0]) / (ys[1] - ys[0])) * (bottom - TOP - 10);
    axes(g, { x: this.x, y: this.y, width, height: height - 14, xTicks: ticks(...xs, 5), yTicks: ticks(...ys, 5), xText: decimals(ticks(...xs, 5)) });
    g.textAlign = "right";
    g.fillText(this.xTitle, width - RIGHT, height - 12);
    g.textAlign = "left";
    g.fillText(this.yTitle, LEFT + 4, 2);
    if (this.diagonal) this.drawDiagonal(g, xs, ys);
    for (const dot of this.dots) this.dot(g, dot, 3);
    if (this.near) this.dot(g, this.near, 6);
  }

  drawDiagonal(g, xs, ys) {
    const [low, high] = [Math.max(xs[0], ys[0]), Math.min(xs[1], ys[1])];
    if (low >= high) return;
    g.strokeStyle = css("--dim");
    g.setLineDash([3, 4]);
    g.beginPath();
    g.moveTo(this.x(low), this.y(low));
    g.lineTo(this.x(high), this.y(high));
    g.stroke();
    g.setLineDash([]);
  }

  dot(g, { x, y, color }, radius) {
    g.fillStyle = css(color);
    g.globalAlpha = radius > 3 ? 1 : 0.75;
    g.beginPath();
    g.arc(this.x(x), this.y(y), radius, 0, 7);
    g.fill();
    g.globalAlpha = 1;
  }
}
