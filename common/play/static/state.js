// Every setting, and the address that holds them all: a link brings the picture back.

const DEFAULTS = {
  tab: "draw", run: "", count: "", seed: 42, compare: 0,
  digits: "0123456789", guidance: 1.1, sampler: "", steps: "",
  bdigits: "0123456789", bguidance: 3, bsampler: "", bsteps: "",
  sketch: "", mode: "noise", strength: "", passes: "", sdigit: "", sguidance: 1.5, ssampler: "", ssteps: "", scount: 16,
};

export const state = { ...DEFAULTS };

const listeners = [];

// Call listener() after the address was changed from outside: a link, or the browser's back button.
export function onAddress(listener) {
  listeners.push(listener);
}

export function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  Object.assign(state, DEFAULTS);
  for (const [name, value] of given) {
    if (!(name in DEFAULTS)) continue;
    const number = typeof DEFAULTS[name] === "number";
    if (!number || Number.isFinite(Number(value))) state[name] = number ? Number(value) : value;
  }
}

// Change settings, and the address with them.
export function set(changes) {
  Object.assign(state, changes);
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== DEFAULTS[name] || name === "seed") words.set(name, value);
  }
  history.replaceState(null, "", `#${words}`);
}

addEventListener("hashchange", () => {
  readAddress();
  for (const listener of listeners) listener();
});
