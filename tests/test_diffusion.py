"""The diffusion mathematics against plain float64 arithmetic and against diffusers."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.training_utils import compute_snr
from helpers import LATENT, assert_same, call

from common import ckpt, diffusion, load, sampling
from common.error_codes import MODEL_MISMATCH
from common.flags import DPM_STEPS, SAMPLERS, check_betas
from common.rng import generator

BETAS = {"beta_start": 1e-4, "beta_end": 2e-2}
PURE_NOISE = "drawing begins with pure noise: raise --T or --beta-end, or take --schedule cosine"
SHAPES = [(3, 16), (2, 1, 28, 28)]


def float64_schedule(T, beta_start=1e-4, beta_end=2e-2):
    """(beta, alpha_bar) computed one by one in float64."""
    beta = np.array([beta_start + (beta_end - beta_start) * i / (T - 1) for i in range(T)]) if T > 1 else [beta_start]
    return np.asarray(beta), np.cumprod(1 - np.asarray(beta))


def noise_of(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "test"))


@pytest.mark.parametrize(
    ("T", "start", "end"), [(1000, 1e-4, 2e-2), (20, 1e-4, 2e-2), (50, 1e-3, 0.5), (1, 1e-4, 2e-2)]
)
def test_every_schedule_entry(T, start, end):
    schedules = diffusion.precompute_schedules(T, start, end)
    beta, alpha_bar = float64_schedule(T, start, end)
    wanted = (beta, 1 - beta, alpha_bar, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    assert schedules.T == T
    for name, got, exact in zip(schedules._fields, schedules, wanted, strict=True):
        assert got.dtype == torch.float32, name
        np.testing.assert_allclose(got.numpy(), exact, rtol=2e-7, err_msg=name)  # one rounding to float32


def test_schedule_agrees_with_diffusers():
    theirs = DDPMScheduler(1000, **BETAS, beta_schedule="linear")
    ours = diffusion.precompute_schedules(1000, **BETAS)
    torch.testing.assert_close(ours.beta, theirs.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod, rtol=1e-4, atol=0)  # theirs: a float32 product


@pytest.mark.parametrize("T", [1000, 50, 1])
def test_the_cosine_schedule_against_diffusers(T):
    ours = diffusion.precompute_schedules(T, schedule="cosine")
    theirs = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(ours.beta, theirs.betas, rtol=1e-6, atol=0)
    assert (ours.alpha_bar.diff() < 0).all()
    assert ours.alpha_bar[-1] < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_q_sample_agrees_with_diffusers(shape):
    x0, epsilon = noise_of(4, *shape[1:]), noise_of(4, *shape[1:], seed=1)
    t = torch.tensor([0, 17, 500, 999])
    wanted = DDPMScheduler(1000, **BETAS).add_noise(x0, epsilon, t)
    ours = diffusion.q_sample(x0, t, epsilon, diffusion.precompute_schedules(1000, **BETAS))
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0, 1, 2, 10, 250, 998, 999])
def test_one_reverse_step_agrees_with_diffusers(t, monkeypatch):
    x, epsilon, z = (noise_of(3, 16, seed=seed) for seed in range(3))
    theirs = DDPMScheduler(1000, **BETAS, variance_type="fixed_small", clip_sample=False)
    theirs.alphas_cumprod = (1 - theirs.betas.double()).cumprod(0)  # in float32 theirs loses 1 - alpha_bar at small t
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_args, **_kwargs: z)
    wanted = theirs.step(epsilon, t, x).prev_sample
    step = sampling.reverse_steps(diffusion.precompute_schedules(1000, **BETAS))[999 - t]
    assert step.t == t
    ours = step.x_scale * x + step.epsilon_scale * epsilon + step.noise_scale * z
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_loop_against_float64(shape):
    """Equations 7 and 11 of the paper, spelt out in float64, with a predictor that depends on x and t."""
    T = 50
    beta, alpha_bar = float64_schedule(T)
    noise = sampling.noise_source(7, shape)
    x = noise(0).double().numpy()
    for t in reversed(range(T)):
        epsilon = np.tanh(x) * (t + 1) / T
        mean = (x - beta[t] / np.sqrt(1 - alpha_bar[t]) * epsilon) / np.sqrt(1 - beta[t])
        variance = beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) if t else 0.0
        x = mean + np.sqrt(variance) * noise(T - t).double().numpy()
    plan = sampling.reverse_steps(diffusion.precompute_schedules(T, **BETAS))
    ours = sampling.sample(lambda x, t: torch.tanh(x) * (t + 1) / T, noise, plan)
    np.testing.assert_allclose(ours.numpy(), x, rtol=1e-4, atol=1e-5)


def test_ddim_agrees_with_diffusers():
    T = 100
    theirs = DDIMScheduler(T, **BETAS, clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(T)
    noise = sampling.noise_source(3, (4, 16))
    wanted = noise(0)
    for t in theirs.timesteps:
        wanted = theirs.step(torch.tanh(wanted) * 0.9, int(t), wanted, eta=0.0).prev_sample
    plan = sampling.reverse_steps(diffusion.precompute_schedules(T, **BETAS), sampler="ddim")
    assert all(step.noise_scale == 0 for step in plan)
    ours = sampling.sample(lambda x, _t: torch.tanh(x) * 0.9, noise, plan)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def best_of_normal(schedules, mean, deviation):
    """The best predictor of epsilon for data N(mean, deviation^2)."""

    def best(x, t):
        abar = schedules.alpha_bar[t].double().item()
        return (x - abar**0.5 * mean) * (1 - abar) ** 0.5 / (abar * deviation**2 + 1 - abar)

    return best


@pytest.mark.parametrize("sampler", ["dpm", "dpm-sde"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50, 1000])
def test_dpm_agrees_with_diffusers_and_with_float64(steps, sampler):
    """Lu et al. 2022b, spelt out: D is the data prediction, extrapolated from the last two."""
    betas = {"beta_start": 1e-4, "beta_end": 1e-2}  # at 2e-2, float32 knows x_0 to 3e-5 at the noisiest timestep
    schedules = diffusion.precompute_schedules(1000, **betas)
    plan = sampling.reverse_steps(schedules, steps, sampler)
    predict, noise = best_of_normal(schedules, 0.5, 0.3), sampling.noise_source(3, (4, 16))
    assert [step.noise_scale > 0 for step in plan] == [sampler == "dpm-sde"] * (steps - 1) + [False]
    algorithm = {"dpm": "dpmsolver++", "dpm-sde": "sde-dpmsolver++"}[sampler]
    theirs = DPMSolverMultistepScheduler(1000, **betas, algorithm_type=algorithm)
    alpha_bar = float64_schedule(1000, **betas)[1]
    theirs.alphas_cumprod = torch.from_numpy(alpha_bar)  # theirs is a float32 product
    theirs.set_timesteps(timesteps=[step.t for step in plan])
    wanted = noise(0)
    for i, t in enumerate(theirs.timesteps, 1):
        wanted = theirs.step(predict(wanted, int(t)), t, wanted, variance_noise=noise(i)).prev_sample
    ours = sampling.sample(predict, noise, plan)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    x, before = noise(0).double().numpy(), None
    alpha = np.sqrt([alpha_bar[step.t] for step in plan])
    sigma = np.sqrt(1 - alpha**2)
    snr = np.log(alpha / sigma)
    for i, step in enumerate(plan):
        x_0 = (x - sigma[i] * predict(torch.from_numpy(x), step.t).numpy()) / alpha[i]
        if i == steps - 1:
            x = x_0
            break
        r = (snr[i] - snr[i - 1]) / (snr[i + 1] - snr[i]) if i else np.inf
        D = x_0 if before is None else (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * before
        h = snr[i + 1] - snr[i]
        if sampler == "dpm":
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * D
        else:
            z = np.sqrt(-np.expm1(-2 * h)) * noise(i + 1).double().numpy()
            x = sigma[i + 1] / sigma[i] * np.exp(-h) * x - alpha[i + 1] * np.expm1(-2 * h) * D + sigma[i + 1] * z
        before = x_0
    ours = sampling.sample(predict, lambda index: noise(index).double(), plan)
    assert not ours.is_inference()  # it may be changed in place
    np.testing.assert_allclose(ours.numpy(), x, rtol=1e-7, atol=1e-7)  # the schedule is kept in float32


def test_the_timesteps_of_dpm_are_even_in_log_snr():
    alpha_bar = float64_schedule(1000)[1]
    visited = [step.t for step in sampling.reverse_steps(diffusion.precompute_schedules(), 12, "dpm")]
    snr = np.log(alpha_bar / (1 - alpha_bar))[visited] / 2
    assert np.diff(snr) == pytest.approx(np.diff(snr).mean(), rel=0.03)
    assert snr[-1] == pytest.approx(sampling.LAST_SNR, abs=0.03)


def test_dpm_is_of_second_order():
    """Twice the steps leave a quarter of the error, where those of ddim leave half; both to the same solution."""
    schedules = diffusion.precompute_schedules(1000, **BETAS)
    predict, noise = best_of_normal(schedules, 0.5, 0.3), sampling.noise_source(1, (500, 1))

    def drawn(plan):
        return sampling.sample(predict, noise, plan)

    exact = drawn(sampling.reverse_steps(schedules, 200, "dpm"))
    errors = {n: (drawn(sampling.reverse_steps(schedules, n, "dpm")) - exact).abs().mean().item() for n in (12, 24)}
    first = [step._replace(change_scale=0.0) for step in sampling.reverse_steps(schedules, 24, "dpm")]
    assert errors[24] < 0.33 * errors[12]
    assert errors[24] < 0.2 * (drawn(first) - exact).abs().mean()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_how_many_steps_a_sampler_takes_unless_told(sampler):
    for T in (1, 2, 1000):
        wanted = min(DPM_STEPS, T) if sampler in ("dpm", "dpm-sde") else T
        assert len(sampling.reverse_steps(diffusion.precompute_schedules(T), sampler=sampler)) == wanted


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("T", [1, 2, 20, 999])
def test_any_number_of_steps_visits_distinct_timesteps(T, sampler):
    schedules = diffusion.precompute_schedules(T, **BETAS)
    for steps in {1, min(2, T), T // 3 + 1, max(T - 1, 1), T}:
        plan = sampling.reverse_steps(schedules, steps, sampler)
        visited = [step.t for step in plan]
        assert len(visited) == steps
        assert visited == sorted(set(visited), reverse=True)
        assert visited[0] == T - 1
        assert steps == 1 or visited[-1] == 0 or sampler in ("dpm", "dpm-sde")
        assert plan[-1].noise_scale == plan[-1].change_scale == plan[0].change_scale == 0
        # a perfect prediction of the noise leads exactly to x_0 in the last step: x_0 = (x - sqrt(1-abar) e)/sqrt(abar)
        alpha_bar = schedules.alpha_bar[visited[-1]].item()
        assert plan[-1].x_scale == pytest.approx(alpha_bar**-0.5, rel=1e-5)


@pytest.mark.parametrize(("steps", "sampler"), [(0, "ddpm"), (21, "ddpm"), (5, "euler")])
def test_impossible_plans_are_refused(steps, sampler):
    with pytest.raises(ValueError, match="must be"):
        sampling.reverse_steps(diffusion.precompute_schedules(20), steps, sampler)


@pytest.mark.parametrize(
    ("sampler", "steps"), [(name, n) for name in ("ddpm", "ddim") for n in (None, 100)] + [("dpm", 20), ("dpm-sde", 20)]
)
def test_the_perfect_denoiser_draws_the_data(sampler, steps):
    """For data N(mean, deviation^2) the best predictor is known; what is drawn must have that mean and deviation."""
    mean, deviation, T = 0.5, 0.3, 200
    schedules = diffusion.precompute_schedules(T, 1e-4, 0.1)
    plan = sampling.reverse_steps(schedules, steps, sampler)
    drawn = sampling.sample(best_of_normal(schedules, mean, deviation), sampling.noise_source(1, (20_000, 1)), plan)
    assert drawn.mean().item() == pytest.approx(mean, abs=0.02)
    assert drawn.std().item() == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("T", "beta_start", "beta_end"), [(17_000, 1e-4, 0.02), (1000, 1e-8, 0.3), (2, 1e-8, 0.999)])
def test_the_noisiest_schedules_that_the_flags_allow_are_drawn_from_in_finite_numbers(T, beta_start, beta_end, sampler):
    args = SimpleNamespace(T=T, beta_start=beta_start, beta_end=beta_end, schedule="linear", given=lambda _: False)
    check_betas(None, args)
    schedules = diffusion.precompute_schedules(T, beta_start, beta_end)
    for steps in {1, 2, min(10, T)}:
        plan = sampling.reverse_steps(schedules, steps, sampler)
        drawn = sampling.sample(best_of_normal(schedules, 0.5, 0.3), sampling.noise_source(1, (200, 1)), plan)
        assert drawn.isfinite().all(), steps


def test_draw_timesteps_follows_the_distribution_row_by_row():
    T, counts, first = 20, torch.zeros(20), torch.zeros(20)
    distribution = torch.linspace(1, 39, T).div(400).double().cumsum(0)  # t = 0 a 400th, t = 19 39 of them
    for index in range(4000):
        t = diffusion.draw_timesteps(7, distribution, generator(index, "t"))
        assert t.dtype == torch.int64
        assert t.min() >= 0
        assert t.max() < T
        counts += torch.bincount(t, minlength=T)
        first[t[0]] += 1  # a row's own timestep must follow it too, not only the batch's
    share = distribution.diff(prepend=torch.zeros(1))
    assert (counts / counts.sum() - share).abs().max() < 0.005
    assert (first / first.sum() - share).abs().max() < 0.02
    again = [diffusion.draw_timesteps(64, distribution, generator(1)) for _ in range(2)]
    assert torch.equal(*again)


def test_timestep_distribution_is_normal_in_log_noise_over_signal():
    distribution = diffusion.timestep_distribution(diffusion.precompute_schedules(1000, **BETAS))
    t = diffusion.draw_timesteps(200_000, distribution, generator(0))
    _, alpha_bar = float64_schedule(1000)
    log_ratio = np.log(np.sqrt(1 - alpha_bar) / np.sqrt(alpha_bar))[t.numpy()]
    assert log_ratio.mean() == pytest.approx(-0.5, abs=0.03)
    assert log_ratio.std() == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize("gamma", [5.0, 1.0, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_counts_timesteps_by_min_snr_as_diffusers_does(shape, gamma):
    x0, epsilon = noise_of(6, *shape[1:]), noise_of(6, *shape[1:], seed=1)
    t = torch.tensor([0, 17, 100, 300, 500, 999])
    draws = (t, epsilon, torch.zeros(6, dtype=torch.bool))
    guess = noise_of(6, *shape[1:], seed=2)
    schedules = diffusion.precompute_schedules(1000, **BETAS)
    loss = diffusion.epsilon_loss(lambda _x, _t, _labels: guess, x0, torch.zeros(6).long(), schedules, draws, gamma)
    snr = compute_snr(DDPMScheduler(1000, **BETAS), t)
    weight = torch.minimum(snr, torch.full_like(snr, gamma)) / snr if gamma else torch.ones(6)
    assert gamma == 0 or (weight[-1] == 1 and weight[0] < 1e-3)
    wanted = (weight * (guess - epsilon).square().flatten(1).mean(dim=1)).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)


def test_min_snr_where_no_signal_is_left():
    """In float32 such a schedule's SNR is 0 at its end: these rows count fully."""
    schedules = diffusion.precompute_schedules(30, 0.99, 0.999)
    assert schedules.alpha_bar[-1] == 0
    draws = (torch.tensor([29, 29]), noise_of(2, 4), torch.zeros(2, dtype=torch.bool))
    losses = [
        diffusion.epsilon_loss(lambda x, _t, _labels: 0 * x, noise_of(2, 4), torch.zeros(2).long(), schedules, draws, g)
        for g in (0, 1)
    ]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize(
    ("T", "schedule", "left"),
    [(1000, "linear", None), (20, "cosine", None), (50, "linear", "78%"), (200, "linear", "36%")],
)
def test_a_schedule_that_ends_in_something_else_than_noise_is_said(T, schedule, left):
    """Drawings of one that leaves half of the image are too grey, whatever the network has learned."""
    said = []
    diffusion.schedules_of(BETAS | {"T": T, "schedule": schedule}, warn=said.append)
    assert said == ([] if left is None else [f"after {T} steps {left} of the image is left, but {PURE_NOISE}"])


def test_both_trainers_say_it(latent_run, pixel_run):
    for run in (latent_run, pixel_run):
        log = (run.parent.parent / "logs" / f"{run.name}.log").read_text()
        assert log.count(f"after 20 steps 90% of the image is left, but {PURE_NOISE}") == 1


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (None, "there is none in common/schedules.py, but linear, cosine"),
        (lambda T, *_: torch.full((T + 1,), 0.1), r"a tensor \(20,\) .* it gives \(21,\)"),
        (lambda T, *_: torch.full((T,), float("nan")), "it gives others"),
        (lambda T, *_: torch.linspace(0, 0.1, T), "it gives others"),
        (lambda T, *_: torch.linspace(0.1, 1, T), "it gives others"),
        (lambda T, *_: [0.1] * T, "it gives list"),
        (lambda T, *_: torch.logspace(-18, -1, T, dtype=torch.float64), "begins with so little noise that it is none"),
        (lambda T, *_: torch.full((T,), 0.9999), "leaves no trace of the image after 20 steps"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_one_line(schedule, said, latent_run, copy_of, monkeypatch):
    if schedule is not None:
        monkeypatch.setitem(diffusion.SCHEDULES, "mine", schedule)
    path = copy_of(latent_run) / "checkpoint_epoch_000002.pt"
    state = ckpt.read_checkpoint(path)
    state["args"]["schedule"] = "mine"
    ckpt.save_checkpoint(path, state)
    for script, more in (("infer.py", ("--ckpt", path)), ("train.py", ("--resume", path, "--epochs", 3))):
        result = call(LATENT, script, *more)
        assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
        assert re.search(f"--schedule mine.* {said}", result.errors[0])
    with pytest.raises(ValueError, match=said):
        load(path, "cpu")


@pytest.mark.parametrize("T", [1, 2, 20])
def test_timestep_distribution_of_short_schedules(T):
    distribution = diffusion.timestep_distribution(diffusion.precompute_schedules(T, **BETAS))
    share = distribution.diff(prepend=torch.zeros(1, dtype=torch.float64))
    assert distribution[-1] == pytest.approx(1)
    assert (share > 0).all()


@pytest.mark.parametrize(("scale", "wanted"), [(0.0, 10.0), (1.0, 3.0), (2.0, -4.0), (0.5, 6.5)])
def test_guidance(scale, wanted):
    """predict returns its label, null is 10 and the label 3: null + scale * (label - null)."""
    calls = []

    def predict(x, t, labels):
        calls.append(len(x))
        return x * 0 + labels[:, None]

    guided = sampling.guided(predict, torch.tensor([3, 3]), 10, scale)
    torch.testing.assert_close(guided(torch.ones(2, 4), 5), torch.full((2, 4), wanted))
    assert calls == ([2] if scale in (0, 1) else [4])


def test_null_labels_are_not_guided_away_from_themselves():
    asked = []
    nulls = torch.tensor([10, 10])
    guided = sampling.guided(lambda x, t, labels: asked.append(labels) or x, nulls, 10, 1.5)
    guided(torch.ones(2, 4), 5)
    assert_same(asked, [nulls])


def test_guidance_acts_only_within_its_interval():
    """The nets' half log-SNR, in float64, says in which steps rows are asked about twice."""
    asked = {}

    class Net(torch.nn.Module):
        null_label = 10

        def forward(self, x, t, labels):
            asked[int(t[0])] = len(x)
            return x * 0.1

    how = {"labels": [3, 4], "guidance": 2.0, "guidance_interval": (-1.5, 1.0)}
    sampling.draw(Net(), (4,), diffusion.precompute_schedules(50, 1e-3, 0.3), **how)
    _, alpha_bar = float64_schedule(50, 1e-3, 0.3)
    snr = np.log(alpha_bar / (1 - alpha_bar)) / 2
    inside = (snr >= -1.5) & (snr <= 1.0)
    assert 5 < inside.sum() < 45
    assert [asked[t] for t in range(50)] == [4 if here else 2 for here in inside]


def test_a_guide_is_moved_away_from_by_its_scale():
    """predict returns its label and the guide 5: -4 is classifier-free guidance, and 2 more times 3 - 5 is added."""
    told = []

    def guide(x, _t, labels):
        told.append(labels)
        return x * 0 + 5

    def predict(x, _t, labels):
        return x * 0 + labels[:, None]

    labels, how = torch.tensor([3, 3]), {"guide": guide, "guide_scale": 3.0}
    for scale, acts, wanted in ((2.0, True, -8.0), (2.0, False, -1.0), (1.0, True, -1.0), (0.0, True, 6.0)):
        guided = sampling.guided(predict, labels, 10, scale, acts=lambda _t, acts=acts: acts, **how)
        torch.testing.assert_close(guided(torch.ones(2, 4), 5), torch.full((2, 4), wanted))
    assert_same(told, [labels] * 4)


def test_callback_sees_every_step_in_order_and_can_stop():
    T, seen = 12, []
    noise = sampling.noise_source(0, (2, 4))
    plan = sampling.reverse_steps(diffusion.precompute_schedules(T))
    x0 = sampling.sample(lambda x, _t: x * 0.1, noise, plan, lambda left, x: seen.append((left, x.clone())))
    assert [left for left, _ in seen] == list(range(T, -1, -1))
    assert torch.equal(seen[0][1], noise(0))
    assert torch.equal(seen[-1][1], x0)

    def stop(left, _x):
        if left == 5:
            raise InterruptedError

    evaluated = []
    with pytest.raises(InterruptedError):
        sampling.sample(lambda x, t: evaluated.append(t) or x, noise, plan, stop)
    assert evaluated == list(range(T - 1, 4, -1))


def test_noise_is_a_function_of_seed_and_step():
    assert torch.equal(sampling.noise_source(1, (5,))(3), sampling.noise_source(1, (5,))(3))
    draws = [sampling.noise_source(seed, (5,))(step) for seed in (1, 2) for step in (0, 1)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_large_drawings_go_through_the_net_in_parts(guidance, monkeypatch):
    """Its memory stays bounded, and every row keeps its noise and its label."""

    class Net:
        null_label, takes_labels, asked = 10, True, []

        def predictor(self):
            return lambda x, t, labels: self.asked.append(len(x)) or x * 0.1 + labels[:, None] / (t + 1)

    wish = {"labels": list(range(9)), "guidance": guidance, "seed": 1}
    schedules = diffusion.precompute_schedules(12, **BETAS)
    whole = sampling.draw(Net(), (4,), schedules, **wish)
    plain = sampling.draw(Net(), (4,), schedules, **wish | {"guidance": 1.0})
    assert torch.equal(whole, plain) == (guidance == 1)
    monkeypatch.setattr(sampling, "PART", 4)
    Net.asked.clear()
    torch.testing.assert_close(sampling.draw(Net(), (4,), schedules, **wish), whole)
    assert max(Net.asked) == 4
