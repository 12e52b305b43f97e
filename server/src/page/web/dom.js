// Elements without markup: whatever comes from data is set as text, so a caption cannot be anything but text.

/** An element: `h("a.quiet", {href, onclick}, child, "text", [more])`. */
export function h(name, attributes, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked" || key === "open") element[key] = value;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A width, as a share of its parent: set by script, since the page allows no inline styles. */
export function part(element, { left = 0, width = 0 }) {
  element.style.left = `${100 * left}%`;
  element.style.width = `${100 * width}%`;
  return element;
}

/** Puts `children` in place of what is in `element`. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
}

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A line for a terminal, with a button that copies it. */
export function command(label, text) {
  const button = h("button.quiet", { type: "button", onclick: copy }, "Copy");
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
  }
  const code = h("code", {}, text);
  return h("div.command", {}, h("span.dim", {}, label), code, button);
}

/** A group of buttons of which one is pressed. */
export function choice(label, options, current, onpick) {
  const buttons = options.map(([value, text]) =>
    h("button", { type: "button", "aria-pressed": String(value === current), onclick: () => pick(value) }, text));
  function pick(value) {
    buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(options[n][0] === value)));
    onpick(value);
  }
  return h("div.choice", { role: "group", "aria-label": label }, buttons);
}
