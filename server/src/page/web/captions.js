// Captions of rows, read as they are needed and kept while a view lasts.
import * as api from "./api.js";
import { h } from "./dom.js";

export class Captions {
  constructor(id, signal) {
    Object.assign(this, { id, signal, known: new Map(), asked: new Set(), places: new Map() });
  }

  of(key) {
    return this.known.get(key);
  }

  /** An element that shows the caption, as soon as it is known. */
  place(key) {
    const element = h("span.caption");
    this.places.set(key, [...(this.places.get(key) ?? []).filter((other) => other.isConnected), element]);
    if (this.known.has(key)) this.write(element, key);
    else element.textContent = " ";
    return element;
  }

  write(element, key) {
    const caption = this.known.get(key);
    element.textContent = caption ?? "no caption can be read";
    element.classList.toggle("dim", caption === null);
  }

  /** Reads those that are not known; says whether there were any. */
  async load(keys) {
    const wanted = keys.filter((key) => !this.asked.has(key));
    wanted.forEach((key) => this.asked.add(key));
    for (let at = 0; at < wanted.length; at += 32) {
      const part = wanted.slice(at, at + 32);
      const found = await api.captions(this.id, part, this.signal).catch(() => ({ captions: {} }));
      for (const key of part) {
        this.known.set(key, found.captions[key] ?? null);
        this.places.get(key)?.forEach((element) => this.write(element, key));
      }
    }
    return wanted.length > 0;
  }
}
