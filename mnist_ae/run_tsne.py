"""Look at an autoencoder's latent space by t-SNE: `python run_tsne.py --checkpoint PATH`.

Writes tsne_latent_space.png, tsne_by_digit.png, reconstructions.png and metrics.json; with --projector also what
TensorBoard's projector shows, beside the run's curves.
"""

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import emoji, threads
from common.args import Parser, bash_word, number
from common.autoencoder import AUTOENCODERS, build_autoencoder, read_autoencoder
from common.ckpt import RUNS
from common.data import held_out
from common.device import get_device, memory_in_one_line
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, NO_DATA, USAGE, Exit, require, run_main
from common.files import atomic_write, write_text
from common.flags import CHECKPOINT, COUNT, OUTPUT, add_data_arguments, add_device_argument, add_threads_argument
from common.images import check_output, one_line, over, save_output
from common.latents import PERPLEXITY, encode_digits, tsne_map
from common.run import require_checkpoint

PLAIN_LINE_EVERY = 10.0  # seconds between progress lines
MAP, BY_DIGIT, RECONSTRUCTIONS, METRICS = (
    "tsne_latent_space.png",
    "tsne_by_digit.png",
    "reconstructions.png",
    "metrics.json",
)
PROJECTOR = "projector_config.pbtxt"  # where TensorBoard looks for it in a run's folder
# Ten colours that stay apart for colour-blind eyes too (Paul Tol's "muted", and black); markers help where they do not
COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#000000")
MARKERS = "osD^v<>PX*"


def cluster_metrics(latents: Any, labels: Any) -> dict[str, float]:
    """How well the digits are apart in the D-dimensional latent space itself, not in the map.

    silhouette is in [-1, 1] (Rousseeuw 1987), calinski_harabasz above 0 (1974): higher is better for both.
    """
    from sklearn.metrics import calinski_harabasz_score, silhouette_score

    silhouette, calinski = silhouette_score(latents, labels), calinski_harabasz_score(latents, labels)
    return {"silhouette": float(silhouette), "calinski_harabasz": float(calinski)}


def plot_map(points: Any, labels: Any, title: str) -> Any:
    """A matplotlib Figure of the map (N, 2): a colour and a marker per digit, its name on its median, a legend."""
    import numpy
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    figure = Figure(figsize=(8, 7), dpi=100, layout="constrained")
    axes = figure.subplots()
    for digit in numpy.unique(labels):
        own = points[labels == digit]
        style = {"s": 9, "color": COLOURS[digit], "marker": MARKERS[digit], "linewidths": 0, "alpha": 0.7}
        axes.scatter(*own.T, label=str(digit), **style)
    for digit in numpy.unique(labels):
        name = {"fontsize": 20, "weight": "bold", "ha": "center", "va": "center", "color": COLOURS[digit]}
        halo = [withStroke(linewidth=4, foreground="white")]
        axes.text(*numpy.median(points[labels == digit], axis=0), str(digit), path_effects=halo, **name)
    axes.set(title=title, xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    axes.legend(title="digit", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3, frameon=False)
    return figure


def plot_by_digit(points: Any, labels: Any, title: str) -> Any:
    """A Figure of ten panels: each digit in its colour, on the map of all others in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=100, layout="constrained")
    for digit, axes in enumerate(figure.subplots(2, 5).flat):
        axes.scatter(*points.T, s=1, color="#D8D8D8", linewidths=0)
        own = points[labels == digit]
        axes.scatter(*own.T, s=4, color=COLOURS[digit], linewidths=0)
        axes.set(title=f"{digit}   ({len(own)})", xticks=[], yticks=[])
    figure.suptitle(title)
    return figure


def reconstruct(autoencoder: Any, images: Any, device: Any = "cpu") -> tuple[Any, int]:
    """(images, images a row) of originals over their reconstructions; images: (N, 1, 28, 28)."""
    import torch

    with torch.no_grad():
        return over(images, autoencoder(images.to(device)).cpu())


def projector_folder(checkpoint: str | Path) -> Path:
    """Where TensorBoard finds the run of this checkpoint file: OUTDIR/runs/{exp_name}.

    Raises Exit(USAGE) if the file lies outside of any run.
    """
    path = Path(checkpoint)
    path = path if path.parent.parent.name == RUNS else path.resolve()
    if path.parent.parent.name != RUNS:
        raise Exit(
            USAGE, f"--projector writes beside a run's curves, and {path} lies in no run: give --ckpt RUN_FOLDER"
        )
    return path.parent.parent.parent / "runs" / path.parent.name


def write_projector(folder: Path, latents: Any, labels: Any, images: Any, epoch: int) -> None:
    """What TensorBoard's projector shows of a run, in place of what it showed before. Raises OSError.

    latents (N, D), labels (N,) and the digits themselves, images (N, 1, 28, 28) in [0, 1], as the points' pictures.
    """
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as drafts:
        with SummaryWriter(drafts) as writer:
            writer.add_embedding(latents, labels.tolist(), images, global_step=epoch, tag="latents")
        made = [*Path(drafts).glob("*/latents/*"), Path(drafts, PROJECTOR)]  # the last one when all others are there
        if not any(folder.glob("events.*")):  # training's were deleted: without any, TensorBoard sees no run
            made += Path(drafts).glob("events.*")
        for path in made:
            target = folder / path.relative_to(drafts)
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, lambda file, path=path: file.write(path.read_bytes()))
    for other in folder.glob("*/latents"):
        if other.parent.name != f"{epoch:05d}":
            shutil.rmtree(other.parent, ignore_errors=True)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say every few seconds how long `what` has taken: scikit-learn's t-SNE tells nothing a person wants to read."""
    done, started = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(PLAIN_LINE_EVERY):
            print(f"{emoji.info} {what}: {time.monotonic() - started:.0f} s", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    print(f"{emoji.step} {what}", flush=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def outputs(output: str) -> dict[str, Path]:
    """The files to write, by their standard names: in a folder, or a .png path with the others beside it.

    Raises Exit(BAD_OUTPUT) for another kind of picture, or if they could not be written.
    """
    path = Path(output)
    if path.suffix.lower() in (".jpg", ".jpeg", ".pdf", ".svg", ".gif", ".tif", ".tiff") and not path.is_dir():
        raise Exit(BAD_OUTPUT, f"--output {output}: pictures are written as .png, or into a folder")
    named = path.suffix.lower() == ".png" and not path.is_dir()
    folder = path.parent if named else path
    files = {name: folder / name for name in (MAP, BY_DIGIT, RECONSTRUCTIONS, METRICS)}
    if named:
        files[MAP] = path
    for file in files.values():
        check_output(file, file.suffix.lower())
    if len(set(files.values())) < len(files):
        raise Exit(USAGE, f"--output {output}: that is the name of another of the three pictures")
    return files


def parse_args(argv: list[str] | None = None) -> Any:
    parser = Parser("t-SNE of a latent space.", "python run_tsne.py --checkpoint RUN_FOLDER --output tsne")
    add = parser.add_argument
    add(*CHECKPOINT, help="autoencoder: a file, a folder of a run or of runs (newest), RUN/best, or latest")
    add(*OUTPUT, default="tsne", help="a folder for the pictures, or a .png for the map, the rest beside (tsne)")
    add(
        *COUNT,
        dest="n_samples",
        type=number(int, 50),
        default=5000,
        metavar="N",
        help="test digits, at least 50 (default: 5000)",
    )
    add("--perplexity", type=number(float, above=0), default=PERPLEXITY, help="t-SNE's neighbourhood size (30)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="which of the test digits (default: 42)")
    add(
        "--projector", action="store_true", help="also for TensorBoard's projector, in the run's folder of outputs/runs"
    )
    add_device_argument(parser)
    add_threads_argument(parser)
    add_data_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    require_checkpoint(args.ckpt, AUTOENCODERS)
    require("torch", "torchvision", "sklearn", "matplotlib", "PIL", *(["tensorboard"] if args.projector else []))
    threads.prepare()
    import numpy

    device = get_device(args.device)
    data = read_autoencoder(args.ckpt)
    threads.settle(args.threads, lambda: threads.recorded(data["args"]))
    files = outputs(args.output)
    projector = check_output(projector_folder(data["path"]) / PROJECTOR, ".pbtxt").parent if args.projector else None
    autoencoder = build_autoencoder(data, device)
    digits = held_out(args.data, args.cache_dir, data["args"], data["args"]["only_digit"])
    with memory_in_one_line(f"ask for fewer than --n-samples {args.n_samples}"):
        latents, labels, images = encode_digits(autoencoder, digits, args.n_samples, args.seed, device)
        if not len(latents):
            raise Exit(NO_DATA, f"{digits.source} holds no test {digits.noun} of this class")
        if not numpy.isfinite(latents).all():
            raise Exit(BAD_CHECKPOINT, f"{data['path']} makes latents of what are no numbers (NaN)")
        if args.perplexity >= len(latents):
            raise Exit(USAGE, f"--perplexity {args.perplexity:g} must be below the number of digits, {len(latents)}")
        if len(latents) < args.n_samples:
            print(f"{emoji.warning} only {len(latents)} test {digits.noun} there are ({digits.source})")
        if (classes := len(set(labels.tolist()))) < 2:
            raise Exit(NO_DATA, f"these test {digits.noun} are only {labels[0]}s: there are no classes to tell apart")
        if classes == len(latents):
            raise Exit(
                NO_DATA, f"{classes} test {digits.noun}, each of another class, are too few to tell classes apart"
            )

        with progress(f"t-SNE of {len(latents):,} latents, {latents.shape[1]} dimensions"):
            points = tsne_map(latents, args.perplexity)
        metrics = cluster_metrics(latents, labels)
    title = f"{data['exp_name']}, epoch {data['epoch']}"
    for name, figure in ((MAP, plot_map(points, labels, title)), (BY_DIGIT, plot_by_digit(points, labels, title))):
        with one_line(files[name]):
            atomic_write(files[name], lambda file, figure=figure: figure.savefig(file, format="png"))
    pictures, nrow = reconstruct(autoencoder, images[:32], device)
    save_output(pictures, files[RECONSTRUCTIONS], nrow)
    settings = {"n_samples": len(latents), "perplexity": args.perplexity, "seed": args.seed, "data": digits.source}
    with one_line(files[METRICS]):
        write_text(files[METRICS], json.dumps(metrics | settings | {"autoencoder": title}, indent=1) + "\n")
    if projector:
        with one_line(projector):
            write_projector(projector, latents, labels, images, data["epoch"])
        print(f"{emoji.ok} for TensorBoard's PROJECTOR tab: tensorboard --logdir {bash_word(projector.parent)}")
    print(f"silhouette {metrics['silhouette']:.4f}, Calinski-Harabasz {metrics['calinski_harabasz']:.1f}")
    print(f"{emoji.ok} {', '.join(map(str, files.values()))}")


if __name__ == "__main__":
    sys.exit(run_main(main))
