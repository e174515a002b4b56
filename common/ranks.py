"""Several processes that train one run, or draw together: who they are, and all that they say to each other.

torchrun or srun starts them, torch.distributed connects them. A process that was started alone is a world of size 1,
in which nothing is sent: it takes the same path.

What makes weights independent of how many processes there are: a batch is cut into shards by position, each shard's
gradient is computed by itself, and they are added up in the order of the shards (`World.sum_in_order`). Which process
computed which shard then leaves no trace.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from common import emoji
from common.error_codes import NO_DEVICE, RANK_FAILED, USAGE, Exit
from common.network import interface_to_others

if TYPE_CHECKING:
    import torch

PATIENCE = 300  # seconds to wait for another process
MOST_PATIENCE = 10**6
INTERFACE = "GLOO_SOCKET_IFNAME"  # torch's variable: by which network interface processes speak

OF_A_MACHINE = ("cache_dir", "debug", "device", "logdir", "num_workers", "threads")  # flags that may differ


class Identity(NamedTuple):
    """Which process this is: `rank` of `size`; on its machine, `local` of `local_size`."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1


ALONE = Identity()


def identity() -> Identity:
    """As the launcher's variables tell: torchrun's, or Slurm's in a step of several tasks; else a process alone.

    What is no number in them tells nothing.
    """
    env, me = os.environ, ALONE
    # a batch script has most of these variables too, but it is no step of several tasks
    tasks, rank, local = (_number(f"SLURM_{name}") for name in ("STEP_NUM_TASKS", "PROCID", "LOCALID"))
    if (tasks or 1) > 1 and rank is not None and local is not None:
        local_sizes = _per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "")) or [1]
        here = local_sizes[min(_number("SLURM_NODEID") or 0, len(local_sizes) - 1)]
        me = Identity(rank, tasks, local, here)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, *at_home = map(_number, names)
    if rank is not None and size and _number("MASTER_PORT") is not None and env.get("MASTER_ADDR"):
        me = Identity(*(known if it is None else it for it, known in zip((rank, size, *at_home), me, strict=True)))
    return me


def _number(name: str) -> int | None:
    """The environment's variable, None if it is not set, or no number."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def patience() -> int:
    """Seconds to wait for another process: $DDPM_RANK_PATIENCE, else PATIENCE. Raises Exit(USAGE) if it is none."""
    name = "DDPM_RANK_PATIENCE"
    seconds = _number(name) if os.environ.get(name) else PATIENCE
    if seconds is None or not 0 < seconds <= MOST_PATIENCE:
        said = os.environ[name]
        raise Exit(USAGE, f"${name} is {said!r}, which is no whole number of seconds from 1 to {MOST_PATIENCE:,}")
    return seconds


def _per_node(text: str) -> list[int]:
    """Slurm's short form, "2(x3),1" -> [2, 2, 2, 1]."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in pairs for _ in range(int(times or 1))]


def _meeting_point() -> tuple[str, int]:
    """(host, port) where the processes of a Slurm step meet: its first node, and a port from the job's number.

    Raises Exit(RANK_FAILED) if Slurm does not tell.
    """
    env = os.environ
    nodes, host = env.get("SLURM_STEP_NODELIST", ""), "127.0.0.1"
    if (_number("SLURM_STEP_NUM_NODES") or 1) > 1:
        command = ["scontrol", "show", "hostnames", nodes]
        try:
            host = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            why = f"`{' '.join(command)}` does not tell the first of several nodes ({error})"
            raise Exit(RANK_FAILED, f"{why}: set MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE") from None
    job, step = (_number(name) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    number = job * 8 + step  # steps of one job may run side by side
    return host, 20_000 + number % 10_000


@contextmanager
def joined(flags: dict[str, Any], where: torch.device | None = None) -> Iterator[World]:
    """The processes of this run, connected until the end of the block. where: they train, and gradients lie there.

    flags: what this process was told, by name.

    Raises Exit(RANK_FAILED) if they do not find each other, Exit(NO_DEVICE) if they cannot train there together,
    Exit(USAGE) if they have not the same flags.
    """
    me = identity()
    if me.rank >= me.size:
        raise Exit(RANK_FAILED, f"RANK is {me.rank} and WORLD_SIZE {me.size}: ranks count from 0")
    if me.size == 1:
        _refuse_half_a_launcher()
        yield World(me)
        return
    from torch import distributed

    if where is not None and where.type == "mps":
        raise Exit(NO_DEVICE, "several processes cannot train on MPS: start one, or give --device cpu")
    port = _number("MASTER_PORT")
    if port is not None and not 0 < port < 2**16:
        raise Exit(RANK_FAILED, f"MASTER_PORT is {port}, which is no port: give one up to 65535")
    if not os.environ.get("MASTER_ADDR") or port is None:
        host, port = _meeting_point()
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = timedelta(seconds=patience())
    near = me.size == me.local_size or os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost")
    apart = "" if near else f" (${INTERFACE} names the network between their machines)"
    with _found(f"the {me.size} processes of this run do not find each other at {place}{apart}"):
        store = next(distributed.rendezvous("env://", me.rank, me.size, timeout=limit))[0]
        if me.size == me.local_size:  # torchrun starts processes again beside a store that still knows the dead ones
            store = distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        elif found := interface_to_others(store, me.rank, me.size, os.environ["MASTER_ADDR"]):
            os.environ[INTERFACE] = os.environ.get(INTERFACE) or found
        # decisions are words between hosts; only gradients need to go from device to device
        distributed.init_process_group("gloo", store=store, rank=me.rank, world_size=me.size, timeout=limit)
    world = World(me)
    try:
        world.compare_flags(flags)
        if where is not None and where.type == "cuda":
            world.meet_on(where)
        yield world
        world.leave()
    except Exit as end:
        if end.everywhere:
            world.leave()
        raise
    finally:
        distributed.destroy_process_group()


def _refuse_half_a_launcher() -> None:
    """Raises Exit(RANK_FAILED) where torchrun's variables speak of others but do not tell all: each would train alone.

    RANK by itself may be another program's; and a job's script may export the others for its srun, which is told of
    ranks by Slurm.
    """
    said = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    of_others = said["WORLD_SIZE"] or (said["RANK"] and said["MASTER_ADDR"])
    of_job = os.environ.get("SLURM_JOB_ID") and not said["RANK"]
    if of_others and said["WORLD_SIZE"] != "1" and not of_job:
        told = " ".join(f"{name}={value}" for name, value in said.items())
        raise Exit(
            RANK_FAILED,
            f"{told}: the variables of a launcher, but not all of them, or not as numbers. Set them all, as torchrun "
            "does, or unset RANK and WORLD_SIZE to start alone",
        )


@contextmanager
def _found(what: str) -> Iterator[None]:
    """`_in_touch` for the beginning, in which gloo waits without end for one that cannot reach this process."""

    seconds = 2 * patience()  # once to meet, once to connect

    def give_up() -> None:
        rank = identity().rank
        who = f"process {rank}: " if rank else ""
        print(f"{emoji.error} {who}{_lost(what, 'does not answer', seconds)}", file=sys.stderr, flush=True)
        os._exit(RANK_FAILED)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        with _in_touch(what):
            yield
    finally:
        timer.cancel()


@contextmanager
def _in_touch(what: str) -> Iterator[None]:
    """What torch.distributed raises when a process is gone, or does not answer, becomes Exit(RANK_FAILED)."""
    try:
        yield
    except RuntimeError as error:
        reason = "does not answer" if "imed out" in str(error) or "imeout" in str(error) else "is gone"
        raise Exit(RANK_FAILED, _lost(what, reason, patience())) from None


def _lost(what: str, reason: str, seconds: int) -> str:
    cure = "What was saved is safe: a training goes on with --auto-resume"
    return f"{what}: one {reason} ({seconds} s are waited). {cure}"


class World:
    """The processes of a run. All of them call each method at the same point; a world of size 1 sends nothing."""

    def __init__(self, me: Identity = ALONE) -> None:
        self.rank, self.size = me.rank, me.size
        self._gradients: Any = None  # the group for them; None: the one for all else

    def compare_flags(self, flags: dict[str, Any]) -> None:
        """Raises Exit(USAGE) if another process has other flags: it would do what the first was told to."""
        first, *others = self.all({name: str(value) for name, value in flags.items() if name not in OF_A_MACHINE})
        for rank, theirs in enumerate(others, 1):
            if (name := next((name for name in first if theirs.get(name) != first[name]), None)) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise Exit(
                    USAGE,
                    f"process {rank} has {flag} {theirs.get(name)}, process 0 {flag} {first[name]}, but processes that "
                    "start together share one run. For a run each: a job array, or srun --ntasks=1 --exact for each",
                    everywhere=True,
                )

    def meet_on(self, gpu: torch.device) -> None:
        """Exchange gradients from GPU to GPU from now on. Raises Exit(NO_DEVICE) if two processes have the same one."""
        import torch
        from torch import distributed

        torch.cuda.set_device(gpu)
        chip = torch.cuda.get_device_properties(gpu)
        chips = self.all((os.uname().nodename, str(getattr(chip, "uuid", gpu))))
        if len(set(chips)) < self.size:
            few = f"{self.size} processes have {len(set(chips))} CUDA device(s)"
            raise Exit(NO_DEVICE, f"{few}: start one for each, or give --device cpu", everywhere=True)
        with _in_touch("another process of this run"):
            self._gradients = distributed.new_group(backend="nccl", timeout=timedelta(seconds=patience()))

    def mine(self, shards: int) -> range:
        """Which of so many shards this process computes."""
        each = shards // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def all(self, value: Any) -> list[Any]:
        """Every process's `value` (small and picklable), in the order of the ranks."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values = [None] * self.size
        with _in_touch("another process of this run"):
            distributed.all_gather_object(values, value)
        return values

    def numbers(self, row: list[int]) -> list[list[int]]:
        """Every process's row of whole numbers; as `all`, but quick enough to be asked at every step."""
        if self.size == 1:
            return [row]
        import torch
        from torch import distributed

        mine = torch.tensor(row)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        with _in_touch("another process of this run"):
            distributed.all_gather(rows, mine)
        return [row.tolist() for row in rows]

    def first(self, work: Callable[[], Any]) -> Any:
        """What work() returns on the first process, which alone runs it. Its Exit or OSError is raised everywhere."""
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told = [work(), None]
            except (Exit, OSError) as error:
                if isinstance(error, Exit):
                    error.everywhere = True
                if self.size == 1:
                    raise
                told = [None, error]
        if self.size > 1:
            from torch import distributed

            with _in_touch("another process of this run"):
                distributed.broadcast_object_list(told, 0)
        value, error = told
        if error is not None:
            raise error
        return value

    def first_at_length(self, work: Callable[[], Any], agree: Callable[[bool], bool] | None = None) -> Any:
        """As `first`, for work that may outlast the others' patience: it calls agree(False) now and then.

        So do the others, as long as agree returns false; when it is over all are told by agree(True). agree: what they
        say to each other meanwhile, if more than `is_over` does.
        """
        speaking, agree = agree is not None, agree or self.is_over
        if self.rank:
            while not agree(False):
                pass
            return self.first(work)

        def done() -> Any:
            if failed is not None:
                raise failed
            return result

        result = failed = None
        try:
            result = work()
        except (Exit, OSError) as error:
            if speaking and getattr(error, "everywhere", False):  # raised by an agree, in which the others took part
                raise
            failed = error
        agree(True)
        return self.first(done)

    def is_over(self, over: bool = False) -> bool:
        """Does the first process say that what it does alone is over?"""
        return bool(self.numbers([int(over)])[0][0])

    def sum_in_order(self, parts: torch.Tensor) -> torch.Tensor:
        """(shards of this process, P) -> (P,): the sum over all shards of all processes, ((s0 + s1) + s2) + ...

        The order of additions, and with it the rounding, is that of the shards, whatever the number of processes. Each
        process adds up its part of the P numbers for all shards, then they exchange the sums.
        """
        import torch
        from torch import distributed

        count, length = parts.shape
        if self.size > 1:
            width = -(-length // self.size)
            parts = torch.nn.functional.pad(parts, (0, width * self.size - length))
            sent = parts.view(count, self.size, width).transpose(0, 1).contiguous()  # (to each process, shards, width)
            parts = torch.empty_like(sent)
            with _in_touch("another process of this run"):
                distributed.all_to_all_single(parts, sent, group=self._gradients)
            parts = parts.view(self.size * count, width)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        if self.size == 1:
            return total
        totals = [torch.empty_like(total) for _ in range(self.size)]
        with _in_touch("another process of this run"):
            distributed.all_gather(totals, total, group=self._gradients)
        return torch.cat(totals)[:length]

    def leave(self) -> None:
        """Wait until all are ready to leave: launchers take a process that ends early for a reason to kill the rest."""
        if self.size > 1:
            with suppress(Exit):
                self.numbers([0])
