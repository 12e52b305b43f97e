// Numbers for people.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** A count: 12,345. */
export const count = (n) => (n === null || n === undefined ? "–" : whole.format(n));

/** A number with `digits` significant digits, and never as 1e-7. */
export function number(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  if (size >= 10000) return whole.format(x);
  if (size !== 0 && size < 0.0001) return x.toExponential(1).replaceAll("-", "−");
  const places = size === 0 ? 0 : Math.max(0, Math.min(5, digits - 1 - Math.floor(Math.log10(size))));
  return x.toFixed(places).replace("-", "−");
}

export const signed = (x, digits) => (x > 0 ? "+" : "") + number(x, digits);

export const percent = (x, digits = 2) => (x === null || Number.isNaN(x) ? "–" : `${number(100 * x, digits)} %`);

const PREFIXES = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** 1.23 TFLOP. */
export function flops(x, unit = "FLOP") {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0";
  const [size, prefix] = PREFIXES.find(([size]) => x >= size) ?? [1, ""];
  return `${number(x / size, unit ? 3 : 2)} ${prefix}${unit}`;
}

/** 12 ms, 1.20 s, 3 min 20 s, 2 h 5 min. */
export function seconds(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x === 0) return "0 s";
  if (x < 1) return `${number(1000 * x, 2)} ms`;
  if (x < 60) return `${number(x, digits)} s`;
  if (x < 3600) return `${Math.floor(x / 60)} min ${Math.floor(x % 60)} s`;
  return `${count(Math.floor(x / 3600))} h ${Math.floor((x % 3600) / 60)} min`;
}

/** How long ago, of milliseconds since 1970. */
export function ago(ms) {
  if (!ms) return "–";
  const passed = (Date.now() - ms) / 1000;
  if (passed < 5) return "just now";
  if (passed < 60) return `${Math.floor(passed)} s ago`;
  if (passed < 3600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.floor(passed / 3600)} h ago`;
  return new Date(ms).toISOString().slice(0, 16).replace("T", " ");
}

/** `1 step`, `2 steps`. */
export const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

/** `joint_top_k` as `joint top k`. */
export const words = (name) => String(name ?? "").replaceAll("_", " ");

/** Seconds that the trainer waited a step. A step that was ready when it was asked for notes no wait, and cost none. */
export const waited = (line) => (line.step.length ? line.trainer_wait.reduce((sum, wait) => sum + (wait ?? 0), 0) / line.step.length : null);

/** Seconds from commit to commit. */
export function pace(line) {
  const [first, last] = [0, line.step.length - 1];
  if (last < 1) return null;
  return (line.committed_unix_ms[last] - line.committed_unix_ms[first]) / 1000 / (line.step[last] - line.step[first]);
}

export function mean(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}
