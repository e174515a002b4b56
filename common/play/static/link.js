// The connection to the server. A wish is sent as JSON; answers come in parts: a header and pixels.
// Of each kind only the newest wish is answered; Draw and Sketch share one. What was not answered is asked again after
// a reconnection.

const PATIENCE = [500, 1000, 2000, 4000]; // milliseconds between tries
const SILENCE = 700; // milliseconds without an answer, after which it is said that there is none yet

export class Link {
  // onHello(header): the server's first words; onLost(gone, why): whether the connection is gone
  constructor(onHello, onLost) {
    Object.assign(this, { onHello, onLost, wishes: new Map(), number: 0, tries: 0 });
    this.connect();
  }

  connect() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}/socket`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = (event) => this.receive(event.data);
    this.socket.onclose = (event) => {
      this.ready = false;
      this.onLost(true, event.reason);
      setTimeout(() => this.connect(), PATIENCE[Math.min(this.tries++, PATIENCE.length - 1)]);
    };
  }

  // Ask for something of this kind ("draw", "walk", ...); onPart(header, pixels) gets each part of the answer.
  // onSilence(): there was none for a while, as the server is at other work. Returns the wish, for `awaits`.
  ask(kind, wish, onPart, onSilence) {
    const entry = { kind, text: JSON.stringify({ ...wish, do: kind, id: ++this.number }), id: this.number, onPart };
    this.wishes.set(kind, entry);
    if (this.ready) this.socket.send(entry.text);
    if (onSilence) setTimeout(() => this.awaits(entry) && !entry.heard && onSilence(), SILENCE);
    return entry;
  }

  // Is the answer to this wish still to come? No newer one has replaced it.
  awaits(entry) {
    return entry !== undefined && this.wishes.get(entry.kind) === entry;
  }

  // Listen to no answer of these kinds any more.
  drop(...kinds) {
    for (const kind of kinds) this.wishes.delete(kind);
  }

  receive(data) {
    const length = new DataView(data).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    if (header.do === "hello") {
      this.tries = 0;
      this.onLost(false);
      this.onHello(header); // what this asks for goes with all the rest
      this.ready = true;
      for (const entry of this.wishes.values()) this.socket.send(entry.text);
      return;
    }
    const entry = this.wishes.get(header.do);
    if (!entry || entry.id !== header.id) return; // a newer wish has replaced it
    entry.heard = true;
    if (header.last || header.error) this.wishes.delete(header.do); // before onPart, which may ask anew
    entry.onPart(header, new Uint8Array(data, 4 + length));
  }
}
