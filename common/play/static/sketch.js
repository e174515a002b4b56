export class Sketch {
  constructor(link) { this.link = link; }
  open(run) { this.run = run; }
}
