"""Which runs the page offers, and their networks, which are read anew when a run has a newer epoch."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import ckpt, threads
from common.args import AUTO, bash_word
from common.data import held_out
from common.device import get_device
from common.drawing import FEW
from common.error_codes import MODEL_MISMATCH, USAGE, Exit
from common.flags import DEFAULT_GUIDANCE, DEFAULT_RESAMPLE, DEFAULT_STRENGTH, HUB, OUR_NETWORK, is_own, why_not_drawn
from common.loading import Autoencoder, Diffusion, load
from common.mnist import has_mnist
from common.modules import MODULE_FILES, ROOT
from common.own_data import hub_file
from common.play.wishes import Refused

KEPT = 4  # networks in memory
KINDS = {"ae-mlp": "autoencoder", "ae-conv": "autoencoder", "lddpm": "latent diffusion", "ddpm": "pixel diffusion"}
EXPERIMENTS = tuple(dict.fromkeys(file.split("/")[0] for file in MODULE_FILES.values()))
READY = "pretrained.pt"  # in an experiment's folder: weights that came with the repository
MAKES_ONE = "bash mnist_latent_diffusion/run.sh"


class Opened:
    """A run's networks, as they were at one epoch; the number of threads that suits them; its place in the list."""

    def __init__(self, run: Diffusion | Autoencoder, threads: int, entry: Entry) -> None:
        self.run, self.threads, self.entry = run, threads, entry
        self.kept: dict[str, Any] = {}  # what was computed from these networks, by whoever computed it

    @property
    def autoencoder(self) -> Autoencoder:
        """The run's own, or that of its latents. Raises Refused if it has none."""
        found = self.run if isinstance(self.run, Autoencoder) else self.run.autoencoder
        if found is None:
            raise Refused("This run works on pixels and has no latent space: choose an autoencoder or a latent run.")
        return found

    @property
    def diffusion(self) -> Diffusion:
        """Raises Refused if it is an autoencoder."""
        if not isinstance(self.run, Diffusion):
            raise Refused("An autoencoder draws nothing by itself: choose a run of a diffusion model.")
        return self.run


class Entry:
    """A run in the list. `source` is what `load` takes: a run's folder, or a checkpoint file outside any run."""

    def __init__(self, source: Path, state: ckpt.State) -> None:
        self.source, self.name = source, source.name if source.is_dir() else source.stem
        self.model = ckpt.infer_model_from_checkpoint(state)
        self.flags, self.epoch, self.time = state["args"], state["epoch"], str(state.get("timestamp"))

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.source if self.source.is_dir() else self.source.parent

    def kept(self, name: str) -> Path:
        """Where something that was computed of it is kept: in its folder, or beside the single file."""
        return self.source / name if self.source.is_dir() else self.source.with_suffix(f".{name}")

    @property
    def experiment(self) -> str:
        """The folder of its experiment, in the repository."""
        return MODULE_FILES[self.model].split("/")[0]

    def stamp(self) -> tuple:
        """Changes when the run has a newer checkpoint."""
        found = ckpt.run_checkpoints(self.source)[:1] if self.source.is_dir() else [(0, self.source)]
        return tuple((path, os.stat(path).st_mtime_ns) for _, path in found)

    def newest(self) -> int:
        """The epoch of its newest checkpoint."""
        found = ckpt.run_checkpoints(self.source)  # none of a single file
        return found[0][0] if found else self.epoch

    def described(self, name: str) -> dict[str, Any]:
        """What the browser is told of it. No path is."""
        known = ("T", "only_digit", "latent_dim", "ae_latent_dim", "schedule")
        flags = {key: self.flags[key] for key in known if self.flags.get(key) is not None}
        usual = {"strength": DEFAULT_STRENGTH.get(self.model), "passes": DEFAULT_RESAMPLE}  # of a sketch
        seen = {"id": name, "model": self.model, "kind": KINDS[self.model], "epoch": self.newest(), "time": self.time}
        if (network := self.flags.get("network", OUR_NETWORK)) != OUR_NETWORK:
            seen["network"] = network
        if is_own(data := self.flags.get("data", AUTO)):
            seen["data"] = data.removeprefix(HUB) if data.startswith(HUB) else Path(data).stem
        if self.model in DEFAULT_STRENGTH:  # which digits can be asked for
            seen["digits"] = [digit for digit in range(10) if not why_not_drawn([digit], self.flags, "")]
        return seen | usual | flags

    @property
    def samples(self) -> Path:
        return self.folder.parent.parent / "samples" / self.folder.name

    def command(self, words: list[str]) -> str:
        """infer.py with these words, as it is typed in the repository's folder."""
        quoted = [word if word.startswith("--") else bash_word(word) for word in words]
        return f"cd {self.experiment} && python infer.py {' '.join(quoted)}"


def places() -> list[Path]:
    """Where the trainers, the jobs and run.sh leave runs."""
    outputs = [Path("outputs"), *(ROOT / folder / "outputs" for folder in EXPERIMENTS)]
    found = [*ckpt.default_runs(), *(folder / ckpt.RUNS for folder in outputs)]
    return list(dict.fromkeys(folder.resolve() for folder in found))


def find(named: list[str], warn: ckpt.Warn) -> list[Entry]:
    """The runs that are named (files, runs' folders, or folders of runs), else all in `places`.

    The newest come first, single files last.
    Raises Exit if a name leads to none, or there is none at all.
    """
    found: list[Entry] = []
    for name in named:
        path = Path(name).expanduser().absolute()
        if name == "latest" and not path.exists():  # as everywhere
            path = ckpt.read_model(name, ckpt.MODEL_TYPES, warn)[0].parent.absolute()
        runs = [] if ckpt.run_checkpoints(path) else ckpt.recorded_runs([path], warn)
        if runs:
            found += _listed(runs, warn)
        else:
            file, state = ckpt.open_checkpoint(path, warn, ckpt.peek_checkpoint)
            found.append(Entry(path if path.is_dir() else file, state))
    if not named:
        found = _listed(ckpt.recorded_runs(places(), warn), warn)
        for file in (ROOT / experiment / READY for experiment in EXPERIMENTS):
            with _passing_over(warn):
                found += [Entry(file, ckpt.peek_checkpoint(file))] if file.is_file() else []
    if not found:
        raise Exit(
            USAGE, f"no runs in {' or '.join(map(str, places()))}: `{MAKES_ONE}` makes one in some minutes, or name one"
        )
    return sorted(found, key=lambda entry: (entry.source.is_dir(), entry.time), reverse=True)


def _listed(runs: list[tuple[Path, ckpt.State]], warn: ckpt.Warn) -> list[Entry]:
    found: list[Entry] = []
    for run in runs:
        with _passing_over(warn):
            found.append(Entry(*run))
    return found


@contextmanager
def _passing_over(warn: ckpt.Warn) -> Iterator[None]:
    """One run that cannot be read, or is of an unknown kind, does not keep the others from being shown."""
    try:
        yield
    except ckpt.UnreadableCheckpoint as error:
        warn(f"passing over {error}")


class Shelf:
    """The runs by the names under which a browser knows them; the networks used last stay in memory.

    Only the worker's thread calls `open`.
    """

    def __init__(
        self, entries: list[Entry], device: str | None, asked_threads: int | str, cache_dir: str | None
    ) -> None:
        self.entries: dict[str, Entry] = {}
        for entry in entries:
            name, count = entry.name, 1
            while name in self.entries:
                count += 1
                name = f"{entry.name}~{count}"
            self.entries[name] = entry
        self.device, self.asked_threads, self.cache_dir = device, asked_threads, cache_dir
        self.classifiers: dict[str, Any] = {}  # by what the data that they learned from are called
        self._opened: OrderedDict[str, tuple[tuple, Opened]] = OrderedDict()

    def described(self) -> list[dict[str, Any]]:
        return [entry.described(name) for name, entry in self.entries.items()]

    def entry(self, name: Any) -> Entry:
        """Raises Refused for a run that was not listed when the server started."""
        if not isinstance(name, str) or name not in self.entries:
            raise Refused("This run is not in the server's list: choose another, or start the server again.")
        return self.entries[name]

    def open(self, name: Any) -> Opened:
        """The run's networks, of its newest epoch. Raises Refused if they cannot be read."""
        entry = self.entry(name)
        try:
            stamp = entry.stamp()
            if name in self._opened and self._opened[name][0] == stamp:
                self._opened.move_to_end(name)
                return self._opened[name][1]
            run = load(entry.source, self.device)
        except (OSError, ValueError) as error:
            raise Refused(f"This run cannot be read: {error}") from None
        entry.model, entry.epoch, entry.flags = run.model, run.epoch, run.flags
        opened = self._opened[name] = (stamp, Opened(run, self._threads(run), entry))
        self._opened.move_to_end(name)
        while len(self._opened) > KEPT:
            self._opened.popitem(last=False)
        return opened[1]

    def _threads(self, run: Diffusion | Autoencoder) -> int:
        """As infer.py chooses them, but one for latents, whose short steps share the cores with a painting browser."""
        import torch

        def fastest() -> int:
            if isinstance(run, Diffusion) and run.autoencoder:
                return 1
            if isinstance(run, Autoencoder):
                return threads.recorded(run.flags)
            if get_device(self.device).type != "cpu":
                return threads.available()
            guidance = DEFAULT_GUIDANCE if run.flags.get("labelled", True) else 1.0
            return threads.fastest(lambda: run.draw(count=FEW, steps=1, guidance=guidance))[0]

        before = torch.get_num_threads()  # of the work between whose steps this may come
        try:
            threads.settle(self.asked_threads, fastest)
            return torch.get_num_threads()
        finally:
            torch.set_num_threads(before)

    def digits(self, opened: Opened) -> Any:
        """The test digits that the run's autoencoder is looked at with: HF_MNIST, from where its training had them.

        Raises Refused if they have changed since, or their file is gone.
        """
        cache, source = self.data_of(opened)
        if is_own(source) and not source.startswith(HUB) and not Path(source).exists():
            raise Refused(
                f"{Path(source).name}, this run's data, is not where its training read it: put it back there."
            )
        flags = opened.run.flags
        try:
            return held_out(source, cache, flags, flags.get("only_digit"))
        except Exit as end:
            if end.code != MODEL_MISMATCH:
                raise
            changed = "The file with this run's data has changed since: there are no images to look at it with."
            raise Refused(changed) from None

    def data_of(self, opened: Opened) -> tuple[Path, str]:
        """(cache folder, "hub", "embedded" or what --data named), where the run's training had its digits.

        Nothing is downloaded: where full MNIST is not at hand, the embedded digits serve. Raises Refused for other data
        that are not at hand.
        """
        flags = opened.run.flags
        recorded = ROOT / opened.entry.experiment / str(flags.get("cache_dir", "hf_cache"))  # may be absolute
        places = [self.cache_dir, recorded, *(ROOT / folder / "hf_cache" for folder in EXPERIMENTS)]
        places = [Path(place) for place in places if place]
        wanted = flags.get("data", AUTO)
        if is_own(wanted):
            name = wanted.removeprefix(HUB)
            kept = [place for place in places if name == wanted or hub_file(name, place).is_file()]
            if not kept:
                raise Refused(f"{name} is in no cache here: fetch it with python -m common.data --data {wanted}.")
            return kept[0], wanted
        full = [place for place in places if has_mnist(place)]
        if wanted != "embedded" and full:
            return full[0], "hub"
        return places[0], "embedded"
