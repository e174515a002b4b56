// The latent space: its map, a digit under the pointer, the walk between two of them, and any latent by its numbers.

import { clear, paint, paintDigit, SIZE, size } from "./grid.js";
import { byId, element, say } from "./page.js";

// Paul Tol's "muted", lightened where the background is dark; digits are their own markers
const LIGHT = ["#332288", "#0077aa", "#008877", "#117733", "#777711", "#997700", "#bb4455", "#882255", "#993399", "#000000"];
const DARK = ["#aa99ff", "#88ccee", "#66ddcc", "#66cc77", "#cccc66", "#eedd88", "#ff8899", "#ee77aa", "#dd99ff", "#ffffff"];
const MARGIN = 14; // pixels around the map
const NEAR = 24; // pixels within which the pointer means a digit
const RANGE = 4; // deviations that a slider reaches from the mean
const WALK = 11; // images of a walk

export class Space {
  constructor(link) {
    this.link = link;
    this.map = byId("map");
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.onchange = () => this.draw();
    new ResizeObserver(() => this.draw()).observe(this.map);
    this.map.onpointermove = this.map.onpointerdown = (event) => this.point(this.nearest(event.offsetX, event.offsetY));
    this.map.onclick = () => this.choose();
    this.map.onkeydown = (event) => this.key(event);
    byId("place").oninput = () => this.walkTo(Number(byId("place").value) / 100);
    byId("centre").onclick = () => this.space && this.decode([...this.space.mean]);
  }

  // The tab is shown, of this run.
  open(run) {
    if (run.id === this.run?.id) return;
    this.link.drop("digit", "walk", "decode"); // of another run
    Object.assign(this, { run, space: null, ends: [], pointed: null, latents: null });
    for (const id of ["original", "again", "walk", "decoded"]) clear(byId(id));
    size(byId("walk"), WALK, WALK);
    byId("sliders").replaceChildren();
    say("pointed", "");
    say("space-said", "Loading the digits\u2026");
    this.draw();
    this.link.ask("map", { run: run.id }, (header) => this.receive(header));
  }

  receive(header) {
    if (header.error) return say("space-said", header.error, true);
    if (!header.last) {
      return say("space-said", `Computing the map of ${header.digits} digits, once for this run: ${header.seconds.toFixed(0)} s so far, some ten in all.`);
    }
    this.space = header;
    const source = { hub: "digits", embedded: "digits, of the 5,000 embedded ones" }[header.source] ?? "images, of the run's own data";
    say("space-said", `t-SNE of the latents of ${header.labels.length} test ${source}. Near means alike; distances across the map mean little.`);
    this.sliders();
    this.draw();
    const first = header.labels.indexOf(3) < 0 ? 0 : header.labels.indexOf(3);
    const other = header.labels.findIndex((label, index) => index !== first && label === 8);
    this.ends = [first, other < 0 ? header.labels.length - 1 : other];
    this.walk();
    this.point(first);
  }

  // --- the map ---

  place(index) {
    const [x, y] = this.space.points[index];
    const { clientWidth, clientHeight } = this.map;
    return [MARGIN + x * (clientWidth - 2 * MARGIN), MARGIN + y * (clientHeight - 2 * MARGIN)];
  }

  draw() {
    const { clientWidth, clientHeight } = this.map;
    const scale = devicePixelRatio || 1;
    Object.assign(this.map, { width: clientWidth * scale, height: clientHeight * scale });
    if (!this.space) return;
    const context = this.map.getContext("2d");
    const colours = this.dark.matches ? DARK : LIGHT;
    context.scale(scale, scale);
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.font = "10px system-ui, sans-serif";
    this.space.labels.forEach((label, index) => {
      context.fillStyle = colours[label];
      context.fillText(label, ...this.place(index));
    });
    this.mark(context, this.pointed, "", 9);
    this.ends.forEach((index, number) => this.mark(context, index, "AB"[number], 11));
  }

  mark(context, index, name, radius) {
    if (index === null || index === undefined) return;
    const [x, y] = this.place(index);
    const ink = this.dark.matches ? "#ffffff" : "#000000";
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    Object.assign(context, { strokeStyle: ink, lineWidth: 2 });
    context.stroke();
    if (!name) return;
    context.font = "bold 15px system-ui, sans-serif";
    Object.assign(context, { lineWidth: 4, strokeStyle: this.dark.matches ? "#000000" : "#ffffff", fillStyle: ink });
    const at = [Math.min(x + 18, this.map.clientWidth - 8), y];
    context.strokeText(name, ...at);
    context.fillText(name, ...at);
  }

  nearest(x, y, fits = () => true) {
    if (!this.space) return null;
    let best = null;
    let least = Infinity;
    this.space.points.forEach((_, index) => {
      const [px, py] = this.place(index);
      const away = Math.hypot(px - x, py - y);
      if (away < least && fits(px - x, py - y, index)) [best, least] = [index, away];
    });
    return fits.length || least < NEAR ? best : null;
  }

  key(event) {
    if (!this.space) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.choose();
    }
    const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!way) return;
    event.preventDefault();
    const [x, y] = this.place(this.pointed ?? 0);
    const ahead = (dx, dy, index) => index !== this.pointed && dx * way[0] + dy * way[1] > Math.abs(dx * way[1] + dy * way[0]) + 3;
    const next = this.nearest(x, y, ahead);
    if (next !== null) this.point(next);
  }

  // Show the digit under the pointer.
  point(index) {
    if (index === null || index === this.pointed) return;
    this.pointed = index;
    this.draw();
    this.link.ask("digit", { run: this.run.id, index }, (header, pixels) => {
      if (header.error) return say("pointed", header.error, true);
      paintDigit(byId("original"), pixels);
      paintDigit(byId("again"), pixels, SIZE * SIZE);
      say("pointed", `A ${header.label}.`);
    });
  }

  // Make the digit that is pointed at an end of the walk: B first, then A, in turn.
  choose() {
    if (this.pointed === null) return;
    this.turn = this.turn === 0 ? 1 : 0;
    this.ends[this.turn] = this.pointed;
    this.walk();
  }

  // --- the walk, and any latent ---

  walk() {
    this.draw();
    const [from, to] = this.ends;
    this.link.ask("walk", { run: this.run.id, from, to }, (header, pixels) => {
      if (header.error) return say("space-said", header.error, true);
      paint(byId("walk"), pixels, 0, WALK, WALK);
      const [a, b] = this.ends.map((index) => this.space.labels[index]);
      byId("walk").setAttribute("aria-label", `Images on the way from a ${a} to a ${b}`);
      this.latents = header.latents;
      this.walkTo(Number(byId("place").value) / 100);
    });
  }

  walkTo(way) {
    if (!this.latents) return;
    const [from, to] = this.latents;
    this.decode(from.map((value, n) => value + way * (to[n] - value)));
  }

  sliders() {
    const { mean, deviation } = this.space;
    const labels = mean.map((middle, n) => {
      const reach = RANGE * Math.max(deviation[n], 1e-3);
      const slider = element("input", { type: "range", min: middle - reach, max: middle + reach, step: "any", value: middle });
      slider.oninput = () => this.decode([...byId("sliders").querySelectorAll("input")].map((input) => Number(input.value)));
      return element("label", {}, element("span", { textContent: n + 1 }), slider);
    });
    byId("sliders").replaceChildren(...labels);
  }

  // Decode a latent, and put the sliders there.
  decode(latent) {
    byId("sliders").querySelectorAll("input").forEach((input, n) => (input.value = latent[n]));
    this.link.ask("decode", { run: this.run.id, latent }, (header, pixels) => {
      if (header.error) say("space-said", header.error, true);
      else paintDigit(byId("decoded"), pixels);
    });
  }
}
