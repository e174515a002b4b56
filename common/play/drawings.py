"""Drawing, step by step for the page, and into files as infer.py does. Pixels are bytes, image after image."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.device import get_device
from common.drawing import draw_to_file, drawing_parser, wanted_labels
from common.images import to_bytes
from common.play import judge, wishes
from common.play.runs import Opened, Shelf
from common.play.wishes import Refused
from common.play.worker import Wish

if TYPE_CHECKING:
    import torch

FRAMES = 32  # of a drawing, at most
SHOW_EVERY = 0.1  # seconds between the moments that are shown while a drawing runs
TELL_EVERY = 0.4  # seconds between words on how far long work is
SHORT_STEPS = 200  # of a latent drawing that may come between the steps of other work
FORMS = {"png": "generated.png", "npz": "generated.npz", "gif": "generated_process.gif"}  # as infer.py names them
Send = Callable[..., None]  # send(pixels=b"", **header)


def bytes_of(images: torch.Tensor) -> bytes:
    """(N, 1, 28, 28) in [0, 1] -> N * 784 bytes, rounded as in the PNG that infer.py writes."""
    return to_bytes(images).cpu().numpy().tobytes()


@contextmanager
def threads_of(opened: Opened) -> Iterator[None]:
    """Compute with the threads of this run; the work between whose steps this comes has its own."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(opened.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _drawing(wish: Any, flags: dict[str, Any]) -> wishes.Drawing:
    """A drawing, checked, from a run with these flags. Raises Refused."""
    return wishes.drawing(wish, flags["T"], flags.get("labelled", True))


def sides_of(asked: dict[str, Any], flags: dict[str, Any]) -> list[wishes.Drawing]:
    """The drawings that a wish asks of a run with these flags, checked: one or two. Raises Refused.

    An empty list is a wish for none, which ends an older one.
    """
    sides = asked.get("drawings")
    if not isinstance(sides, list) or len(sides) > wishes.MOST_SIDES:
        raise Refused("A wish has a list of one or two drawings.")
    return [_drawing(side, flags) for side in sides]


def is_short(shelf: Shelf, asked: dict[str, Any]) -> bool:
    """Is this a drawing that takes so little time that it may come between the steps of another?"""
    entry = shelf.entry(asked.get("run"))
    latent = entry.model == "lddpm"
    return latent and all(side.steps <= SHORT_STEPS for side in sides_of(asked, entry.flags))


def draw(shelf: Shelf, wish: Wish, asked: dict[str, Any], send: Send) -> None:
    """One or two drawings: of up to FRAMES moments x_t and the x_0 predicted from it, and what made them.

    The moments come as they are drawn if that takes long, and else after the picture, which has 0 steps left.
    """
    opened = shelf.open(asked.get("run"))
    sides = sides_of(asked, opened.diffusion.flags)
    for drawing in sides:
        _draw(shelf, wish, opened, drawing, send)
    send(last=True)


def _draw(shelf: Shelf, wish: Wish, opened: Opened, drawing: wishes.Drawing, send: Send) -> None:
    import torch

    run, steps = opened.diffusion, drawing.all_steps
    labels = None  # of a sketch nobody says what it is, unless digits are named
    if drawing.digits or drawing.sketch is None:
        labels = wanted_labels(drawing.digits or None, drawing.count, drawing.seed, run.flags)
    apart = min(FRAMES - 1, steps)
    moments = {round(steps * i / apart) for i in range(1, apart + 1)}
    began = shown = time.monotonic()
    later: list[tuple[int, Callable[[], bytes]]] = []  # (left, its pixels): decoding them takes as long as the drawing

    def show(left: int, pixels: bytes, **header: Any) -> None:
        send(pixels, side=drawing.side, left=left, steps=steps, count=drawing.count, **header)

    def watch(left: int, x: torch.Tensor, x_0: torch.Tensor, to_images: Callable) -> None:
        nonlocal shown
        if left not in moments:
            return
        later.append((left, lambda: bytes_of(to_images(torch.cat([x, x_0])))))
        if time.monotonic() - shown > SHOW_EVERY:
            left, pixels = later.pop()
            show(left, pixels())
            shown = time.monotonic()

    how = {"guidance": drawing.guidance, "seed": drawing.seed, "sampler": drawing.sampler, "steps": drawing.steps}
    tell = _telling(wish, send, steps, side=drawing.side)
    with threads_of(opened):
        images = run.draw(labels, count=drawing.count, **how, **_sketch(drawing), callback=tell, watch=watch)
        seen = judge.labels_of(shelf, opened, images) if drawing.sketch else None
        made = {"labels": labels, "command": opened.entry.command(_words(shelf, opened, drawing)), "epoch": run.epoch}
        show(0, 2 * bytes_of(images), seconds=time.monotonic() - began, seen=seen, **made)
        with torch.inference_mode():
            for left, pixels in later:  # nobody looks at them before the picture is there
                wish.poll()
                show(left, pixels())
    send(side=drawing.side, done=True)


def _telling(wish: Wish, send: Send, steps: int, **header: Any) -> Callable[[int, Any], None]:
    """A callback for a drawing that lets other work come in between, stops, and says now and then how far it is."""
    told = time.monotonic()

    def tell(left: int, _x: Any) -> None:
        nonlocal told
        wish.poll()
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            send(progress=steps - left, steps=steps, **header)

    return tell


def _sketch(drawing: wishes.Drawing) -> dict[str, Any]:
    """What `Diffusion.draw` takes of a sketch."""
    if drawing.sketch is None:
        return {}
    image = judge.image_of(drawing.sketch.image)
    if drawing.sketch.finish:
        return {"from_image": image, "inpaint": image == 0, "resample": drawing.sketch.passes}
    return {"from_image": image, "strength": drawing.sketch.strength}


def _words(shelf: Shelf, opened: Opened, drawing: wishes.Drawing) -> list[str]:
    """The flags by which infer.py draws the same bits, on this machine."""
    place = ["--threads", str(opened.threads), "--device", str(get_device(shelf.device))]
    return ["--ckpt", str(opened.run.path), *wishes.words_of(drawing), *place]


def take(shelf: Shelf, wish: Wish, asked: dict[str, Any], send: Send) -> None:
    """A drawing as one of the files that infer.py writes, by the function that writes them there."""
    opened = shelf.open(asked.get("run"))
    run, drawing = opened.diffusion, _drawing(asked.get("drawing"), opened.diffusion.flags)
    if asked.get("form") not in [*FORMS]:  # a list: what was asked for may be anything
        raise Refused(f"The form must be one of {', '.join(FORMS)}.")
    tell = _telling(wish, send, drawing.all_steps)

    def watched(callback: Callable[[int, Any], object], **how: Any) -> torch.Tensor:
        return run.drawer(callback=lambda left, x: (tell(left, x), callback(left, x)), **how)

    state = {"args": run.flags, "exp_name": run.name, "epoch": run.epoch}
    with tempfile.TemporaryDirectory(prefix="play-") as folder, threads_of(opened):
        names = {name: str(Path(folder) / name) for name in (*FORMS.values(), wishes.SKETCH, wishes.MASK)}
        words = [names.get(word, word) for word in _words(shelf, opened, drawing)]
        words += ["--output", names[FORMS["png"]]]
        words += {"npz": ["--save-npz", names[FORMS["npz"]]], "gif": ["--show-process"]}.get(asked["form"], [])
        for name, what in (_sketch_files(drawing) if drawing.sketch else {}).items():
            Path(names[name]).write_bytes(what)
        args = drawing_parser("", "", count=1, output="").parse_args(words)
        if run.autoencoder:
            args.ae_ckpt = None  # the latent infer.py has this flag too
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            draw_to_file(args, lambda _device: (watched, state))
        name = FORMS[asked["form"]]
        send(Path(names[name]).read_bytes(), name=name, epoch=run.epoch, last=True)


def _sketch_files(drawing: wishes.Drawing) -> dict[str, bytes]:
    """The sketch and what is to be drawn anew of it, as PNGs."""
    from PIL import Image

    files: dict[str, bytes] = {}
    sketch = drawing.sketch.image
    for name, pixels in ((wishes.SKETCH, sketch), (wishes.MASK, bytes(255 * (value == 0) for value in sketch))):
        content = io.BytesIO()
        Image.frombytes("L", (28, 28), pixels).save(content, format="PNG")
        files[name] = content.getvalue()
    return files
