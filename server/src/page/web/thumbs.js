// Small pictures of rows that lead to them.
import * as api from "./api.js";
import { fill, h } from "./dom.js";
import { count } from "./format.js";

/** Pictures that are shown at once; a button shows as many more. */
const PART = 24;

/** Pictures of `rows`, [{key, title}]; the title says what is known of the row. */
export function thumbs(id, rows) {
  if (!rows.length) return h("p.dim", {}, "None.");
  const place = h("div.thumbs"), more = h("button", { type: "button", onclick: show });
  const counted = h("span.dim"), foot = h("p.thumbs-more", {}, counted, more);
  let shown = 0;
  function show() {
    place.append(...rows.slice(shown, shown + PART).map((row) => thumb(id, row)));
    shown = Math.min(rows.length, shown + PART);
    const left = rows.length - shown;
    fill(counted, `${count(shown)} of ${count(rows.length)} are shown`);
    more.textContent = `Show ${count(Math.min(PART, left))} more`;
    foot.hidden = left === 0;
  }
  show();
  return h("div", {}, place, foot);
}

const thumb = (id, { key, title }) => h("a", { href: api.link.example(id, key), title },
  h("img", { src: api.pictureUrl(id, key, 96), alt: title ?? key, loading: "lazy", width: 56, height: 56 }));
