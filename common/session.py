"""The training session: the mechanism behind every train.py, which keeps only its recipe.

    with open_session(args, experiment_name, models=("ddpm",)) as session:  # common.start
        session.attach(net, steps_per_epoch=len(train))
        for epoch in session.epochs():
            for batch in session.batches(train):
                session.step(loss_of, batch, draws_of)
            session.end_epoch(val_loss=session.validate(val, loss_of, draws_of), preview=draw)

`draws_of(batch, rng)` returns what chance has to say about a whole batch, tensors with a row for each of its rows;
`rng` is a CPU generator that belongs to this step alone. `loss_of(net, batch, draws)` returns the mean loss of the rows
that it gets, a scalar, and draws nothing itself: several processes that train together each see a part of the rows.
"""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from common import ckpt, device, emoji, ranks, slurm, threads
from common.args import AUTO, Args
from common.data import HF_MNIST, make_mnist_loader
from common.error_codes import (
    BAD_CHECKPOINT,
    MODEL_MISMATCH,
    NON_FINITE_LOSS,
    OUT_OF_MEMORY,
    RANK_FAILED,
    SAVE_FAILED,
    STOPPED_EARLY,
    Exit,
)
from common.flags import MNIST, OUR_NETWORK
from common.learner import DrawsFn, Learner, LossFn, learning_rate
from common.logger_utils import log_args_rich, setup_component_logger
from common.modules import let_go, network_digest
from common.progress import counted, progress
from common.record import NoRecord, Record
from common.rng import derive_seed, generator
from common.run import Run
from common.train_state import TrainState

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn
    from torch.utils.data import DataLoader

LOOK_EVERY = 50  # steps between looks at the loss on devices that should not wait for it; and TensorBoard's points


def no_draws(_batch: Any, _rng: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Of a loss that leaves nothing to chance."""
    return ()


class Session:
    """Drives one run.

    Attributes for recipes: `args`, `device`, `data_device`, `log`, `epoch`, `net`, `averaged_net`; `resumed` (the state
    that the run goes on from, or None) and `extras` (what the recipe adds to its checkpoints).
    """

    def __init__(
        self, args: Args, run: Run, record: Record | NoRecord, where: torch.device, log: Any, world: ranks.World
    ) -> None:
        self.args, self.run, self.record, self.device, self.log = args, run, record, where, log
        self.world = world
        self.resumed = run.state
        device.seed_everything(args.seed)
        self.at = TrainState()
        self._losses: list[tuple[torch.Tensor, int, int]] = []  # (loss, rows, step) not yet looked at
        self._unsaved, self._saved_at, self._saved_path = False, time.monotonic(), run.source
        self._pace, self._last_step = threads.Pace(), 0.0  # seconds
        self._epoch_began = time.monotonic()
        self.extras: dict[str, Any] = {}  # what the recipe wants in its checkpoints beside the session's own keys
        log.info(f"{emoji.step} {run.name} on {where}, outputs in {run.outdir.resolve()}")
        log_args_rich(log, args)
        if args.amp and where.type != "cuda":
            log.warning(f"--amp needs CUDA; training on {where} in float32")
        if args.given("samples_per_epoch") and not args.generate_images:
            log.warning("--samples-per-epoch says how --generate-images is to look, which is off: no grid is written")

    # --- set-up ---

    @property
    def net(self) -> nn.Module:
        return self.learner.net

    @property
    def averaged_net(self) -> nn.Module:
        """The weights to draw with: the EMA's, where there is one."""
        return self.learner.averaged_net

    @property
    def epoch(self) -> int:
        """The epoch in training, counted from 1."""
        return self.at.epoch

    def rng(self, *purpose: str | int) -> torch.Generator:
        """A CPU generator that is a function of the run's seed and `purpose` alone."""
        return generator(self.args.seed, *purpose)

    def digits(self) -> HF_MNIST:
        """The training digits that the flags ask for. The first process reads them, and hands them to the others.

        Raises Exit(NO_DATA) if they cannot be had, Exit(MODEL_MISMATCH) if they are not what the run began with.
        """
        where, known = (self.args.cache_dir, self.args.only_digit, self.args.data), self.args.dataset

        def read() -> HF_MNIST:
            digits = HF_MNIST("train", *where, warn=self.log.warning)
            if digits.fingerprint != known:
                changed = f"{digits.source} is not what this run began with ({known}), but {digits.fingerprint}"
                raise Exit(MODEL_MISMATCH, f"{changed}: give --data the file as it was, or start a new run")
            return digits

        digits = self.world.first(read)
        if digits.source != self.args.data:
            self.args.derive(data=digits.source)
        self.args.derive(class_counts=digits.class_counts)
        if digits.fingerprint != MNIST:
            self.log.info(f"{len(digits):,} images of {digits.source}; for tests: {digits.held_out}")
        return digits

    @property
    def workers(self) -> int:
        """DataLoader workers. Only a typed --num-workers starts any: for digits in memory they only cost."""
        return self.args.num_workers if self.args.origin["num_workers"] == "flag" else 0

    @property
    def data_device(self) -> torch.device | str:
        """Where the digits are to lie: on the device, but on the CPU where workers gather the batches."""
        return "cpu" if self.workers else self.device

    def loader(self, dataset: Any, batch_size: int, *, shuffle: bool = True) -> DataLoader:
        """Batches of a data set on `data_device`: in random order, by the workers if there are any; or in its own."""
        how = {"seed": self.args.seed, "num_workers": self.workers if shuffle else 0, "device": self.data_device}
        return make_mnist_loader(dataset, batch_size, shuffle=shuffle, **how)

    def attach(self, net: nn.Module, *, steps_per_epoch: int, warmup: int = 0, **options: Any) -> None:
        """Take charge of the network (options: see `Learner`), and restore everything if this run resumes.

        Raises Exit(MODEL_MISMATCH) or Exit(BAD_CHECKPOINT) if what it resumes from does not fit.
        """
        if self.resumed and self.resumed["global_step"] and self.args.threads == AUTO:  # saved before it was recorded
            before = self.world.first(self.record.last_start)
            self.args.derive("checkpoint", threads=before.get("threads", AUTO))
        if self.device.type != "cpu" and self.args.threads == AUTO:
            self.args.derive(threads=threads.available())
        if self.args.threads != AUTO and self.args.threads > (cores := threads.available()):
            wanted = f"the run takes {self.args.threads} threads, and here are {cores} cores"
            self.log.warning(f"{wanted}: its last bits may differ")
        if getattr(self.args, "network", OUR_NETWORK) != OUR_NETWORK:
            self.args.derive(network_digest=network_digest(self.args.model, self.args.network))
        if self.args.shards > 1 and any(getattr(module, "running_mean", None) is not None for module in net.modules()):
            text = "a batch norm's running statistics would differ between processes: --shards 1, or another norm"
            raise Exit(MODEL_MISMATCH, text, everywhere=True)
        self.record.start(self.args, self.device)  # here, because the recipe has settled its flags
        args, total = self.args, self.args.epochs * steps_per_epoch
        self.steps_per_epoch = steps_per_epoch
        self.learner = Learner(
            net,
            self.device,
            lr_at=lambda step: learning_rate(step, total, args.lr, args.lr_scheduler, warmup),
            grad_clip=args.grad_clip,
            amp=args.amp and self.device.type == "cuda",
            shards=args.shards,
            world=self.world,
            **options,
        )
        parameters = sum(parameter.numel() for parameter in self.learner.parameters)
        self.log.info(f"{counted(parameters, 'parameter')}, {counted(steps_per_epoch, 'step')} an epoch")
        if self.resumed is not None:
            self._restore(self.resumed)
        self._compare_weights()
        self._began_at = self.at.global_step
        self.record.rewind()  # only now: a start that fails before it could train has cut nothing
        if not self.world.rank:
            setup_component_logger("train", self.run.log_file, self.args.debug)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.learner.load_state_dict(state)
        except RuntimeError as error:
            raise ckpt.of_another_network(self.run.source, state, error) from None
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise Exit(BAD_CHECKPOINT, f"{self.run.source}: does not fit this network ({reason})") from None
        self.at = TrainState.from_checkpoint(state)
        self.world.first(lambda: self._tidy(state))
        planned = state["args"]["epochs"]
        if planned != self.args.epochs and self.args.lr_scheduler != "none":
            self.log.info(f"--epochs {planned} -> {self.args.epochs}: the {self.args.lr_scheduler} curve is re-drawn")
        where = "complete" if ckpt.is_complete(state) else f"batch {self.at.batch}/{self.steps_per_epoch}"
        self.log.info(f"{emoji.ok} resumed from {self.run.source} (epoch {self.epoch}, {where})")
        if ckpt.is_complete(state):
            self.at = self.at.next_epoch()

    def _tidy(self, state: dict[str, Any]) -> None:
        for path in ckpt.set_aside(self.run.checkpoints, after=self.epoch):
            self.log.warning(f"set aside a checkpoint of a later epoch as {path.name}")
        with contextlib.suppress(OSError):  # the next save links anew
            ckpt.relink(self.run.checkpoints, state)

    # --- several processes ---

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What work() returns: the first process does it, the others wait, and take part in every `poll` in it."""
        return self.world.first_at_length(work, self._agree)

    def _agree(self, over: bool = False) -> bool:
        """The one decision of all processes: leave, if a signal asked any of them for it; save, if it is time.

        over: the first process says that what it does alone is done; returns whether it said so. Raises
        Exit(STOPPED_EARLY).
        """
        due = self._unsaved and time.monotonic() - self._saved_at >= self.args.ckpt_every_sec
        rows = self.world.numbers([slurm.stop_requested(), int(due), int(over)])
        if rows[0][2]:
            return True
        if asked := max(row[0] for row in rows):
            if self._unsaved or self._saved_path is None:
                self._save(final=True)
            if not self.world.rank:
                slurm.report("stopped")
            raise Exit(
                STOPPED_EARLY,
                f"stopped by {signal.Signals(asked).name} in epoch {self.epoch} after "
                f"{counted(self.at.batch, 'batch', 'batches')} and saved; "
                f"go on with: {self.args.resume_command(self._saved_path)}",
                everywhere=True,
            )
        if rows[0][1]:
            self._save()
        return False

    def _compare_weights(self) -> None:
        """Raises Exit(RANK_FAILED) if the processes do not hold the same weights."""
        if self.world.size > 1:
            digests = self.world.all(ckpt.weights_digest(self.net.state_dict()))
            if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
                which = ", ".join(map(str, others))
                raise Exit(
                    RANK_FAILED,
                    f"the weights of process {which} are not those of process 0 in epoch {self.epoch}, step "
                    f"{self.at.global_step}: not saved. Are the machines, threads and libraries of all the same?",
                    everywhere=True,
                )

    # --- the loop ---

    def epochs(self) -> Iterator[int]:
        """The epochs still to be trained, counted from 1; after the last one, what a finished run leaves behind."""
        while True:
            self._epoch_began = time.monotonic()
            yield self.epoch
            if end := self.at.why_ended(self.args.flags()):
                break
            self.at = self.at.next_epoch()
        self.log.info(f"the end: {end}")
        if self._unsaved:
            self._save(final=True)
        best = self.at.best
        self.record.hyperparameters(self.args, {"hparam/best_val_loss": best["val_loss"]}, self.at.global_step)
        self.log.info(f"{emoji.ok} best val_loss {best['val_loss']:.6f} in epoch {best['epoch']}")
        self.log.info(f"checkpoints: {self.run.checkpoints.resolve()}")

    def batches(self, loader: DataLoader) -> Iterator[Any]:
        """The epoch's batches from where it stands, on the device; between them, saves when due and obeys stops.

        Raises Exit(STOPPED_EARLY), and Exit(OUT_OF_MEMORY) if a worker finds no room.
        """
        loader.sampler.epoch, loader.sampler.start = self.epoch, self.at.batch
        loader.generator.manual_seed(derive_seed(self.args.seed, "workers", self.epoch))
        self.net.train()
        if self.args.threads != AUTO:
            threads.use(self.args.threads)
        began = time.monotonic()
        device.check_shared_memory(loader.num_workers)
        with slurm.signals_held():  # DataLoader workers start here
            batches = self._begun(loader)
        title = f"epoch {self.epoch}/{self.args.epochs}"
        done = self.steps_per_epoch - len(loader.sampler)
        lost = (ConnectionError, EOFError, FileNotFoundError) if loader.num_workers else ()  # with a worker, its batch
        try:
            with progress(title, self.steps_per_epoch, "batch", self.log.info, done=done, more=self._mean_loss) as tick:
                for batch in batches:
                    yield _to(batch, self.device)
                    self._last_step = time.monotonic() - began
                    self.at.seconds += self._last_step
                    tick()
                    self.poll()  # which may save, at length
                    began = time.monotonic()
        except lost:
            raise device.no_room("a worker was killed") from None
        finally:
            if loader.num_workers:  # an error's traceback would keep them, and Python wait for them when it ends
                batches._shutdown_workers()

    def _begun(self, loader: DataLoader) -> Iterator[Any]:
        try:
            return iter(loader)
        except OSError as error:
            raise device.no_room(f"that cannot be used ({error.strerror or error})") from None

    def _mean_loss(self) -> str:
        return f", mean loss so far {self.at.train_loss:.6f}"

    def step(self, loss_of: LossFn, batch: Any, draws_of: DrawsFn = no_draws) -> None:
        """Learn one batch. Raises Exit(NON_FINITE_LOSS) before a bad loss could reach a checkpoint.

        On the CPU it does so at once, before the weights change. To ask another device for the loss would make the host
        wait for it: there the losses of many steps are looked at together, and before every save.
        """

        rows, number = _rows(batch), self.at.global_step
        draws = draws_of(batch, self.rng("train", number))
        if self.args.threads == AUTO:
            self._choose_threads(loss_of, batch, draws)
        elif (
            self.at.batch and self.device.type == "cpu" and self.args.threads > 1 and self._pace.slowed(self._last_step)
        ):
            self._say_that_it_is_busy(loss_of, batch, draws)
        loss = self.learner.gradient(self._loss_of_shard(self.learner, loss_of, batch, draws), rows)
        self._losses.append((loss, rows, number))
        if self.device.type == "cpu":
            self._look_at_losses()
        lr = self.learner.step(number)
        if self.at.global_step % LOOK_EVERY == 1:  # no number of steps above one makes all of these an epoch's first
            self._look_at_losses()
            if self.at.batch:  # at the step's own index: below any purge_step
                self.record.scalars({"loss/step": self._last_loss, "lr": lr}, self.at.global_step)
        self.at.global_step += 1
        self.at.batch += 1
        self._unsaved = True

    def _loss_of_shard(self, learner: Learner, loss_of: LossFn, batch: Any, draws: Any) -> Callable:
        """See `Learner.gradient`."""
        import torch

        reseed = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed

        def loss_of_shard(shard: int, rows: slice) -> torch.Tensor:
            which = (shard,) if shard else ()
            reseed(derive_seed(self.args.seed, "step", self.at.global_step, *which))  # for layers that draw: dropout
            with learner.autocast():
                return loss_of(
                    learner.net, *(_to([part[rows] for part in parts], self.device) for parts in (batch, draws))
                )

        return loss_of_shard

    def _look_at_losses(self) -> None:
        """Bring the losses since the last look to the host, all at once, and add them up.

        Raises Exit(NON_FINITE_LOSS) if one is NaN or infinite.
        """
        losses, self._losses = self._losses, []
        values = _to_host([loss for loss, _, _ in losses])
        for value, (_, rows, step) in zip(values, losses, strict=True):
            if not math.isfinite(value):
                raise Exit(
                    NON_FINITE_LOSS,
                    f"the loss became {value} in epoch {self.epoch}, step {step}; nothing of it was saved. "
                    + (f"Resume from {self._saved_path}" if self._saved_path else "Start again")
                    + " with a smaller --lr",
                    everywhere=True,
                )
            self.at.loss_sum += value * rows
            self.at.loss_rows += rows
            self._last_loss = value

    def _real_step(self, loss_of: LossFn, batch: Any, draws: Any) -> Callable[[], None]:
        """A function that learns this process's part of the batch as `step` does, but changes copies of the weights."""
        let_go(self.net)
        learner = copy.deepcopy(self.learner)
        learner.world, learner.shards = ranks.World(), self.args.shards // self.world.size
        loss_of_shard = self._loss_of_shard(learner, loss_of, batch, draws)

        def work() -> None:
            learner.gradient(loss_of_shard, max(1, _rows(batch) // self.world.size))
            learner.step(self.at.global_step)

        return work

    def _choose_threads(self, loss_of: LossFn, batch: Any, draws: Any) -> None:
        """At the run's first step, for all of it: the number of threads that is fastest as this machine now is.

        Several processes try at the same time, and take the first one's number: it must be the same for all.
        """
        count, seconds = self.world.all(threads.fastest(self._real_step(loss_of, batch, draws)))[0]
        threads.use(count)
        self.args.derive(threads=count)
        self.record.amend(self.args)
        self._pace = threads.Pace(seconds[count])
        rates = ", ".join(f"{_rows(batch) / took:,.0f} with {number}" for number, took in seconds.items())
        cores = threads.available()
        self.log.info(f"threads: {count} of {cores} (images/s in a trial: {rates}); --threads N overrides")

    def _say_that_it_is_busy(self, loss_of: LossFn, batch: Any, draws: Any) -> None:
        """What a single thread would bring, now that steps have become slow; the run keeps its number, and its bits."""
        work, count, before = self._real_step(loss_of, batch, draws), self.args.threads, self._pace.usual
        now, one = (threads.trial(work, number) for number in (count, 1))
        threads.use(count)
        rates = (f"{_rows(batch) / took:,.0f}" for took in (before, now, one))
        self.log.warning(
            "this machine is busy: {} images/s became {} with {count} threads; 1 thread would make {} "
            "(stop, and resume with --threads 1: only the last bits change)".format(*rates, count=count)
        )

    def validate(self, loader: DataLoader, loss_of: LossFn, draws_of: DrawsFn = no_draws) -> float:
        """Mean loss per row over `loader`, with the weights that are drawn with; the same noise every epoch.

        Several processes each take every so manieth batch; the losses are added up as one process would.

        Raises Exit(NON_FINITE_LOSS) if it is NaN or infinite.
        """
        import torch

        net, losses, sizes, total = self.averaged_net, [], [], 0.0
        net.eval()
        with torch.no_grad(), self.learner.autocast():
            for index, batch in enumerate(loader):
                sizes.append(_rows(batch))
                if index % self.world.size == 0:
                    self.poll()
                if index % self.world.size == self.world.rank:
                    draws = draws_of(batch, self.rng("validation", index))
                    losses.append(loss_of(net, *(_to(parts, self.device) for parts in (batch, draws))))
        everyones = self.world.all(_to_host(losses))
        for index, rows in enumerate(sizes):
            total += everyones[index % self.world.size][index // self.world.size] * rows
        if not math.isfinite(total):
            why = f"the validation loss became {total} in epoch {self.epoch}; not saved"
            raise Exit(NON_FINITE_LOSS, why, everywhere=True)
        return total / sum(sizes)

    def poll(self, *_: Any) -> None:
        """A safe point: save if --ckpt-every-sec has passed, and leave if a signal asked for it.

        Takes and ignores arguments, so that it can be a sampling callback. Raises Exit(STOPPED_EARLY).
        """
        self._agree()

    def end_epoch(
        self,
        val_loss: float,
        preview: Callable[[], torch.Tensor] | None = None,
        scalars: dict[str, Any] | None = None,
    ) -> None:
        """Close the epoch: pictures, best, log line, TensorBoard, checkpoint.

        The order matters: until the checkpoint at the end, whatever interrupts this repeats it as a whole.

        preview() returns images (N, C, H, W) in [0, 1]; it is called with --generate-images. scalars: more figures
        for TensorBoard, metrics.jsonl and the checkpoint's `scores`.
        Raises Exit(NON_FINITE_LOSS) if a loss or a weight is NaN or infinite.
        """
        self._look_at_losses()
        self.world.first(self._hold_if_possible)
        if preview is not None and self.args.generate_images:
            try:
                self.on_first(lambda: self._show(preview))
            except Exit as end:
                if end.code == OUT_OF_MEMORY:  # what was trained is not lost for a picture
                    self._save(final=True)
                raise
        at = self.at
        at.val_loss, at.scores = val_loss, scalars or {}
        if at.best is None or val_loss < at.best["val_loss"]:
            at.best = {"val_loss": val_loss, "epoch": at.epoch}
        row = {
            "epoch": at.epoch,
            "global_step": at.global_step,
            "train_loss": at.train_loss,
            "val_loss": val_loss,
            "lr": self.learner.lr_at(at.global_step),
            "images_per_second": at.loss_rows / at.seconds if at.seconds else 0.0,
            "seconds": at.seconds,
            **at.scores,
        }
        star = "*" if at.best["epoch"] == at.epoch else " "
        # as long as this one took, with its validation and pictures, or with what an earlier start did of it
        left = (self.args.epochs - at.epoch) * max(at.seconds, time.monotonic() - self._epoch_began)
        self.log.info(
            f"epoch {at.epoch:>3}/{self.args.epochs}  train_loss {at.train_loss:.6f}  "
            f"val_loss {val_loss:.6f}{star} lr {row['lr']:.2e}  "
            f"{row['images_per_second']:,.0f} images/s  {at.seconds:.1f} s{_left(left)}"
        )
        self.record.epoch(row | {"timestamp": _now()}, at.global_step)
        self._unsaved = True
        self._save()

    def _show(self, preview: Callable[[], torch.Tensor]) -> None:
        with device.memory_in_one_line("fewer --samples-per-epoch, or none: --no-generate-images"):
            self.record.images(preview(), self.epoch, self.at.global_step)

    # --- checkpoints ---

    def checkpoint(self) -> dict[str, Any]:
        """The whole state of the run: see common/ckpt.py for the keys."""
        return {
            "format": ckpt.FORMAT,
            "exp_name": self.run.name,
            "timestamp": _now(),
            "args": self.args.flags(),
            **self.at.to_checkpoint(),
            **self.learner.state_dict(),
            **self.extras,
        }

    def _save(self, final: bool = False) -> None:
        """Save; a failure is logged and retried at the next occasion, or ends the run if this is the `final` one.

        Raises Exit(NON_FINITE_LOSS) if a loss or a weight is NaN or infinite.
        """
        self._look_at_losses()
        if not self.learner.is_finite():
            message = (
                f"the weights became NaN or infinite in epoch {self.epoch}; not saved, earlier checkpoints are whole"
            )
            raise Exit(NON_FINITE_LOSS, message, everywhere=True)
        self._compare_weights()
        self._saved_at = time.monotonic()
        try:
            self._saved_path = self.world.first(self._write)
        except OSError as error:
            if final:
                message = f"cannot save the end of the run ({error}); earlier checkpoints are whole"
                raise Exit(SAVE_FAILED, message, everywhere=True) from None
            self.log.error(f"cannot save a checkpoint ({error}); earlier ones are whole, training goes on")
            return
        self._unsaved = False

    def _write(self) -> Path:
        self._hold()
        self.record.flush()
        path = ckpt.save_checkpoint_and_link_latest(self.run.checkpoints, self.checkpoint())
        best = self.at.best["epoch"] if self.at.best else None
        every, last = self.args.ckpt_save_every, self.args.keep_ckpts or None
        ckpt.prune(self.run.checkpoints, keep_every=every, keep_last=last, best_epoch=best)
        if self.at.global_step > self._began_at:
            slurm.report("trained")
        if self.run.lock_again():  # deleted just now; if the folder was, this raises, and nothing counts as saved
            self.record.config_again()
        self.log.debug(f"saved {path}")
        return path

    def _hold(self) -> None:
        """See `Run.hold`."""
        if self.run.hold((self.epoch, self.at.global_step), self.log.warning):
            self.log.warning(f"{self.run.checkpoints} was deleted, or its lock was: it is held again")
            self.record.config_again()

    def _hold_if_possible(self) -> None:
        with contextlib.suppress(OSError):  # of which the next save tells
            self._hold()


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _to(batch: Any, where: torch.device) -> Any:
    return [device.move(tensor, where) for tensor in batch]


def _to_host(losses: list[torch.Tensor]) -> list[float]:
    """The numbers in scalar tensors, in a single transfer."""
    import torch

    return torch.stack(losses).tolist() if losses else []


def _left(seconds: float) -> str:
    """For the end of a line, ", 3 min left"; nothing where nothing is left."""
    if seconds <= 0:
        return ""
    return f", {seconds:.0f} s left" if seconds < 90 else f", {seconds / 60:.0f} min left"


def _rows(batch: Any) -> int:
    return len(batch[0])
