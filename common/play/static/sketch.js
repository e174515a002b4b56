// A sketch: noised and denoised, or finished by the network; and what the classifier sees in it.

import { COUNTS, counted, stepsUpTo } from "./draw.js";
import { clear, paint, SIZE, size } from "./grid.js";
import { button, byId, copied, element, save, say, take, WAITING } from "./page.js";
import { fromWord, Paper, toWord } from "./paper.js";
import { set, state } from "./state.js";

const ANY = "any";
const JUDGE_AFTER = 60; // milliseconds
const SAYS = {
  noise: "The sketch is noised by this part of the steps, and denoised from there: a little changes little.",
  finish: "What is drawn stays as it is; the network fills in the black, in each stretch of steps as often as there are passes.",
};
const EMPTY = "Draw something first.";
const NO_PIXELS = "Finishing keeps pixels, and a latent has none: choose a run of pixel diffusion above for that.";

export class Sketch {
  constructor(link) {
    this.link = link;
    this.paper = new Paper((finished) => this.drawn(finished));
    for (const count of COUNTS) byId("scount").append(new Option(count, count));
    for (const name of ["strength", "passes"]) byId(name).oninput = () => this.change({ [name]: byId(name).value });
    byId("sguidance").oninput = () => this.change({ sguidance: Number(byId("sguidance").value) });
    byId("ssteps").oninput = () => this.change({ ssteps: String(this.choices[byId("ssteps").value]) });
    byId("ssampler").onchange = () => this.change({ ssampler: byId("ssampler").value });
    byId("scount").onchange = () => this.change({ scount: Number(byId("scount").value) });
    byId("sseed").oninput = () => byId("sseed").validity.valid && byId("sseed").value !== "" && this.change({ seed: Number(byId("sseed").value) });
    byId("sother").onclick = () => this.change({ seed: Math.floor(Math.random() * 1e6) });
    for (const mode of ["noise", "finish"]) byId(`mode-${mode}`).onclick = () => this.change({ mode });
    this.digits = [...Array(10).keys(), ANY].map((digit) => button(String(digit), () => this.change({ sdigit: digit === ANY ? "" : String(digit) })));
    byId("sketch-digits").append(...this.digits);
    byId("slink").onclick = () => copied(byId("slink"), location.href);
    byId("scopy").onclick = () => copied(byId("scopy"), byId("scommand").textContent);
    byId("sfile").onclick = () => this.file("sketch.png", this.paper.pixels);
    byId("mfile").onclick = () => this.file("mask.png", this.paper.pixels.map((value) => (value ? 0 : 255)));
    byId("teach").onclick = () => this.judge(true);
    for (const one of document.querySelectorAll("[data-sketch]")) one.onclick = () => {
      if (this.paper.empty) return say("sketch-said", EMPTY);
      const wish = { run: this.run.id, form: one.dataset.sketch, drawing: this.settings() };
      take(this.link, one, wish, (epoch) => this.taken(wish.run, epoch), (text) => say("sketch-said", text, true));
    };
    this.bars = [...Array(10).keys()].map((digit) => {
      const bar = element("i");
      byId("bars").append(element("div", {}, bar, element("span", { textContent: digit })));
      return bar;
    });
  }

  // The tab is shown, of this run: show the settings, which may have changed meanwhile, and draw what is not there.
  open(run) {
    this.run = run;
    const usual = run.model === "lddpm" ? { ssampler: "dpm", ssteps: "10" } : { ssampler: "ddim", ssteps: "25" };
    Object.assign(usual, { strength: String(run.strength), passes: String(run.passes) });
    for (const [name, value] of Object.entries(usual)) state[name] = state[name] || value;
    if (!this.paper.last) this.paper.show(fromWord(state.sketch) ?? new Uint8Array(SIZE * SIZE)); // not during a stroke
    this.change({ run: run.id });
    this.judge();
  }

  // Is the sketch to be finished? Another run may be able to.
  get finish() {
    return state.mode === "finish" && this.run.model !== "lddpm";
  }

  // The digits that the run can draw. None: a network without labels.
  get able() {
    return this.run.digits.map(String);
  }

  // As which the sketch is drawn, if the run can draw that, or "".
  get digit() {
    return this.able.includes(state.sdigit) ? state.sdigit : "";
  }

  change(settings) {
    set(settings);
    this.fill();
    this.ask();
  }

  fill() {
    const { run, finish, able } = this;
    state.ssteps = String(Math.min(run.T, Number(state.ssteps)));
    this.choices = stepsUpTo(run.T, Number(state.ssteps));
    byId("ssteps").max = this.choices.length - 1;
    byId("ssteps").value = this.choices.indexOf(Number(state.ssteps));
    byId("ssteps").setAttribute("aria-valuetext", state.ssteps);
    for (const name of ["strength", "passes", "sguidance", "ssampler", "scount"]) byId(name).value = state[name];
    byId("sseed").value = state.seed;
    for (const id of ["noised", "denoised"]) size(byId(id), Number(state.scount));
    for (const name of ["strength", "passes", "sguidance", "ssteps"]) byId(`${name}-said`).textContent = state[name];
    for (const mode of ["noise", "finish"]) byId(`mode-${mode}`).setAttribute("aria-pressed", finish === (mode === "finish"));
    byId("mode-finish").disabled = run.model === "lddpm";
    byId("mode-said").textContent = run.model === "lddpm" ? `${SAYS.noise} ${NO_PIXELS}` : SAYS[finish ? "finish" : "noise"];
    byId("strength-label").hidden = finish;
    byId("passes-label").hidden = byId("mfile").hidden = !finish;
    byId("sguidance").disabled = this.digit === "";
    byId("noised-said").textContent = finish ? "as the steps leave it" : "the sketch with noise";
    for (const choice of this.digits) {
      const digit = choice.textContent;
      choice.setAttribute("aria-pressed", this.digit === (digit === ANY ? "" : digit));
      choice.disabled = digit !== ANY && !able.includes(digit);
    }
  }

  settings() {
    const given = { seed: state.seed, count: Number(state.scount), sampler: state.ssampler, steps: Number(state.ssteps), guidance: state.sguidance };
    const how = { finish: this.finish, strength: Number(state.strength), passes: Number(state.passes) };
    return { side: 0, digits: this.digit === "" ? [] : [Number(this.digit)], image: [...this.paper.pixels], ...given, ...how };
  }

  drawn(finished) {
    if (finished) this.change({ sketch: toWord(this.paper.pixels) });
    this.waiting ??= setTimeout(() => {
      this.waiting = null;
      this.judge();
    }, JUDGE_AFTER);
  }

  // Ask for the drawing, if it is not there and not on its way.
  ask() {
    if (this.paper.empty) return this.stop();
    const wish = { run: this.run.id, drawings: [this.settings()] };
    const asked = JSON.stringify(wish);
    if (this.isOld()) Object.assign(this, { done: false, file: null }); // asked once: its checkpoint may be gone
    if (asked === this.asked && (this.done || this.link.awaits(this.wish))) return;
    Object.assign(this, { asked, done: false, seen: { most: 0, least: Infinity } });
    const receive = (header, pixels) => this.receive(header, pixels);
    this.wish = this.link.ask("draw", wish, receive, () => say("sketch-said", WAITING));
  }

  // A file was taken, of this epoch: of a run in training, the drawing may be of another one.
  taken(run, epoch) {
    this.file = { run, epoch };
    if (state.tab !== "sketch") return; // once the tab is shown again
    if (this.isOld()) this.ask();
    else if (this.done) this.file = null; // they agree
  }

  isOld() {
    return this.done && this.file?.run === this.run.id && this.file.epoch !== this.epoch;
  }

  // The paper is empty: there is nothing to draw, nor to take away.
  stop() {
    if (this.link.awaits(this.wish)) this.link.ask("draw", { run: this.run.id, drawings: [] }, () => {}); // in its place
    this.asked = null;
    for (const id of ["noised", "denoised"]) clear(byId(id));
    byId("scommand").textContent = "";
    say("sketch-said", EMPTY);
  }

  receive(header, pixels) {
    if (header.error) return say("sketch-said", header.error, true);
    if (header.done) this.done = true;
    if ("progress" in header) say("sketch-said", `step ${header.progress} of ${header.steps}`);
    if ("left" in header) {
      const half = header.count * SIZE * SIZE;
      const { most, least } = this.seen; // steps left; the picture comes before moments that nobody could have seen
      if (header.left && (header.left > most || this.finish)) paint(byId("noised"), pixels, 0, header.count);
      if (header.left < least) paint(byId("denoised"), pixels, half, header.count);
      this.seen = { most: Math.max(most, header.left), least: Math.min(least, header.left) };
    }
    if (header.left === 0) {
      this.epoch = header.epoch;
      byId("scommand").textContent = header.command;
      say("sketch-said", `${counted(Number(state.scount), "image")} in ${header.seconds.toFixed(2)} s, epoch ${header.epoch}. ${readings(header.seen)}`);
    }
  }

  // Ask the classifier; train: let it be trained first, and ask again then, if anybody asked meanwhile.
  judge(train = false) {
    this.again = this.teaching;
    if (this.teaching) return;
    this.teaching = train;
    byId("teach").disabled = train;
    this.link.ask("judge", { run: this.run.id, image: [...this.paper.pixels], train }, (header) => {
      if (header.progress) return say("judge-said", header.progress);
      this.teaching = byId("teach").disabled = false;
      if (this.again) return this.judge(); // of another sketch or run
      this.bars.forEach((bar, digit) => (bar.style.height = `${100 * (header.probabilities?.[digit] ?? 0)}%`));
      byId("bars").setAttribute("aria-label", "Nothing yet");
      const empty = header.error === "There is nothing on the canvas yet.";
      if (!header.error || empty) byId("teach").hidden = !header.missing;
      if (header.error) return say("judge-said", header.error, !empty);
      if (header.missing) return say("judge-said", "There is no classifier yet for this data. To train it takes about half a minute, once.");
      const best = header.probabilities.indexOf(Math.max(...header.probabilities));
      const said = `A ${best}, it says, by ${(100 * header.probabilities[best]).toFixed(0)} %.`;
      byId("bars").setAttribute("aria-label", said);
      say("judge-said", said);
    }, () => say("judge-said", WAITING));
  }

  async file(name, pixels) {
    const canvas = element("canvas");
    paint(canvas, pixels, 0, 1, 1, 0);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    save(name, new Uint8Array(await blob.arrayBuffer()));
  }
}

// "The classifier takes 12 of them for a 3, 4 for an 8."
function readings(seen) {
  if (!seen) return "";
  const counts = new Map();
  for (const label of seen) counts.set(label, (counts.get(label) ?? 0) + 1);
  const words = [...counts].sort((a, b) => b[1] - a[1]).map(([label, count]) => `${count} for ${label === 8 ? "an" : "a"} ${label}`);
  return `The classifier takes ${words.join(", ")}.`;
}
