"""How a training starts and how it ends: signals, threads, device, processes, the run, its log, its last words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from common import ckpt, device, ranks, slurm, threads
from common.args import AUTO, Args
from common.console import patient
from common.data import identify_data
from common.error_codes import (
    BAD_CHECKPOINT,
    BAD_OUTPUT,
    MODEL_MISMATCH,
    NO_AE_CHECKPOINT,
    NO_DATA,
    NO_MODEL_SPECIFIED,
    NON_FINITE_LOSS,
    OK,
    OUT_OF_MEMORY,
    STOPPED_EARLY,
    USAGE,
    Exit,
    require,
)
from common.logger_utils import close_handlers, setup_component_logger
from common.progress import counted
from common.record import NoRecord, Record
from common.run import Run, open_run
from common.session import Session
from common.train_state import TrainState

# what is found out only when a run was begun: of one that saved nothing then, nothing is left
IN_VAIN = (
    *(USAGE, MODEL_MISMATCH, NO_MODEL_SPECIFIED, NO_AE_CHECKPOINT, BAD_CHECKPOINT, NO_DATA),
    *(NON_FINITE_LOSS, OUT_OF_MEMORY, BAD_OUTPUT, OK),
)


@contextmanager
def open_session(
    args: Args,
    name: Callable[[Args], str],
    *,
    models: tuple[str, ...],
    identify: Callable[[Args], None] = lambda _: None,
    settle: Callable[[Args], None] = lambda _: None,
) -> Iterator[Session]:
    """Everything around a training run: signals, threads, run folder and lock, log, device, seeds.

    See `common.run.open_run` for `name`, `models`, `identify` and `settle`. Raises Exit, having logged why.
    Of several processes the first finds and holds the run, logs and writes.
    """
    require("torch", "torchvision", "tqdm", "tensorboard", "sklearn", "matplotlib", "PIL")  # imports none
    handlers = slurm.install_signal_handlers()  # before the slow imports
    log = setup_component_logger("train", debug=args.debug)
    run: Run | None = None  # on the first process, which holds it
    with patient() as console:
        try:
            asked = threads.prepare()
            if asked and args.threads == AUTO:
                args.derive("OMP_NUM_THREADS", threads=asked)
            where = device.get_device(args.device, ranks.identity())
            with ranks.joined(args.flags(), where) as world:

                def found() -> tuple[Run, dict[str, Any]]:
                    nonlocal run
                    identify_data(args, log.warning)
                    run = open_run(args, name, models, log.warning, identify, settle)
                    raise_if_finished(args, run, log)
                    settle_shards(args, run, world)
                    return dataclasses.replace(run, lock=None), vars(args)

                theirs, flags = world.first(found)
                vars(args).update(flags)
                record = Record(run, log.warning) if run else NoRecord()
                log = setup_component_logger("train", run and run.log_file, args.debug)
                console.tell(log.warning)
                try:
                    with device.memory_in_one_line(
                        f"choose a smaller --batch-size than {args.batch_size}, or a smaller network"
                    ):
                        yield Session(args, run or theirs, record, where, log, world)
                finally:
                    record.close()
        except Exit as end:
            (log.error if end.code not in (OK, STOPPED_EARLY) else log.info)(str(end))
            if run is not None and end.code in IN_VAIN:
                run.discard_if_empty()
            end.shown = not console.out and not ranks.identity().rank
            raise
        except KeyboardInterrupt:
            log.error("interrupted a second time: leaving at once; what was saved is safe")
            raise
        except Exception:
            log.critical("ended by a bug:", exc_info=True)
            raise
        finally:
            if run is not None:
                run.lock.close()
            close_handlers(log)
            slurm.restore_signal_handlers(handlers)


def raise_if_finished(args: Args, run: Run, log: Any) -> None:
    """Raises Exit(OK) if the run to be resumed has nothing left to train; it stays as it is then.

    But for its links, which a kill may have left behind.
    """
    state = run.state
    if state is None:
        return
    if not ckpt.is_complete(state):
        if state["epoch"] > args.epochs:
            raise Exit(OK, f"{run.name} is already in epoch {state['epoch']}, beyond --epochs {args.epochs}: raise it")
        return
    if end := TrainState.from_checkpoint(state).why_ended(args.flags()):
        log.info(f"checkpoints: {run.source.parent.resolve()}")
        newest = ckpt.newest_readable(run.checkpoints, lambda _: None, ckpt.peek_checkpoint)
        if newest and newest[0] == run.source:
            with suppress(OSError):
                ckpt.relink(run.checkpoints, state)
        more = "; raise --epochs to extend it" if state["epoch"] >= args.epochs else ""
        name = run.name if run.source.parent == run.checkpoints else run.source
        raise Exit(OK, f"{name} is already finished: {end}{more}")


def settle_shards(args: Args, run: Run, world: ranks.World) -> None:
    """--shards, where nobody has said how many: one for each process of a new run; a run from before had one.

    Raises Exit(USAGE) if these processes cannot share them, or the batch is too small.
    """
    if args.shards == AUTO:
        shards = world.size if run.state is None else 1
        args.derive("default" if shards == 1 else "derived", shards=shards)
    if args.shards % world.size:
        raise Exit(
            USAGE,
            f"{counted(world.size, 'process', 'processes')} cannot share {counted(args.shards, 'shard')} equally: "
            f"start a number that divides {args.shards}" + ("" if run.state else f", or give --shards {world.size}"),
        )
    if args.batch_size < args.shards:
        raise Exit(USAGE, f"--batch-size {args.batch_size} is less than a row for each of {args.shards} shards")
