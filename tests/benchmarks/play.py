"""How long `python -m common.play` takes to draw, as a browser sees it: the figures of README.md.

python tests/benchmarks/play.py --run RUN
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from common.args import Parser, number
from common.error_codes import USAGE, Exit, run_main

REPO = Path(__file__).resolve().parent.parent.parent
# performance.now() of every finished drawing, counted from when its page or its wish began
WATCH = """
addEventListener("DOMContentLoaded", () => {
  window.ended = [];
  new MutationObserver(() => {
    if (/ in .* s, epoch/.test(document.getElementById("draw-said").textContent))
      requestAnimationFrame(() => setTimeout(() => window.ended.push(performance.now())));
  }).observe(document.getElementById("draw-said"), { childList: true });
});
"""
MOVE = """(value) => new Promise((done) => {
  const slider = document.querySelector("[name=guidance]"), began = performance.now(), before = window.ended.length;
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
  const wait = () => window.ended.length > before ? done(window.ended.at(-1) - began) : setTimeout(wait, 1);
  wait();
})"""


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Seconds from a page's load, and from a slider's move, to a picture.", "play.py --run RUN")
    parser.add_argument("--run", required=True, help="a diffusion's run folder")
    parser.add_argument("--n", type=number(int, 1), default=64, help="digits (default: 64)")
    parser.add_argument("--steps", type=number(int, 1), default=8, help="steps of sampler dpm (default: 8)")
    parser.add_argument("--times", type=number(int, 2), default=15, help="how often (default: 15)")
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise Exit(USAGE, "there is no Chromium on this machine")
    command = [sys.executable, "-m", "common.play", str(Path(args.run).resolve()), "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    address = re.search(r"http://\S+", server.stdout.readline())[0]
    place = f"{address}#count={args.n}&sampler=dpm&steps={args.steps}"
    first, later = [], []
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            for _ in range(args.times):
                context = chromium.new_context(bypass_csp=True)  # the page's own policy keeps this from measuring
                page = context.new_page()
                page.add_init_script(WATCH)
                page.goto(place)
                page.wait_for_function("() => window.ended?.length")
                first.append(page.evaluate("() => window.ended[0]"))
                later += [page.evaluate(MOVE, 1 + step / 5) for step in range(5)]
                context.close()
            chromium.close()
    finally:
        server.terminate()
    for name, times in (("page to picture", first), ("slider to picture", later)):
        ordered = sorted(times)
        worst = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
        print(f"{name}: median {statistics.median(times):.0f} ms, 95 % within {worst:.0f} ms ({len(times)} times)")


if __name__ == "__main__":
    sys.exit(run_main(main))
