// A look into a run: its loss curves, the pictures of its epochs, its flags.

import { byId, element, say } from "./page.js";

const AGAIN = 10000; // milliseconds until a run that may still train is looked at again
const [LEFT, RIGHT, TOP, BOTTOM] = [56, 12, 12, 52];
const PER_TICK = 72; // pixels between two epochs that are named
const CURVES = [["train_loss", "training"], ["val_loss", "validation"]];

export class Look {
  constructor(link) {
    Object.assign(this, { link, losses: [] });
    byId("epoch").oninput = () => this.picture(Number(byId("epoch").value));
    new ResizeObserver(() => this.showLosses()).observe(byId("curves"));
    setInterval(() => !byId("look").hidden && !document.hidden && this.run && this.ask(), AGAIN);
  }

  // The tab is shown, of this run.
  open(run) {
    if (run.id === this.run?.id) return;
    this.run = run;
    this.pictures = [];
    this.losses = [];
    this.showLosses();
    this.ask();
  }

  ask() {
    this.link.ask("look", { run: this.run.id }, (header) => this.receive(header));
  }

  receive(header) {
    if (header.error) return say("look-said", header.error, true);
    const losses = header.rows.filter((row) => CURVES.some(([name]) => row[name] > 0));
    this.losses = losses;
    this.showLosses();
    const best = losses.reduce((least, row) => (row.val_loss !== null && (least === null || row.val_loss < least.val_loss) ? row : least), null);
    say("look-said", losses.length === 0 ? "This run has no metrics.jsonl: there are no curves."
      : `${header.epochs} epochs${best ? `; lowest validation loss ${best.val_loss.toPrecision(4)} after epoch ${best.epoch}` : ""}; newest checkpoint: epoch ${header.epoch}.`);
    this.epochs(header.pictures);
    byId("flags").replaceChildren(...Object.entries(header.flags).map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row", textContent: name }), element("td", { textContent: value }))));
  }

  // In pixels of their box, so that their words keep their size; a hidden box has none.
  showLosses() {
    const { clientWidth: width, clientHeight: height } = byId("curves");
    byId("curves").replaceChildren(...(width && this.losses.length ? [curves(this.losses, width, height)] : []));
  }

  // The pictures there are; the newest is shown, until somebody moves the slider.
  epochs(pictures) {
    const slider = byId("epoch");
    const newest = Number(slider.value) === this.pictures.length - 1;
    const first = this.pictures.length === 0;
    const more = pictures.length !== this.pictures.length;
    this.pictures = pictures;
    byId("epochs").hidden = !pictures.length;
    byId("no-epochs").hidden = Boolean(pictures.length);
    slider.max = Math.max(0, pictures.length - 1);
    if (!pictures.length || !(first || more)) return;
    if (first || newest) slider.value = slider.max;
    this.picture(Number(slider.value));
  }

  picture(index) {
    const epoch = this.pictures[index];
    byId("epoch-picture").src = `picture?run=${encodeURIComponent(this.run.id)}&epoch=${epoch}`;
    byId("epoch-picture").alt = `What the run drew after epoch ${epoch}`;
    byId("epoch").setAttribute("aria-valuetext", `epoch ${epoch}`);
    byId("epoch-said").textContent = `epoch ${epoch}`;
  }
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// The losses over epochs, on a logarithmic axis, as an SVG whose colours are the style sheet's.
function curves(rows, width, height) {
  const values = rows.flatMap((row) => CURVES.map(([name]) => row[name])).filter((value) => value > 0);
  const [low, high] = [Math.min(...values) * 0.97, Math.max(...values) * 1.03];
  const [first, last] = [rows[0].epoch, rows.at(-1).epoch];
  const x = (epoch) => LEFT + ((epoch - first) / Math.max(1, last - first)) * (width - LEFT - RIGHT);
  const y = (loss) => TOP + (1 - Math.log(loss / low) / Math.log(high / low)) * (height - TOP - BOTTOM);
  const parts = [];
  for (const loss of ticks(low, high)) {
    parts.push(svg("line", { class: "line", x1: LEFT, x2: width - RIGHT, y1: y(loss), y2: y(loss) }));
    parts.push(svg("text", { x: LEFT - 8, y: y(loss) + 4, "text-anchor": "end" }, Number(loss.toPrecision(3))));
  }
  const every = Math.max(1, Math.ceil(((last - first) * PER_TICK) / (width - LEFT - RIGHT)));
  for (let epoch = first; epoch <= last; epoch += every) {
    parts.push(svg("text", { x: x(epoch), y: height - BOTTOM + 18, "text-anchor": "middle" }, epoch));
  }
  parts.push(svg("text", { x: (LEFT + width - RIGHT) / 2, y: height - 12, "text-anchor": "middle" }, "epoch"));
  CURVES.forEach(([name, title], number) => {
    const known = rows.filter((row) => row[name] > 0);
    const points = known.map((row) => `${x(row.epoch).toFixed(1)},${y(row[name]).toFixed(1)}`).join(" ");
    parts.push(svg("polyline", { class: `curve ${name}`, points }));
    if (known.length === 1) parts.push(svg("circle", { class: `dot ${name}`, cx: x(known[0].epoch), cy: y(known[0][name]), r: 3 }));
    const top = TOP + 14 + 20 * number;
    parts.push(svg("line", { class: `curve ${name}`, x1: width - 130, x2: width - 106, y1: top, y2: top }));
    parts.push(svg("text", { x: width - 98, y: top + 4 }, title));
  });
  const said = `Losses from epoch ${first} to ${last}, between ${low.toPrecision(3)} and ${high.toPrecision(3)}`;
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": said }, ...parts);
}

// Round numbers between low and high, some three to nine of them.
function ticks(low, high) {
  for (const steps of [[1], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const step of steps) {
        const value = step * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    }
    if (found.length >= 3) return found;
  }
  const step = 10 ** Math.floor(Math.log10((high - low) / 2));
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(value);
  return found.length > 9 ? found.filter((_, n) => n % Math.ceil(found.length / 9) === 0) : found;
}
