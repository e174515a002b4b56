// The page: which run, which tab, and whether the server is there.

import { Draw } from "./draw.js";
import { Link } from "./link.js";
import { Look } from "./look.js";
import { byId } from "./page.js";
import { Sketch } from "./sketch.js";
import { Space } from "./space.js";
import { onAddress, readAddress, set, state } from "./state.js";

const NEEDS = {
  draw: [["lddpm", "ddpm"], "An autoencoder draws nothing by itself: choose a run of a diffusion model above."],
  sketch: [["lddpm", "ddpm"], "An autoencoder draws nothing by itself: choose a run of a diffusion model above."],
  space: [["ae-mlp", "ae-conv", "lddpm"], "This run works on pixels and has no latent space: choose an autoencoder or a latent run above."],
  look: [["ae-mlp", "ae-conv", "lddpm", "ddpm"], ""],
};
const TABS = Object.keys(NEEDS);

let runs = [];
const link = new Link(hello, lost);
const panels = { draw: new Draw(link), sketch: new Sketch(link), space: new Space(link), look: new Look(link) };

function hello(header) {
  runs = header.runs;
  const choice = byId("run");
  choice.replaceChildren(...runs.map((run) => new Option(named(run), run.id)));
  show();
}

function named(run) {
  const when = Number.isNaN(Date.parse(run.time)) ? "" : new Date(run.time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const digits = run.only_digit === undefined ? "" : `, only ${run.data ? `class ${run.only_digit}` : `${run.only_digit}s`}`;
  const own = `${run.network ? `, network ${run.network}` : ""}${run.data ? `, ${run.data}` : ""}`;
  return `${run.kind}${own}${digits}, epoch ${run.epoch}${when && `, ${when}`}`;
}

function lost(gone, why) {
  const stopped = "The server has stopped, or cannot be reached. Start python -m common.play again with the same port: this page goes on by itself.";
  byId("lost").hidden = !gone;
  if (gone) byId("lost").textContent = why ? `The server does not answer: ${why}.` : stopped;
}

// Show the tab and the run of the address.
function show() {
  if (!runs.length) return;
  if (!TABS.includes(state.tab)) state.tab = "draw";
  const fitting = runs.find((run) => NEEDS[state.tab][0].includes(run.model));
  const run = runs.find((run) => run.id === state.run) ?? fitting ?? runs[0];
  byId("run").value = run.id;
  const fits = NEEDS[state.tab][0].includes(run.model);
  for (const tab of TABS) {
    const chosen = tab === state.tab;
    byId(`tab-${tab}`).setAttribute("aria-selected", chosen);
    byId(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    byId(tab).hidden = !chosen || !fits;
  }
  const missing = state.run && state.run !== run.id ? "The run of this link is not in the server's list: this is another." : "";
  byId("unfit").textContent = fits ? missing : NEEDS[state.tab][1];
  byId("unfit").hidden = !byId("unfit").textContent;
  if (fits) panels[state.tab].open(run);
}

byId("run").onchange = (event) => {
  set({ run: event.target.value, count: "", sampler: "", steps: "", bsampler: "", bsteps: "", ssampler: "", ssteps: "", strength: "", passes: "" });
  show();
};

for (const tab of TABS) {
  byId(`tab-${tab}`).onclick = () => {
    set({ tab });
    show();
  };
  byId(`tab-${tab}`).onkeydown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const next = byId(`tab-${TABS[(TABS.indexOf(tab) + move + TABS.length) % TABS.length]}`);
    next.focus();
    next.click();
  };
}

for (const form of document.forms) form.onsubmit = (event) => event.preventDefault(); // Enter in a box

readAddress();
onAddress(show);
