// The canvas of 28 x 28 pixels: strokes of a mouse, a finger, a pen or the arrow keys, as bytes from 0 to 255.

import { paintDigit, SIZE } from "./grid.js";
import { byId } from "./page.js";

const RADIUS = 0.9; // pixels of a full stroke
const SOFT = 1; // pixels from full to nothing, as the digits of MNIST have them
const ARROWS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

export class Paper {
  // changed(finished): after each part of a stroke, and at its end
  constructor(changed) {
    Object.assign(this, { changed, pixels: new Uint8Array(SIZE * SIZE), before: [], erasing: false });
    this.canvas = byId("paper");
    this.cursor = { x: 14, y: 14, down: false };
    this.canvas.onpointerdown = (event) => this.begin(event);
    this.canvas.onpointermove = (event) => this.follows(event) && this.move(event);
    this.canvas.onpointerup = this.canvas.onpointercancel = (event) => this.follows(event) && this.end();
    this.canvas.onkeydown = (event) => this.key(event);
    this.canvas.onblur = () => (byId("cursor").hidden = true);
    byId("pen").onclick = () => this.take(false);
    byId("eraser").onclick = () => this.take(true);
    byId("undo").onclick = () => this.before.length && this.put(this.before.pop());
    byId("wipe").onclick = () => {
      this.remember();
      this.put(new Uint8Array(SIZE * SIZE));
    };
  }

  take(erasing) {
    this.erasing = erasing;
    byId("pen").setAttribute("aria-pressed", !erasing);
    byId("eraser").setAttribute("aria-pressed", erasing);
  }

  get empty() {
    return this.pixels.every((value) => value === 0);
  }

  put(pixels) {
    this.show(pixels);
    this.changed(true);
  }

  show(pixels) {
    this.pixels = pixels;
    paintDigit(this.canvas, pixels);
    byId("paper-empty").hidden = !this.empty;
  }

  remember() {
    this.before.push(this.pixels.slice());
    if (this.before.length > 50) this.before.shift();
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const pressed = event.pointerType === "pen" && event.pressure > 0 ? 0.6 + 0.8 * event.pressure : 1;
    return { x: ((event.clientX - box.left) / box.width) * SIZE, y: ((event.clientY - box.top) / box.height) * SIZE, pressed };
  }

  begin(event) {
    if (event.button || this.last) return;
    this.pointer = event.pointerId;
    this.canvas.setPointerCapture(event.pointerId);
    this.remember();
    this.last = this.place(event);
    this.stroke(this.last, this.last);
  }

  // Is it the pointer that began the stroke? A second finger, or the palm, draws nothing.
  follows(event) {
    return this.last && event.pointerId === this.pointer;
  }

  move(event) {
    const parts = event.getCoalescedEvents?.() ?? [];
    for (const part of parts.length ? parts : [event]) {
      const next = this.place(part);
      this.stroke(this.last, next);
      this.last = next;
    }
  }

  end() {
    this.last = null;
    this.changed(true);
  }

  // Darken or wipe the pixels near the way from a to b.
  stroke(a, b) {
    const radius = RADIUS * (b.pressed ?? 1) + (this.erasing ? 0.8 : 0);
    const [dx, dy] = [b.x - a.x, b.y - a.y];
    for (let y = 0; y < SIZE; y++) {
      for (let x = 0; x < SIZE; x++) {
        const along = dx || dy ? ((x + 0.5 - a.x) * dx + (y + 0.5 - a.y) * dy) / (dx * dx + dy * dy) : 0;
        const at = Math.min(1, Math.max(0, along));
        const away = Math.hypot(x + 0.5 - a.x - at * dx, y + 0.5 - a.y - at * dy);
        const ink = Math.round(255 * Math.min(1, Math.max(0, 1 - (away - radius) / SOFT)));
        const index = y * SIZE + x;
        this.pixels[index] = this.erasing ? Math.min(this.pixels[index], 255 - ink) : Math.max(this.pixels[index], ink);
      }
    }
    this.show(this.pixels);
    this.changed(false);
  }

  key(event) {
    const way = ARROWS[event.key];
    if (event.key === " ") this.cursor.down = !this.cursor.down;
    else if (!way) return;
    event.preventDefault();
    const before = { ...this.cursor };
    if (way) {
      this.cursor.x = Math.min(SIZE - 1, Math.max(0, this.cursor.x + way[0]));
      this.cursor.y = Math.min(SIZE - 1, Math.max(0, this.cursor.y + way[1]));
    }
    Object.assign(byId("cursor").style, { left: `${(100 * this.cursor.x) / SIZE}%`, top: `${(100 * this.cursor.y) / SIZE}%` });
    byId("cursor").hidden = false;
    byId("cursor").classList.toggle("down", this.cursor.down);
    if (this.cursor.down) {
      if (!way) this.remember();
      this.stroke({ x: before.x + 0.5, y: before.y + 0.5 }, { x: this.cursor.x + 0.5, y: this.cursor.y + 0.5 });
      this.changed(true);
    }
  }
}

// Bytes as a word for the address, and back; null if that is none.
export function toWord(pixels) {
  if (pixels.every((value) => value === 0)) return "";
  return btoa(String.fromCharCode(...pixels)).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

export function fromWord(word) {
  try {
    const text = atob(word.replaceAll("-", "+").replaceAll("_", "/"));
    const pixels = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    return pixels.length === SIZE * SIZE ? pixels : null;
  } catch {
    return null;
  }
}
