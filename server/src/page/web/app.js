// Which view is shown: a function of the address behind the #.
import * as api from "./api.js";
import { fill, h } from "./dom.js";
import { compare } from "./compare.js";
import { example } from "./example.js";
import { mix } from "./mix.js";
import { run } from "./run.js";
import { runs } from "./runs.js";
import { step } from "./step.js";

const main = document.getElementById("main");
const tabs = document.getElementById("tabs");
const live = document.getElementById("live");
const dialog = document.getElementById("dialog");

/** Routes: a pattern of the address, the view, and the tab that is then current. */
const ROUTES = [
  [/^\/?$/, runs, "Runs"],
  [/^\/runs\/([^/]+)$/, run, "Run"],
  [/^\/runs\/([^/]+)\/steps\/(\d+|newest)$/, step, "Step"],
  [/^\/runs\/([^/]+)\/examples(?:\/([^/]+))?$/, example, "Example"],
  [/^\/runs\/([^/]+)\/mix$/, mix, "Mix"],
  [/^\/compare\/([^/]+)(?:\/([^/]+))?$/, compare, "Compare"],
];

let current = null;

function show() {
  current?.stop?.();
  dialog.close();
  const address = location.hash.slice(1) || "/";
  const route = ROUTES.find(([pattern]) => pattern.test(address));
  const parts = route ? address.match(route[0]).slice(1).map((part) => part && decodeURIComponent(part)) : [];
  const stop = new AbortController();
  const place = h("div.view");
  const view = { place, signal: stop.signal, dialog, fail, live: setLive, keys: {}, stop: () => stop.abort() };
  current = view;
  setLive("");
  fill(main, place);
  scrollTo(0, 0);
  tell(route?.[2], parts[0]);
  document.title = parts.length ? `${parts[0]} · Superbatch` : "Superbatch";
  if (!route) return fail(new Error(`there is no view ${address}`));
  route[1](view, ...parts).catch(fail);

  function fail(error) {
    if (error.name === "AbortError" || stop.signal.aborted) return;
    fill(place, h("div.notice", { role: "alert" }, h("b", {}, "This cannot be shown. "), error.message));
  }
}

function tell(tab, id) {
  const views = id
    ? [["Run", api.link.run(id)], ["Step", `${api.link.run(id)}/steps/newest`], ["Example", `${api.link.run(id)}/examples`],
        ["Mix", api.link.mix(id)], ["Compare", api.link.compare(id)]]
    : [];
  const links = [["Runs", "#/"], ...views].map(([name, href]) => h("a", { href, "aria-current": name === tab ? "page" : null }, name));
  fill(tabs, links);
}

/** `state` is "now", "ended", "lost" or nothing. */
function setLive(state, text = "") {
  live.className = `live ${state}`;
  live.textContent = text;
}

// Dark or light: as the system says, until somebody chooses.
const THEME = "superbatch.theme";
const dark = matchMedia("(prefers-color-scheme: dark)");
function apply(theme) {
  document.documentElement.dataset.theme = theme ?? (dark.matches ? "dark" : "light");
  dispatchEvent(new Event("resize"));
}
const remembered = () => {
  try {
    return localStorage.getItem(THEME);
  } catch {
    return null;
  }
};
function switchTheme() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem(THEME, next);
  } catch {
    // A browser that keeps nothing: it lasts until the page is loaded again.
  }
  apply(next);
  current?.redraw?.();
}
dark.addEventListener("change", () => remembered() ?? (apply(), current?.redraw?.()));
apply(remembered());
document.getElementById("theme").addEventListener("click", switchTheme);

const KEYS = [
  ["r", "list of runs"], ["t", "dark or light"], ["?", "these keys"], ["← →  or  k j", "step before, step after"],
  ["/", "search"], ["p", "score the pairs of a step"], ["1 … 3", "last 100 steps, last 1,000, all"], ["Esc", "close"],
];
function showKeys() {
  const rows = KEYS.map(([key, what]) => h("div.key", {}, h("kbd", {}, key), what));
  fill(dialog, h("h2", {}, "Keys"), rows, h("form", { method: "dialog" }, h("button", {}, "Close")));
  dialog.showModal();
}
document.getElementById("help").addEventListener("click", showKeys);

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const common = { r: () => (location.hash = "#/"), t: switchTheme, "?": showKeys };
  const action = current?.keys[event.key] ?? common[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
addEventListener("hashchange", show);
show();
