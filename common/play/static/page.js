// Small helpers for the page's elements.

export const byId = (id) => document.getElementById(id);

// element("p", { className: "hint" }, "text", another)
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function button(text, onclick) {
  return element("button", { type: "button", textContent: text, onclick });
}

// Copy text to the clipboard, and say so on the button for a moment.
export async function copied(button, text) {
  const name = (button.dataset.name ??= button.textContent);
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch { // no clipboard without https, but on loopback
    prompt("Copy this:", text);
  }
  setTimeout(() => (button.textContent = name), 1500);
}

// Let the browser save bytes as a file.
export function save(name, bytes) {
  const address = URL.createObjectURL(new Blob([bytes]));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

export const WAITING = "Waiting for the server\u2026";

// Ask for a file, one at a time: the buttons of all wait. taken(epoch): of which the file is; fault(text): what went wrong
export function take(link, button, wish, taken, fault) {
  const buttons = document.querySelectorAll("[data-form], [data-sketch]");
  const name = button.textContent;
  for (const each of buttons) each.disabled = true;
  link.ask("take", wish, (header, bytes) => {
    if (header.error) fault(header.error);
    else if (header.last) save(header.name, bytes);
    else button.textContent = `${Math.round((100 * header.progress) / header.steps)} %`;
    if (!header.last) return;
    button.textContent = name;
    for (const each of buttons) each.disabled = false;
    if (!header.error) taken(header.epoch);
  }, () => (button.textContent = "waiting\u2026"));
}

// A word now and then, not for every part of an answer.
export function say(id, text, fault = false) {
  byId(id).textContent = text;
  byId(id).classList.toggle("fault", fault);
}
