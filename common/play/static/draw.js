// Drawing: settings A and B on the same noise, the steps as they come, and what can be taken away.

import { paint, SIZE, size } from "./grid.js";
import { set, state } from "./state.js";
import { button, byId, copied, element, say, take, WAITING } from "./page.js";

export const COUNTS = [1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 144];
const STEPS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500, 750, 1000];
const PLAYING = 4000; // milliseconds from noise to digit
const END = 1000; // of the scrubber
const ANY = "any";

export class Draw {
  constructor(link) {
    this.link = link;
    this.sides = [0, 1].map((number) => new Side(number, () => this.ask()));
    for (const count of COUNTS) byId("count").append(new Option(count, count));
    byId("count").onchange = (event) => this.change({ count: event.target.value });
    byId("seed").oninput = (event) => event.target.validity.valid && event.target.value !== "" && this.change({ seed: Number(event.target.value) });
    byId("other").onclick = () => this.change({ seed: Math.floor(Math.random() * 1e6) });
    byId("compare").onchange = (event) => this.compare(event.target.checked);
    byId("moment").oninput = () => { this.pause(); this.show(); };
    byId("play").onclick = () => (this.playing ? this.pause() : this.start());
    byId("link").onclick = () => copied(byId("link"), location.href);
    for (const one of document.querySelectorAll("[data-form]")) one.onclick = () => {
      const wish = { run: this.run.id, form: one.dataset.form, drawing: this.sides[0].settings() };
      take(this.link, one, wish, (epoch) => this.taken(wish.run, epoch), (text) => say("draw-said", text, true));
    };
  }

  // The tab is shown, of this run: show the settings, which may have changed meanwhile, and draw what is not there.
  open(run) {
    this.run = run;
    const latent = run.model === "lddpm";
    if (!state.count) state.count = latent ? "64" : "16";
    const usual = latent ? { sampler: "dpm", steps: "8" } : { sampler: "ddim", steps: "50" };
    for (const name of ["sampler", "steps"]) {
      state[name] = state[name] || usual[name];
      state[`b${name}`] = state[`b${name}`] || state[name];
    }
    set({ run: run.id });
    this.fill();
    this.ask();
  }

  fill() {
    const counts = byId("count");
    if (!COUNTS.includes(Number(state.count))) counts.append(new Option(state.count, state.count));
    counts.value = state.count;
    byId("seed").value = state.seed;
    byId("compare").checked = Boolean(state.compare);
    for (const side of this.sides) side.fill(this.run);
    this.arrange();
  }

  arrange() {
    this.sides[1].fieldset.hidden = this.sides[1].figure.hidden = this.sides[1].command.hidden = !state.compare;
    byId("draw").classList.toggle("two", Boolean(state.compare));
  }

  compare(wanted) {
    set({ compare: wanted ? 1 : 0, ...(wanted && { bdigits: state.digits, bsampler: state.sampler, bsteps: state.steps }) });
    this.fill();
    this.ask();
  }

  change(settings) {
    set(settings);
    this.fill();
    this.ask();
  }

  // The sides that are shown.
  get shown() {
    return this.sides.filter((side) => side.number === 0 || state.compare);
  }

  // A file was taken, of this epoch: of a run in training, what is shown may be of another one.
  taken(run, epoch) {
    this.file = { run, epoch };
    if (state.tab !== "draw") return; // once the tab is shown again
    if (this.isOld()) this.ask();
    else if (this.shown.every((side) => side.done)) this.file = null; // they agree
  }

  // Is one of the sides of another epoch than the rest, or than a file that was taken?
  isOld() {
    const epochs = this.shown.filter((side) => side.done).map((side) => side.epoch);
    const files = this.file?.run === this.run.id ? [this.file.epoch] : [];
    return epochs.length > 0 && new Set([...epochs, ...files]).size > 1;
  }

  // Ask for the sides that are set anew, and those that are not finished, or all where one is of another epoch; not
  // again for what is on its way.
  ask() {
    const sides = this.shown;
    const anew = sides.filter((side) => side.isAnew());
    if (this.isOld()) {
      for (const side of sides) side.done = false;
      this.file = null; // asked once: its checkpoint may be gone
    }
    const wanted = sides.filter((side) => !side.done);
    const coming = this.link.awaits(this.wish) ? this.wished.filter((side) => !side.done) : [];
    if (!wanted.length && coming.length) this.stop();
    if (!anew.length && wanted.every((side) => coming.includes(side))) return;
    this.wished = wanted;
    this.pause();
    byId("moment").value = END;
    for (const side of wanted) side.begin();
    const drawings = wanted.map((side) => side.settings());
    const receive = (header, pixels) => this.receive(header, pixels);
    this.wish = this.link.ask("draw", { run: this.run.id, drawings }, receive, () => say("draw-said", WAITING));
  }

  // What is on its way is not shown any more.
  stop() {
    this.link.ask("draw", { run: this.run.id, drawings: [] }, () => {}); // in its place
    say("draw-said", this.said);
  }

  receive(header, pixels) {
    if (header.error) return say("draw-said", header.error, true);
    if (header.last) return this.isOld() && this.ask();
    const side = this.sides[header.side];
    side.receive(header, pixels);
    if ("progress" in header) say("draw-said", `step ${header.progress} of ${header.steps}`);
    if (header.left === 0) {
      this.run.epoch = header.epoch;
      this.said = `${counted(header.count, "digit")} in ${header.seconds.toFixed(2)} s, epoch ${header.epoch}`;
      say("draw-said", this.said);
    }
    this.show();
  }

  // Show the moment of the scrubber, once for each of the screen's frames.
  show() {
    this.due ??= requestAnimationFrame(() => {
      this.due = null;
      const moment = byId("moment").value / END;
      const said = this.sides.filter((side) => side.frames.length && !side.figure.hidden).map((side) => side.show(moment));
      byId("where").textContent = [...new Set(said)].join(" and ");
    });
  }

  start() {
    const slider = byId("moment");
    const from = slider.value < END ? Number(slider.value) : 0;
    const began = performance.now() - (from / END) * PLAYING;
    this.playing = true;
    this.button();
    const move = (now) => {
      if (!this.playing) return;
      slider.value = Math.min(END, ((now - began) / PLAYING) * END);
      this.show();
      if (slider.value < END) requestAnimationFrame(move);
      else this.pause();
    };
    requestAnimationFrame(move);
  }

  pause() {
    this.playing = false;
    this.button();
  }

  button() {
    byId("play").textContent = this.playing ? "\u23F8\uFE0E" : "\u25B6\uFE0E";
    byId("play").setAttribute("aria-label", this.playing ? "Pause" : "Play the steps");
  }
}

// One setting: its controls, its two grids, its command.
class Side {
  constructor(number, changed) {
    Object.assign(this, { number, frames: [], done: false });
    this.prefix = number ? "b" : "";
    this.fieldset = document.querySelector(`.side[data-side="${number}"]`);
    this.fieldset.append(byId("side").content.cloneNode(true));
    this.controls();
    this.changed = changed;
    this.figure = element("div", { className: "two-grids" });
    this.canvases = [" x\u209C, as the step leaves it", " predicted x\u2080"].map((caption) => {
      const canvas = element("canvas", { className: "grid" });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", "No drawing yet");
      this.figure.append(element("figure", {}, canvas, element("figcaption", {}, this.letter(), caption)));
      return canvas;
    });
    byId("pictures").append(this.figure);
    this.code = element("code");
    const copy = button("Copy", () => copied(copy, this.code.textContent));
    const title = element("p", { className: "hint" }, "The command that draws ", this.letter(), ", bit for bit:");
    this.command = element("div", { className: "command" }, title, element("pre", { tabIndex: 0 }, this.code), copy);
    byId("commands").append(this.command);
  }

  letter() {
    return element("b", { className: "letter", textContent: "AB"[this.number] });
  }

  controls() {
    const find = (name) => this.fieldset.querySelector(`[name=${name}]`);
    Object.assign(this, { guidance: find("guidance"), sampler: find("sampler"), steps: find("steps") });
    this.guidance.oninput = () => this.set("guidance", Number(this.guidance.value));
    this.sampler.onchange = () => this.set("sampler", this.sampler.value);
    this.steps.oninput = () => this.set("steps", String(this.choices[this.steps.value]));
    this.digits = [..."0123456789", ANY].map((digit) => {
      const choice = button(digit, () => this.choose(digit));
      this.fieldset.querySelector(".digits").append(choice);
      return choice;
    });
  }

  choose(digit) {
    const chosen = new Set(this.chosen);
    if (digit === ANY) chosen.clear();
    else if (!chosen.delete(digit)) chosen.add(digit);
    this.set("digits", [...chosen].sort().join(""));
  }

  get(name) {
    return state[this.prefix + name];
  }

  set(name, value) {
    set({ [this.prefix + name]: value });
    this.fill(this.run);
    this.changed();
  }

  // The digits that the run can draw. None: a network without labels.
  get able() {
    return this.run.digits.map(String);
  }

  // Those of the chosen digits that the run can draw, or all of these; another run may draw more.
  get chosen() {
    const kept = this.able.filter((digit) => this.get("digits").includes(digit));
    return this.get("digits") === "" ? "" : (kept.length ? kept : this.able).join("");
  }

  fill(run) {
    this.run = run;
    const T = run.T;
    this.choices = stepsUpTo(T, Number(this.get("steps")));
    state[`${this.prefix}steps`] = String(Math.min(T, Number(this.get("steps"))));
    this.steps.max = this.choices.length - 1;
    this.steps.value = this.choices.indexOf(Number(this.get("steps")));
    this.steps.setAttribute("aria-valuetext", this.get("steps"));
    this.guidance.value = this.get("guidance");
    this.sampler.value = this.get("sampler");
    for (const name of ["guidance", "steps"]) this.fieldset.querySelector(`[data-of=${name}]`).textContent = this.get(name);
    const { able, chosen } = this;
    for (const choice of this.digits) {
      const digit = choice.textContent;
      choice.setAttribute("aria-pressed", digit === ANY ? chosen === "" : chosen.includes(digit));
      choice.disabled = digit !== ANY && !able.includes(digit);
    }
    for (const canvas of this.canvases) size(canvas, Number(state.count));
    this.painted = null; // another size clears them
  }

  settings() {
    return {
      side: this.number, digits: [...this.chosen].map(Number), count: Number(state.count), seed: state.seed,
      guidance: this.get("guidance"), sampler: this.get("sampler"), steps: Number(this.get("steps")),
    };
  }

  // Is it set otherwise than at the last call? Then it is not done.
  isAnew() {
    const asked = JSON.stringify([this.run.id, this.settings()]);
    const anew = asked !== this.asked;
    Object.assign(this, { asked, done: this.done && !anew });
    return anew;
  }

  begin() {
    this.fresh = true; // the old picture stays until the first new one
  }

  receive(header, pixels) {
    if ("left" in header) {
      if (this.fresh) this.frames = [];
      this.fresh = false;
      this.frames.push({ ...header, pixels });
    }
    if (header.left === 0) {
      this.epoch = header.epoch;
      this.code.textContent = header.command;
    }
    if (header.done) this.done = true;
  }

  // Paint the frame nearest to a moment in [0, 1], and say which it is.
  show(moment) {
    const away = (frame) => Math.abs((frame.steps - frame.left) / frame.steps - moment);
    const frame = this.frames.reduce((best, other) => (away(other) <= away(best) ? other : best));
    if (frame !== this.painted) this.canvases.forEach((canvas, half) => {
      paint(canvas, frame.pixels, half * frame.count * SIZE * SIZE, frame.count);
      const what = half ? "predicted digits" : "noisy digits";
      canvas.setAttribute("aria-label", `${frame.count} ${what}, step ${frame.steps - frame.left} of ${frame.steps}`);
    });
    this.painted = frame;
    return `step ${frame.steps - frame.left} of ${frame.steps}`;
  }
}

// What a slider of steps has, with these among them.
export function stepsUpTo(T, steps) {
  return [...new Set([...STEPS, T, Math.min(T, steps)])].filter((n) => n >= 1 && n <= T).sort((a, b) => a - b);
}

export function counted(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}
