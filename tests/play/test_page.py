"""The page of `python -m common.play` in a real Chromium."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, environment
from PIL import Image
from serving import Server, one_epoch_more, talk

from common import ckpt, load, picture
from common.images import to_bytes

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, server):
    """visit(hash, width=, strict=, of=) -> a page; it may write nothing to its console, and ask no other host.

    strict: under the page's own security policy, which keeps this test from running scripts in it.
    """
    heard, contexts = [], []

    def visit(place: str = "", width: int = 1024, strict: bool = False, of: Server = server, quiet: bool = True):
        may = {"bypass_csp": not strict, "has_touch": True, "permissions": ["clipboard-read", "clipboard-write"]}
        context = chromium.new_context(viewport={"width": width, "height": 800}, **may)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        if quiet:
            page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        own = (of.address, "blob:", "data:")
        page.on("request", lambda request: request.url.startswith(own) or heard.append(request.url))
        page.goto(of.address + place)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert heard == []


COUNT_WISHES = """() => {
    const send = WebSocket.prototype.send;
    window.wished = 0;
    WebSocket.prototype.send = function (text) { window.wished += 1; send.call(this, text); };
}"""


def says(page, selector: str, text: str) -> None:
    """Wait until an element of the page says that."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(re.compile(text), timeout=PATIENCE)


def canvas(page, selector: str) -> np.ndarray:
    """What is on a canvas: (H, W) grey."""
    address = page.locator(selector).evaluate("canvas => canvas.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as picture:
        return np.asarray(picture.convert("L"))


def grids(page, side: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x_t and the predicted x_0 of setting A or B."""
    return tuple(
        canvas(page, f"#pictures .two-grids:nth-child({side + 1}) figure:nth-child({n}) .grid") for n in (1, 2)
    )


def scrub(page, moment: int) -> None:
    page.locator("#moment").fill(str(moment))
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def typed(command: str, *more: object) -> None:
    """Type a command that the page shows, in the repository's folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    line = " ".join([command, *map(str, more)])
    done = subprocess.run(["bash", "-c", line], cwd=REPO, env=environment(PATH=path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def taken(page, selector: str) -> bytes:
    with page.expect_download() as download:
        page.click(selector)
    return Path(download.value.path()).read_bytes()


def test_the_page_draws_what_its_command_draws_and_gives_the_same_files(visit, runs, tmp_path):
    page = visit(f"#run={runs['lddpm'].name}&count=9&seed=5&digits=3&guidance=2&steps=6&sampler=dpm-sde")
    says(page, "#draw-said", "9 digits in .* s, epoch 2")
    typed(
        page.inner_text("#commands code"),
        "--output",
        tmp_path / "a.png",
        "--show-process",
        "--save-npz",
        tmp_path / "a.npz",
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert (grids(page)[1] == np.asarray(picture.convert("L"))).all()
    assert taken(page, "[data-form=png]") == (tmp_path / "a.png").read_bytes()
    assert taken(page, "[data-form=gif]") == (tmp_path / "a_process.gif").read_bytes()
    with np.load(io.BytesIO(taken(page, "[data-form=npz]"))) as mine, np.load(tmp_path / "a.npz") as other:
        assert dict(mine).keys() == dict(other).keys()
        assert all((mine[name] == other[name]).all() for name in mine)
    page.click("#link")
    says(page, "#link", "Copied")
    again = visit(page.evaluate("() => navigator.clipboard.readText()").removeprefix(page.url.split("#")[0]))
    says(again, "#draw-said", "9 digits")
    assert (grids(again)[1] == grids(page)[1]).all()


def test_controls_redraw_with_the_same_noise_and_the_scrubber_goes_back(visit, runs):
    page = visit(f"#run={runs['lddpm'].name}&count=4&steps=5&sampler=ddim")
    says(page, "#draw-said", "4 digits")
    final = grids(page)[1]
    says(page, "#where", "step 5 of 5")
    scrub(page, 0)
    says(page, "#where", "step 0 of 5")
    noise, guess = grids(page)
    assert (noise != guess).any()
    assert (guess != final).any()
    page.focus("[data-side='0'] [name=guidance]")
    for _ in range(15):
        page.keyboard.press("ArrowRight")
    says(page, "[data-side='0'] [data-of=guidance]", "2.6")
    says(page, "#where", "step 5 of 5")
    assert "guidance=2.6" in page.url
    page.wait_for_function("() => document.querySelector('#commands code').textContent.includes('--guidance 2.6')")
    page.select_option("[data-side='0'] [name=sampler]", "ddpm")
    page.wait_for_function("() => document.querySelector('#commands code').textContent.includes('--sampler ddpm')")
    scrub(page, 1000)
    assert (grids(page)[1] != final).any()
    scrub(page, 0)
    says(page, "#where", "^step 0 of 5$")  # the moments may come after the picture
    assert (grids(page)[0] == noise).all()
    page.click("#play")
    says(page, "#where", "step [1-4] of 5")
    page.click("#play")
    assert page.locator("#play").get_attribute("aria-label") == "Play the steps"
    page.check("#compare")  # by click; the second setting draws on the same noise
    page.wait_for_function("() => document.querySelectorAll('.command:not([hidden]) code')[1]?.textContent")
    page.select_option("[data-side='1'] [name=sampler]", "dpm")
    page.wait_for_function(
        "() => document.querySelectorAll('#commands code')[1].textContent.includes('--sampler dpm ')"
    )
    scrub(page, 0)
    says(page, "#where", "^step 0 of 5$")
    assert (grids(page, 1)[0] == noise).all()
    scrub(page, 1000)
    assert (grids(page, 1)[1] != grids(page)[1]).any()
    page.tap("#other")
    page.wait_for_function("() => !document.querySelector('#commands code').textContent.includes('--seed 42 ')")
    scrub(page, 0)
    says(page, "#where", "^step 0 of 5$")
    assert (grids(page)[0] != noise).any()


def test_an_old_picture_of_another_size_is_painted_again(visit, runs):
    page = visit(f"#run={runs['lddpm'].name}&count=4&steps=5&sampler=ddim")
    says(page, "#draw-said", "4 digits")
    final = grids(page)[1]
    page.evaluate("() => { WebSocket.prototype.send = () => {}; }")  # so that the wish for nine stays unanswered
    page.select_option("#count", "9")
    assert not grids(page)[1].any()
    scrub(page, 1000)
    assert (grids(page)[1] == final).all()


def test_a_sketch_by_mouse_finger_and_keys_is_what_its_command_draws(visit, runs, tmp_path):
    page = visit(f"#tab=sketch&run={runs['ddpm'].name}&mode=finish&passes=2&ssteps=20&scount=4")
    says(page, "#sketch-said", "Draw something")
    box = page.locator("#paper").bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.3 * box["height"], steps=4)
    page.mouse.up()
    says(page, "#sketch-said", "4 images in")
    by_mouse = canvas(page, "#paper")
    assert by_mouse[8].max() == 255
    page.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + 0.7 * box["height"])
    by_finger = canvas(page, "#paper")
    assert (by_finger > by_mouse).sum() > 3
    page.focus("#paper")
    for key in (" ", "ArrowRight", "ArrowRight", " "):
        page.keyboard.press(key)
    assert (canvas(page, "#paper") > by_finger).sum() > 3
    page.click("#undo")
    assert (canvas(page, "#paper") == by_finger).all()
    says(page, "#sketch-said", "4 images in")
    page.click("#sketch-digits button:nth-child(4)")
    page.wait_for_function("() => document.getElementById('scommand').textContent.includes('--digit 3')")
    names = {}
    for name, selector in (("sketch.png", "#sfile"), ("mask.png", "#mfile")):
        (tmp_path / name).write_bytes(taken(page, selector))
        names[name] = str(tmp_path / name)
    command = page.inner_text("#scommand")
    for name, path in names.items():
        command = command.replace(name, path)
    typed(command, "--output", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert (canvas(page, "#denoised") == np.asarray(picture.convert("L"))).all()
    assert taken(page, "[data-sketch=png]") == (tmp_path / "a.png").read_bytes()
    again = visit(page.url.removeprefix(page.url.split("#")[0]))  # the address holds the sketch
    says(again, "#sketch-said", "4 images in")
    assert (canvas(again, "#denoised") == canvas(page, "#denoised")).all()
    says(again, "#judge-said", "no classifier yet")


HOLD = """() => {
    window.wishes = [];
    WebSocket.prototype.send = function (text) { window.socket = this; wishes.push(JSON.parse(text)); };
}"""
ANSWER = """header => {
    const { id } = wishes.findLast(wish => wish.do === header.do);
    const text = new TextEncoder().encode(JSON.stringify({ id, last: true, ...header }));
    const data = new Uint8Array(4 + text.length);
    data.set([text.length & 255, text.length >> 8]);
    data.set(text, 4);
    socket.onmessage({ data: data.buffer });
}"""  # to the newest wish of its kind
WORD = base64.urlsafe_b64encode(bytes([0] * 300 + [255] * 30 + [0] * 454)).decode().rstrip("=")


def wishes(page, kind: str, count: int) -> list[dict]:
    """The page's wishes of this kind since HOLD kept them from the server, once there are so many."""
    page.wait_for_function("([kind, n]) => wishes.filter(wish => wish.do === kind).length >= n", arg=[kind, count])
    found = [wish for wish in page.evaluate("() => wishes") if wish["do"] == kind]
    assert len(found) == count
    return [{name: value for name, value in wish.items() if name != "id"} for wish in found]


def test_a_tab_that_is_returned_to_shows_the_settings_and_draws_what_is_not_there(visit, runs):
    page = visit(f"#run={runs['lddpm'].name}&count=4&steps=5&seed=7&digits=357&sketch={WORD}")
    says(page, "#draw-said", "4 digits")
    sent = []
    page.on("websocket", lambda one: one.on("framesent", lambda text: sent.append(text)))
    page.reload()
    says(page, "#draw-said", "4 digits")
    assert len(sent) == 1
    page.click("#tab-sketch")
    says(page, "#sketch-said", "16 images in")
    page.click("#sother")
    page.click("#tab-draw")
    seed = page.input_value("#seed")
    assert f"seed={seed}&" in page.url
    page.wait_for_function(
        "seed => document.querySelector('#commands code').textContent.includes(`--seed ${seed} `)", arg=seed
    )
    page.evaluate(HOLD)
    for compare in (True, False):  # what is on its way for a setting that is hidden again ends
        page.set_checked("#compare", compare)
    assert [len(wish["drawings"]) for wish in wishes(page, "draw", 2)] == [1, 0]
    says(page, "#draw-said", "4 digits")
    page.evaluate(HOLD)
    page.click("#other")
    says(page, "#draw-said", "Waiting for the server")
    page.click("#tab-look")
    page.click("#tab-draw")
    assert wishes(page, "draw", 1)[0]["drawings"][0]["digits"] == [3]  # which the run draws
    assert "digits=357" in page.url  # another run may draw these
    for tab in ("sketch", "draw", "sketch"):  # each in the place of the one before
        page.click(f"#tab-{tab}")
    first, other, *again = wishes(page, "draw", 4)
    assert again == [first, other]
    page.click("#tab-space")
    page.click("#centre")  # before there is a map
    page.click("#tab-look")
    for model in ("ddpm", "lddpm"):
        page.select_option("#run", runs[model].name)
    page.click("#tab-draw")
    usual = {"count": 64, "sampler": "dpm", "steps": 8}
    assert wishes(page, "draw", 5)[-1]["drawings"][0].items() >= usual.items()
    page.check("#compare")
    page.uncheck("#compare")
    page.locator(".side[data-side='0'] [name=guidance]").fill("2")
    page.check("#compare")
    sides = ["".join("AB"[side["side"]] for side in wish["drawings"]) for wish in wishes(page, "draw", 8)[5:]]
    assert sides == ["AB", "A", "AB"]


def test_an_empty_paper_ends_its_drawing_and_the_classifier_sees_what_is_on_it(visit, runs):
    page = visit(f"#tab=sketch&run={runs['ddpm'].name}&scount=4&sketch={WORD}")
    says(page, "#sketch-said", "4 images in")
    says(page, "#judge-said", "no classifier yet")
    page.evaluate(HOLD)
    page.click("#sother")
    page.click("#wipe")
    assert wishes(page, "draw", 2)[-1]["drawings"] == []
    says(page, "#sketch-said", "Draw something first")
    assert not canvas(page, "#denoised").any()
    assert page.inner_text("#scommand") == ""
    page.click("[data-sketch=png]")
    wishes(page, "take", 0)
    wishes(page, "judge", 1)
    page.click("#teach")
    wishes(page, "judge", 2)
    page.click("#undo")
    page.wait_for_timeout(200)  # that another question would take
    page.evaluate(ANSWER, {"do": "judge", "probabilities": [1] + [0] * 9})
    assert any(wishes(page, "judge", 3)[-1]["image"])
    page.evaluate(ANSWER, {"do": "judge", "probabilities": [0] * 9 + [1]})
    says(page, "#judge-said", "A 9, it says")
    page.click("#wipe")
    wishes(page, "judge", 4)
    page.evaluate(ANSWER, {"do": "judge", "error": "There is nothing on the canvas yet."})
    says(page, "#judge-said", "nothing on the canvas")
    assert page.locator("#bars i").last.evaluate("bar => bar.style.height") == "0%"
    assert page.locator("#teach").is_hidden()  # there is one now


def test_a_second_finger_draws_nothing(visit, runs):
    page = visit(f"#tab=sketch&run={runs['ddpm'].name}&scount=1")
    says(page, "#sketch-said", "Draw something")
    box = page.locator("#paper").bounding_box()
    at = lambda x, y, finger: {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"], "id": finger}  # noqa: E731
    hand = page.context.new_cdp_session(page)
    for kind, *fingers in (
        ("touchStart", at(0.2, 0.2, 0)),
        ("touchStart", at(0.2, 0.2, 0), at(0.8, 0.8, 1)),
        ("touchMove", at(0.4, 0.2, 0), at(0.8, 0.7, 1)),
        ("touchMove", at(0.6, 0.2, 0)),  # the other is lifted
        ("touchEnd",),
    ):
        hand.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
    says(page, "#sketch-said", "1 image in")
    drawn = canvas(page, "#paper")
    assert (drawn[5, 6:16] > 0).all()
    assert not drawn[9:].any()


def test_a_sketch_stands_beside_its_noised_self(visit, runs):
    page = visit(f"#tab=sketch&run={runs['ddpm'].name}&mode=noise&strength=0.5&ssteps=20&scount=1&ssampler=ddim")
    says(page, "#sketch-said", "Draw something")
    box = page.locator("#paper").bounding_box()
    page.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    says(page, "#sketch-said", "1 image in")
    seen = {}
    load(runs["ddpm"], "cpu").draw(
        count=1,
        from_image=torch.tensor(canvas(page, "#paper")) / 255,
        strength=0.5,
        steps=10,  # half of T = 20
        sampler="ddim",
        guidance=1.0,
        watch=lambda left, x, x_0, to: seen.update({left: to_bytes(to(torch.cat([x, x_0]))).numpy()}),
    )
    page.wait_for_timeout(200)  # for the moments after the picture
    for selector, wanted in (("#noised", seen[10][0]), ("#denoised", seen[0][1])):
        assert (canvas(page, selector)[2:-2, 2:-2] == wanted.squeeze()).all(), selector


def test_the_latent_space_under_pointer_and_keys(visit, runs, server):
    page = visit(f"#tab=space&run={runs['lddpm'].name}")
    says(page, "#space-said", "t-SNE of the latents of 50 test digits")
    says(page, "#pointed", "A 3")
    page.wait_for_function("() => document.querySelectorAll('#sliders input').length === 16")
    page.wait_for_timeout(300)
    first, walk, decoded = canvas(page, "#original"), canvas(page, "#walk"), canvas(page, "#decoded")
    assert first.any()
    assert canvas(page, "#again").any()
    assert decoded.any()
    page.focus("#map")
    for key in ("ArrowDown", "ArrowUp", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        page.wait_for_timeout(300)
        moved = (canvas(page, "#original") != first).any()
        if moved:  # there may be no digit in that direction; and two moves may lead back
            break
    assert moved
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert (canvas(page, "#walk") != walk).any()
    walk = canvas(page, "#walk")
    _, (*_, (header, _)) = talk(server, {"do": "map", "run": runs["lddpm"].name})
    size = page.locator("#map").bounding_box()
    x, y = header["points"][7]
    page.mouse.move(size["x"] + 14 + x * (size["width"] - 28), size["y"] + 14 + y * (size["height"] - 28))
    page.wait_for_timeout(300)
    _, ((_, pixels),) = talk(server, {"do": "digit", "run": runs["lddpm"].name, "index": 7})
    assert canvas(page, "#original").tobytes() == pixels[:784]
    assert canvas(page, "#again").tobytes() == pixels[784:]
    page.mouse.down()
    page.mouse.up()
    page.wait_for_timeout(300)
    assert (canvas(page, "#walk") != walk).any()
    page.locator("#place").fill("100")
    page.wait_for_timeout(300)
    at_the_end = canvas(page, "#decoded")
    assert (at_the_end != decoded).any()
    page.focus("#sliders label:nth-child(3) input")
    for _ in range(10):
        page.keyboard.press("PageUp")
    page.wait_for_timeout(300)
    assert (canvas(page, "#decoded") != at_the_end).any()


def test_the_training_of_a_run(visit, runs):
    page = visit(f"#tab=look&run={runs['lddpm'].name}")
    says(
        page,
        "#look-said",
        "2 epochs; lowest validation loss .* after epoch . newest checkpoint: epoch 2|2 epochs; lowest",
    )
    assert page.locator("#curves polyline").count() == 2
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_function(  # the curves' words keep their size: a drawing's unit stays a pixel
        "() => Math.abs(document.querySelector('#curves svg').getScreenCTM().a - 1) < 0.01 && innerWidth === 360"
    )
    push = """() => {
        const box = document.getElementById("curves"), before = box.offsetHeight;
        box.replaceChildren();
        return before - box.offsetHeight;
    }"""
    assert page.evaluate(push) == 0  # nothing moves when the curves come
    says(page, "#flags", "hidden_dim")
    says(page, "#epoch-said", "epoch 2")
    page.focus("#epoch")
    page.keyboard.press("ArrowLeft")
    says(page, "#epoch-said", "epoch 1")
    page.wait_for_function("() => document.getElementById('epoch-picture').naturalWidth > 28")
    page.select_option("#run", runs["ddpm"].name)
    says(page, "#no-epochs", "--generate-images")


def test_a_network_without_labels_draws(visit, runs, copy_of):
    folder = copy_of(runs["ddpm"])
    for _, path in ckpt.run_checkpoints(folder):
        state = ckpt.read_checkpoint(path)
        state["args"] |= {"labelled": False, "only_digit": None}
        ckpt.save_checkpoint(path, state)
    server = Server(folder)
    try:
        says(visit("#count=4&steps=3", of=server), "#draw-said", "4 digits in .* epoch 1")
    finally:
        server.process.kill()
        server.process.wait(60)


def test_files_are_made_one_at_a_time(visit, runs):
    page = visit(f"#run={runs['ddpm'].name}&count=144&steps=20&sampler=ddpm")
    says(page, "#draw-said", "144 digits")
    buttons = "[...document.querySelectorAll('[data-form], [data-sketch]')]"
    with page.expect_download() as download:
        able = page.evaluate(f"() => {{ {buttons}[0].click(); return {buttons}.filter(one => !one.disabled).length; }}")
    assert (able, download.value.suggested_filename[-4:]) == (0, ".png")
    page.wait_for_function(f"() => {buttons}.every(one => !one.disabled)")


def test_what_stands_side_by_side_and_what_is_taken_is_of_one_epoch(visit, runs):
    """Of a run in training, which has a newer one now and then."""
    page = visit(f"#run={runs['lddpm'].name}&compare=1&count=4&digits=3&bdigits=3&steps=3&bsteps=4")

    def of_epoch(epoch: int, commands: str = "#commands code") -> None:
        every = f"name => [...document.querySelectorAll('{commands}')].every(one => one.textContent.includes(name))"
        page.wait_for_function(every, arg=ckpt.NAME.format(epoch=epoch))

    of_epoch(2)
    with one_epoch_more(runs["lddpm"]):
        page.locator(".side[data-side='1'] [name=guidance]").fill("2")  # A is drawn anew too
        of_epoch(3)
    page.click("#other")
    of_epoch(2)
    with one_epoch_more(runs["lddpm"]):
        taken(page, "[data-form=png]")
        of_epoch(3)
    page.click("#other")
    of_epoch(2)
    with one_epoch_more(runs["lddpm"]), page.expect_download():
        page.evaluate("() => ['[data-form=png]', '#tab-look'].forEach(one => document.querySelector(one).click())")
    page.evaluate(COUNT_WISHES)
    page.click("#tab-draw")  # where a file of an epoch that is gone is asked for once
    page.wait_for_timeout(2500)
    assert page.evaluate("() => window.wished") == 1
    page.click("#tab-sketch")
    page.locator("#paper").click()
    of_epoch(2, "#scommand")
    with one_epoch_more(runs["lddpm"]):
        taken(page, "[data-sketch=png]")
        of_epoch(3, "#scommand")


def test_a_file_that_comes_while_another_tab_is_shown_takes_nothing_from_it(visit, runs):
    """Both tabs draw, one at a time, and what is hidden asks for nothing."""
    page = visit(f"#run={runs['ddpm'].name}&count=16&steps=20&sampler=ddpm&ssteps=20&scount=16")
    says(page, "#draw-said", "16 digits")
    page.click("#tab-sketch")
    page.locator("#paper").click()
    says(page, "#sketch-said", "16 images in")
    page.click("#tab-draw")
    at_once = ("#other", "[data-form=png]", "#tab-sketch")
    with page.expect_download():
        page.evaluate(f"() => {{ {'; '.join(f'document.querySelector({one!r}).click()' for one in at_once)} }}")
    seed = page.input_value("#sseed")
    page.wait_for_function(
        "seed => document.querySelector('#scommand').textContent.includes(`--seed ${seed} `)", arg=seed
    )


def test_two_tabs_do_not_disturb_each_other(visit, runs):
    pages = [
        visit(f"#run={runs['lddpm'].name}&count=4&seed={seed}&digits=3&guidance=1.1&sampler=ddim&steps=9")
        for seed in (1, 2)
    ]
    for page, seed in zip(pages, (1, 2), strict=True):
        says(page, "#draw-said", "4 digits")
        mine = load(runs["lddpm"], "cpu").draw(3, count=4, seed=seed, sampler="ddim", steps=9)
        assert (grids(page)[1] == np.asarray(picture(mine, scale=1))).all()


def test_a_server_that_stopped_is_said_and_reconnected(visit, runs):
    first = Server(runs["lddpm"])
    page = visit("#count=4&steps=3", of=first, quiet=False)
    says(page, "#draw-said", "4 digits")
    first.interrupt()
    says(page, "#lost", "server has stopped")
    page.click("#other")  # a wish that waits
    second = Server(runs["lddpm"], port=first.port)
    page.wait_for_function("() => document.getElementById('lost').hidden")
    seed = re.search(r"seed=(\d+)", page.url)[1]
    page.wait_for_function(
        "seed => document.querySelector('#commands code').textContent.includes(`--seed ${seed} `)", arg=seed
    )
    second.process.kill()
    second.process.wait(60)


def test_every_tab_under_the_pages_own_policy_is_silent(visit, runs):
    for kind, folder in runs.items():
        page = visit(f"#run={folder.name}", strict=True)
        for tab in ("draw", "sketch", "space", "look"):
            page.click(f"#tab-{tab}")
            fits = (
                (tab in ("draw", "sketch") and kind != "ae-mlp") or (tab == "space" and kind != "ddpm") or tab == "look"
            )
            says(page, f"#{tab}" if fits else "#unfit", ".")
            assert page.locator(f"#{tab}").is_visible() == fits
            if fits and tab == "draw":
                page.press("#seed", "Enter")
        page.keyboard.press("ArrowRight")  # from the last tab to the first
        says(page, "[role=tab][aria-selected=true]", "Draw")


@pytest.mark.parametrize("width", [320, pytest.param(1024, marks=pytest.mark.slow), 1920])
def test_it_fits_and_everything_has_a_name(visit, runs, width):
    page = visit(f"#run={runs['lddpm'].name}&compare=1&count=4&steps=3", width=width)
    for tab in ("draw", "sketch", "space", "look"):
        page.click(f"#tab-{tab}")
        page.wait_for_timeout(200)
        assert page.evaluate("() => document.scrollingElement.scrollWidth") <= width, tab
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, [role=img], [role=application]")]
                .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()))
                .map((e) => e.outerHTML)"""
        )
        assert nameless == []
