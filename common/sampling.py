"""The reverse process, from noise to data, for tensors of any shape: samplers, guidance, and their one loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count as counting
from numbers import Integral, Real
from typing import Any, NamedTuple, TypedDict

import numpy
import torch
from torch import nn

from common.device import move
from common.diffusion import Schedules, half_log_snr, null_label_of, predictor_of, takes_labels
from common.flags import DEFAULT_GUIDE_SCALE, MOST_PASSES, SAMPLERS, default_steps, timesteps_left
from common.ranks import World
from common.rng import generator

LAST_SNR = 2.2  # log(signal / noise) from which "dpm…" goes to x_0 at once: timestep 30 of the default schedule
STRETCHES = 10  # of the way, that resampling goes several times each
PART = 256  # rows that go through a net at once when drawing, whoever draws them; more are slower on a CPU
# watch(steps_left, x_t, the x_0 that is predicted from it, to_images): to show how a drawing comes about
Watch = Callable[[int, torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], None]


class Drawing(TypedDict, total=False):
    """What a model's `generate_images` hands on to `draw`, which says what each means."""

    labels: Iterable[int] | torch.Tensor | None
    count: int
    guidance: float
    guidance_interval: tuple[float, float] | None
    guide: nn.Module | None
    guide_scale: float
    seed: int
    sampler: str
    steps: int | None
    callback: Callable[[int, torch.Tensor], None] | None
    watch: Watch | None
    frames: dict[int, torch.Tensor] | None
    world: World | None
    from_image: torch.Tensor | None
    strength: float
    inpaint: torch.Tensor | None
    resample: int


class ReverseStep(NamedTuple):
    """x_{next} = x_scale * x_t + epsilon_scale * epsilon + noise_scale * z + change_scale * (x_0 - previous x_0).

    From timestep t, where x_0 is predicted as (x_t - noise * epsilon) / signal; the previous x_0 is that of the step
    before. Where back_scale is below 1, x_{next} is then noised again: back_scale * x + sqrt(1 - back_scale^2) * z.
    """

    t: int
    x_scale: float
    epsilon_scale: float
    noise_scale: float
    change_scale: float
    signal: float
    noise: float
    back_scale: float = 1.0

    @property
    def next_signal(self) -> float:
        """sqrt(alpha_bar) where the step leads: 1 after the last."""
        return min(self.x_scale * self.signal, 1.0)


def _evenly_spaced(alpha_bar: torch.Tensor, steps: int, sampler: str) -> torch.Tensor:
    """(steps,) int64: distinct timesteps, falling from T - 1, even in t; for "dpm…" in log-SNR, up to LAST_SNR."""
    T = len(alpha_bar)
    if not sampler.startswith("dpm"):
        return torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long()
    snr = half_log_snr(alpha_bar)  # (T,)
    wanted = torch.linspace(snr[-1], snr[0].clamp(max=LAST_SNR).clamp(min=snr[-1]), steps, dtype=torch.float64)
    nearest = (wanted[:, None] - snr).abs().argmin(dim=1).flip(0)  # rising
    places = torch.arange(steps)
    return ((nearest - places).cummax(0).values.clamp(max=T - steps) + places).flip(0)  # each at least 1 apart


def reverse_steps(schedules: Schedules, steps: int | None = None, sampler: str = "ddpm") -> list[ReverseStep]:
    """The reverse process as coefficients, from the noisiest step to the last.

    "ddpm" is ancestral sampling with the posterior variance beta_tilde (Ho et al. 2020, equations 6, 7 and 11; their
    first choice of sigma is beta, the other extreme); "ddim" is deterministic (Song et al. 2021, equation 12, with
    eta 0; eta 1 is "ddpm"); "dpm" is DPM-Solver++(2M) and "dpm-sde" SDE-DPM-Solver++(2M) (Lu et al. 2022b,
    algorithm 2 and its counterpart for SDEs): "ddim" and "ddpm" with a term of second order. `steps` (default: see
    `default_steps`) below T visits that many timesteps, evenly spaced in t, for these two in log-SNR. The last step
    adds no noise, and is of first order: it leads to the predicted x_0. Raises ValueError for an unknown sampler, or
    steps that are not from 1 to T.
    """
    T = schedules.T
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {SAMPLERS}, not {sampler!r}")
    steps = default_steps(sampler, T) if steps is None else steps
    if not isinstance(steps, Integral) or not 1 <= steps <= T:
        raise ValueError(f"steps must be a whole number from 1 to T = {T}, not {steps}")
    alpha_bar = schedules.exact_alpha_bar
    visited = _evenly_spaced(alpha_bar, int(steps), sampler)
    now = alpha_bar[visited]
    before = torch.cat([alpha_bar[visited[1:]], torch.ones(1, dtype=torch.float64)])  # alpha_bar of the next stop
    variance = (1 - before) / (1 - now) * (1 - now / before) * (sampler in ("ddpm", "dpm-sde"))
    x_scale = (before / now).sqrt()
    epsilon_scale = (1 - before - variance).clamp(min=0).sqrt() - x_scale * (1 - now).sqrt()
    change_scale = torch.zeros_like(now)
    if sampler.startswith("dpm"):
        h = half_log_snr(now).diff()  # (steps - 1,)
        x_0_scale = -epsilon_scale * (now / (1 - now)).sqrt()  # of the step of first order, written with x_t and x_0
        change_scale[1:-1] = x_0_scale[1:-1] * h[1:] / h[:-1] / 2  # the first step has no previous x_0
    columns = (visited, x_scale, epsilon_scale, variance.sqrt(), change_scale, now.sqrt(), (1 - now).sqrt())
    return [ReverseStep(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def resampled(plan: list[ReverseStep], times: int) -> list[ReverseStep]:
    """The plan with each of its STRETCHES gone `times` times, noised back to its beginning in between.

    RePaint's resampling (Lugmayr et al. 2022, section 4.2): what is drawn anew gets the chance to fit what is kept.
    Theirs goes back 10 steps of 250; a tenth of the way serves plans of few steps too.
    """
    result, length = [], -(-len(plan) // STRETCHES)
    for begin in range(0, len(plan), length):
        stretch = plan[begin : begin + length]
        again = [stretch[0]._replace(change_scale=0.0), *stretch[1:]]  # the step before it was at another noise level
        passes = [stretch] + [again] * (times - 1)
        back = stretch[0].signal / stretch[-1].next_signal
        for steps in passes[:-1]:
            result += [*steps[:-1], steps[-1]._replace(back_scale=back)]
        result += passes[-1]
    return result


def noise_source(
    seed: int, shape: tuple[int, ...], device: torch.device | str = "cpu", rows: torch.Tensor | slice = slice(None)
) -> Callable[[int], torch.Tensor]:
    """z(i): the i-th standard normal noise of a drawing (0 is x_T itself), a function of (seed, i) on every device.

    rows: those of the shape's first dimension that are wanted.
    """
    where = torch.device(device)
    return lambda index: move(torch.randn(shape, generator=generator(seed, "sample", index))[rows], where)


@torch.no_grad()
def sample(
    predict_epsilon: Callable[[torch.Tensor, int], torch.Tensor],
    noise: Callable[[int], torch.Tensor],
    plan: list[ReverseStep],
    callback: Callable[[int, torch.Tensor], None] | None = None,
    *,
    watch: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    start: torch.Tensor | None = None,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run the reverse process. Returns x_0 of the shape that `noise` draws, not clamped.

    predict_epsilon(x (B, ...), t) -> epsilon (B, ...). noise(0) is x_T, noise(i) the i-th z after it. plan: from
    `reverse_steps`. callback(steps_left, x) is called with x_T and then after every step, x_0 last: for pictures of
    the process, and to stop (by raising). watch(steps_left, x_t, x_0) is told of every step's prediction, and then
    (0, x, x).
    start: an x_0 (B, ...) that is noised to the plan's first timestep, instead of pure noise (SDEdit, Meng et al.
    2022, algorithm 1). known: (x_0 (B, ...), which of its values (B, ...) bool are to be drawn anew): after each step
    the others are replaced by x_0's, noised as far as the step leads (RePaint, Lugmayr et al. 2022, algorithm 1).
    """
    index = counting()
    x, previous = noise(next(index)), None
    if start is not None:
        x = plan[0].signal * start + plan[0].noise * x
    multistep = any(step.change_scale for step in plan)
    for done, step in enumerate(plan):
        if callback is not None:
            callback(len(plan) - done, x)
        with torch.inference_mode():  # a twentieth quicker than no_grad alone, where operations are this small
            epsilon = predict_epsilon(x, step.t)
            x_0 = (x - step.noise * epsilon) / step.signal if multistep or watch else None
            if watch is not None:
                watch(len(plan) - done, x, x_0)
            x = step.x_scale * x + step.epsilon_scale * epsilon
            if step.change_scale:
                x = x + step.change_scale * (x_0 - previous)
            if step.noise_scale:
                x = x + step.noise_scale * noise(next(index))
            if known is not None:
                noisy = step.next_signal * known[0] + (1 - step.next_signal**2) ** 0.5 * noise(next(index))
                x = torch.where(known[1], x, noisy)
            if step.back_scale < 1:
                x = step.back_scale * x + (1 - step.back_scale**2) ** 0.5 * noise(next(index))
            previous = x_0
    if callback is not None:
        callback(0, x)
    if watch is not None:
        watch(0, x, x)
    return x.clone()  # an ordinary tensor, which may be changed in place


def guided(
    predict: Callable[..., torch.Tensor],
    labels: torch.Tensor,
    null_label: int,
    scale: float,
    *,
    acts: Callable[[int], bool] = lambda t: True,
    guide: Callable[..., torch.Tensor] | None = None,
    guide_scale: float = 1.0,
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Classifier-free guidance (Ho & Salimans 2022): epsilon_null + scale * (epsilon_label - epsilon_null).

    predict(x (B, ...), t, labels (B,)) -> epsilon. scale 1 is plain conditional sampling, at the cost of one
    evaluation a step; so is any scale where all labels are null; 0 is unconditional. acts(t): is there guidance in
    timestep t (Kynkäänniemi et al. 2024)? guide: `predict` of a weaker network, told the same labels. Autoguidance
    (Karras et al. 2024) adds (guide_scale - 1) * (epsilon_label - the guide's).
    """
    nulls = torch.full_like(labels, null_label)
    scale = 1.0 if torch.equal(labels, nulls) else scale
    both = torch.cat([labels, nulls])

    def predict_guided(x: torch.Tensor, t: int) -> torch.Tensor:
        here = scale if acts(t) else 1.0
        if guide is None and here == 0:
            return predict(x, t, nulls)
        if here == 1:
            epsilon = with_label = predict(x, t, labels)
        else:
            with_label, without = predict(torch.cat([x, x]), t, both).chunk(2)
            epsilon = torch.lerp(without, with_label, here)
        if guide is None:
            return epsilon
        return epsilon + (guide_scale - 1) * (with_label - guide(x, t, labels))

    return predict_guided


def within(
    schedules: Schedules, plan: list[ReverseStep], interval: tuple[float, float] | None
) -> Callable[[int], bool]:
    """Is the half log-SNR of timestep t within the interval, or is there none?

    Raises ValueError for what is no interval, or has no timestep of the plan in it.
    """
    if interval is None:
        return lambda t: True
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError, OverflowError):
        low = high = 0.0
    if not low < high:
        raise ValueError(f"guidance_interval must be two numbers, the second the larger, not {interval!r}")
    snr = half_log_snr(schedules.exact_alpha_bar).tolist()
    drawn = [snr[step.t] for step in plan]
    if not any(low <= level <= high for level in drawn):
        reach = f"where half the log-SNR is from {min(drawn):.4f} to {max(drawn):.4f}"
        raise ValueError(f"the guidance interval {low:g} to {high:g} has none of the timesteps that are drawn, {reach}")
    return lambda t: low <= snr[t] <= high


def _in_parts(predict: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`predict`, asked about at most PART rows at a time, so that its memory does not grow with the drawing."""

    def predict_parts(x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        if len(x) <= PART:
            return predict(x, t, labels)
        parts = zip(x.split(PART), labels.split(PART), strict=True)
        return torch.cat([predict(some, t, theirs) for some, theirs in parts])

    return predict_parts


def as_labels(labels: Iterable[int] | torch.Tensor, largest: int) -> list[int]:
    """Whole numbers from 0 to `largest`, in a list, an array or a tensor (N,), as a list; else ValueError."""
    try:
        values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        wrong = [value for value in values if value not in range(largest + 1)] if len(values) else [values]
    except TypeError:  # one number instead of several
        wrong = [labels]
    if wrong:
        raise ValueError(f"labels must be a list of whole numbers from 0 to {largest}; {wrong[0]!r} is none")
    return [int(value) for value in values]


def as_floats(values: Any) -> torch.Tensor:
    """Numbers in a tensor, in lists, or in an array of any type and memory layout, as a float32 tensor.

    Raises ValueError or TypeError for what is none.
    """
    if not isinstance(values, torch.Tensor):
        values = torch.from_numpy(numpy.array(values, dtype=numpy.float32))  # torch takes no view that is flipped
    return values.to_dense().float()


def as_images(values: Any, name: str) -> torch.Tensor:
    """Numbers from 0 to 1 of shape (28, 28), (K, 28, 28) or (K, 1, 28, 28), as (K, 1, 28, 28) float32.

    Raises ValueError, which calls them `name`, for anything else.
    """
    try:
        images = as_floats(values)
    except (TypeError, ValueError, RuntimeError):
        images = torch.empty(0)
    if images.shape[-2:] != (28, 28) or images.ndim > 4 or images.shape[:-2][1:] not in ((), (1,)) or not len(images):
        raise ValueError(f"{name} must be of shape (28, 28), (N, 28, 28) or (N, 1, 28, 28), not {tuple(images.shape)}")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{name} must be from 0 (black) to 1")
    return images.reshape(-1, 1, 28, 28)


def _in_runs(images: torch.Tensor, count: int, name: str) -> torch.Tensor:
    """(K, ...) -> (count, ...): an equal run of each. Raises ValueError if there are more than `count`."""
    if len(images) > count:
        raise ValueError(f"{name} has {len(images)} images: draw at least as many, not {count}")
    return images[torch.arange(count) * len(images) // count]


def draw(
    net: nn.Module,
    shape: tuple[int, ...],
    schedules: Schedules,
    *,
    labels: Iterable[int] | torch.Tensor | None = None,
    count: int = 16,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guide: nn.Module | None = None,
    guide_scale: float = DEFAULT_GUIDE_SCALE,
    seed: int = 42,
    sampler: str = "ddpm",
    steps: int | None = None,
    callback: Callable[[int, torch.Tensor], None] | None = None,
    watch: Watch | None = None,
    to_images: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    of_images: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
    frames: dict[int, torch.Tensor] | None = None,
    world: World | None = None,
    from_image: torch.Tensor | None = None,
    strength: float = 1.0,
    inpaint: torch.Tensor | None = None,
    resample: int = 1,
) -> torch.Tensor:
    """Draw x_0 from a net (see `ask`); returns to_images(x_0 (N, *shape)).

    labels: the class of each row, or None to draw `count` rows unconditionally. guidance, guide, a net of the same
    shape, and guide_scale: see `guided`; guidance_interval: from which to which `half_log_snr` guidance acts (None:
    always). sampler and steps: see `reverse_steps`; callback: see `sample`, as for when watch(steps left, x_t,
    predicted x_0, to_images) is called. The same seed draws the same rows on every device.
    frames: a dict whose keys count the steps that are left; each gets to_images(x) of its moment as value.
    world: processes that share the work, in groups of PART rows, and all return all of it: bit for bit what one draws.

    from_image: images in [0, 1] to begin with, see `as_images`; of several each gets an equal run of the rows, and
    of_images(images (N, 1, 28, 28)) is their x_0. They are noised by the `strength` of the T timesteps (see
    `timesteps_left`) and denoised from there (see `sample`), in `steps` of these. At strength 1 nothing is left of
    them: drawing begins with pure noise. inpaint: masks, as images; what is white (above a half) is drawn anew, and the
    rest of from_image is kept exactly. That is for models whose x_0 has a value for each pixel. resample: see
    `resampled`.
    Raises ValueError for what cannot be drawn.
    """
    world = world or World()
    device = schedules.beta.device
    null_label = null_label_of(net)
    labels = [null_label] * count if labels is None else as_labels(labels, null_label)
    guidance = guidance if takes_labels(net) else 1.0
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise ValueError(f"strength must be greater than 0 and at most 1, not {strength}")
    if from_image is None and (strength < 1 or inpaint is not None):
        raise ValueError("strength and inpaint say what becomes of an image: give from_image")
    if not isinstance(resample, Integral) or not 1 <= resample <= MOST_PASSES:
        raise ValueError(f"resample must be at least 1 and at most {MOST_PASSES}, not {resample}")
    if resample > 1 and inpaint is None:
        raise ValueError("resample fits what is drawn anew to what is kept: give inpaint")
    timesteps = timesteps_left(strength, schedules.T)
    if isinstance(steps, Integral) and steps > timesteps < schedules.T:
        raise ValueError(f"strength {strength} leaves {timesteps} timesteps: steps can be at most that, not {steps}")
    plan = resampled(reverse_steps(schedules.first(timesteps), steps, sampler), resample)
    mine = torch.arange(len(labels)).split(PART)[world.rank :: world.size]  # this process's groups of rows
    predictor, labels = _in_parts(predictor_of(net)), torch.tensor(labels, device=device)
    how = {"acts": within(schedules, plan, guidance_interval), "guide_scale": guide_scale}
    how["guide"] = None if guide is None else _in_parts(predictor_of(guide))
    predictors = [guided(predictor, labels[rows.to(device)], null_label, guidance, **how) for rows in mine]
    moments: dict[int, list[torch.Tensor]] = {left: [] for left in frames or ()}

    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        return _joined([ask(some, t) for ask, some in zip(predictors, x.split(PART), strict=True)])

    def called(left: int, x: torch.Tensor) -> None:
        if callback is not None:
            callback(left, x)
        if left in moments:
            moments[left] = [to_images(some) for some in x.split(PART)]

    edit = {"from_image": from_image, "inpaint": inpaint}
    edit = {name: as_images(values, name) for name, values in edit.items() if values is not None}
    if len({len(images) for images in edit.values()} - {1}) > 1:
        raise ValueError(
            "from_image and inpaint hold {} and {} images, which do not match".format(*map(len, edit.values()))
        )
    edit = {name: _in_runs(images, len(labels), name) for name, images in edit.items()}
    given, mask = edit.get("from_image"), edit.get("inpaint")
    anew = None if mask is None else mask > 0.5  # (N, 1, 28, 28)
    images = []
    if mine:
        noise = noise_source(seed, (len(labels), *shape), device, slice(None) if world.size == 1 else torch.cat(mine))
        seen = watch and (lambda left, x, x_0: watch(left, x, x_0, to_images))
        source = None if given is None else _joined([of_images(move(given[rows], device)) for rows in mine])
        known = None if anew is None else (source, move(anew[torch.cat(mine)], device))
        x_0 = sample(predict, noise, plan, called, watch=seen, start=source if strength < 1 else None, known=known)
        images = [to_images(some) for some in x_0.split(PART)]
    for left, parts in moments.items():
        frames[left] = _everyones(parts, world)
    drawn = _everyones(images, world)
    return drawn if anew is None else torch.where(anew.to(drawn.device), drawn, given.to(drawn.device))  # not rounded


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _everyones(parts: list[torch.Tensor], world: World) -> torch.Tensor:
    """All processes' groups of rows, which they took in turn."""
    lists = world.all([part if world.size == 1 else part.cpu() for part in parts])
    count = sum(map(len, lists))
    return _joined([lists[index % world.size][index // world.size] for index in range(count)])
