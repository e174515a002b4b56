"""The figures of sample quality: right on cases with a known answer, and written where the tools look for them."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import run
from helpers import AE, LATENT, PIXEL, REPO, SMALL, call, newest_state, only_run
from scipy.linalg import sqrtm

from common import ckpt, classifier, evaluate, metrics, mnist, scores
from common.classifier import VERSION, fingerprint, judge, load_classifier, train_classifier
from common.data import HF_MNIST
from common.error_codes import BAD_OUTPUT, MODEL_MISMATCH, NO_DATA, USAGE, Exit
from common.rng import generator
from common.scores import FEWEST_REAL, SPLITS, epoch_scorer, halves, score

RNG = np.random.default_rng(0)


def test_frechet_distance_of_known_gaussians():
    first, second = RNG.normal(size=(4000, 5)), RNG.normal(size=(3000, 5)) @ RNG.normal(size=(5, 5)) + 2
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    wanted = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one + two - 2 * sqrtm(one @ two).real)
    assert metrics.frechet_distance(first, second) == pytest.approx(wanted, rel=1e-6)
    assert metrics.frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(first, first + 3) == pytest.approx(5 * 9, rel=1e-6)


def test_rows_that_count_more_are_as_if_repeated():
    first, second, counts = RNG.normal(size=(4000, 5)), RNG.normal(size=(3000, 5)) + 2, RNG.integers(0, 4, 4000)
    repeated = metrics.frechet_distance(first.repeat(counts, axis=0), second)
    assert metrics.frechet_distance(first, second, counts) == pytest.approx(repeated, rel=1e-4)


def test_the_manifold_against_a_plain_loop():
    support, queries = RNG.normal(size=(60, 4)), 2 * RNG.normal(size=(80, 4))
    radii = [sorted(np.linalg.norm(support - point, axis=1))[3] for point in support]
    wanted = [any(np.linalg.norm(q - s) <= r for s, r in zip(support, radii, strict=True)) for q in queries]
    found = metrics.covered(support, queries, k=3)
    assert found.tolist() == wanted
    assert 0 < found.mean() < 1


def test_imbalance_and_bootstrap():
    assert metrics.imbalance(np.array([0, 1]), np.array([1, 0])) == 0
    assert metrics.imbalance(np.array([0, 0]), np.array([1, 1])) == 1
    coins = RNG.integers(0, 2, 1000)
    error = metrics.bootstrap(lambda rows: rows.mean(), coins, repeats=400)
    assert error == pytest.approx(0.5 / 1000**0.5, rel=0.15)
    assert error == metrics.bootstrap(lambda rows: rows.mean(), coins, repeats=400)  # a fixed seed


def test_what_was_chosen_is_no_part_of_an_error():
    strata = np.arange(1000) % 4
    sample = 10 * strata + RNG.normal(size=1000)
    errors = [metrics.bootstrap(np.mean, sample, repeats=400, strata=given) for given in (strata, None)]
    assert errors == pytest.approx([1 / 1000**0.5, (125 + 1) ** 0.5 / 1000**0.5], rel=0.15)


def test_the_classifier_reads_digits_and_is_kept(judged, cache):
    net, accuracy, test = judged
    assert accuracy > 0.97
    _, probabilities = judge(net, test[torch.arange(len(test))][0])
    assert (probabilities.argmax(1) == test.labels).float().mean().item() == pytest.approx(accuracy)
    again, same = load_classifier(cache, "embedded", progress=lambda text: pytest.fail(f"not from the cache: {text}"))
    assert (same, again.training) == (accuracy, False)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert fingerprint(net) == fingerprint(again)


def test_digits_to_learn_from_are_turned_and_not_bent(monkeypatch):
    """By the greatest angle: a round spot stays what it is, a bar does not."""
    draws = iter([1.0, 0.5, 0.5, 0.5, 0.5])  # angle, scale, shear, shifts; 0.5 is none
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), next(draws)))
    square = (torch.arange(28.0) - 13.5).square()
    images = torch.stack([torch.exp(-(square + square[:, None] * flat) / 50) for flat in (1, 9)])[:, None]
    spot, bar = (classifier.random_affine(images, None) - images).abs().amax((1, 2, 3))
    assert spot < 0.02
    assert bar > 0.1


def test_the_classifier_is_a_function_of_its_seed(cache):
    few = HF_MNIST("test", cache, source="embedded")
    networks = []
    for seed in (0, 0, 1):
        torch.rand(3)  # whatever the global generator has been used for
        networks.append(train_classifier(few, seed, epochs=1, min_steps=3))
    a, b, c = networks
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)


@pytest.mark.slow
def test_the_classifier_on_full_mnist(full_mnist):
    """After a fifth of its training 98.9 % of the 10,000 test digits; after all of it (a minute) 99.49 %."""
    learned, test = (HF_MNIST(split, full_mnist, source="hub") for split in ("train", "test"))
    net = train_classifier(learned, epochs=1)
    predicted = judge(net, test[torch.arange(len(test))][0])[1].argmax(1)
    assert (predicted == test.labels).float().mean() >= 0.985


def test_worse_pictures_score_worse(judged):
    net, _, test = judged
    images, labels = HF_MNIST.subset(test, torch.arange(250))[torch.arange(250)]
    noisy = (images + 0.5 * torch.randn(images.shape, generator=generator(0, "noise"))).clamp(0, 1)
    real, bad, wrong = (
        score(x, y, test, net) for x, y in ((images, labels), (noisy, labels), (images, labels.flip(0)))
    )
    assert bad["fid"]["value"] > 2 * real["fid"]["value"]
    assert bad["precision"]["value"] < real["precision"]["value"]
    assert wrong["agreement"]["value"] < 0.5 < real["agreement"]["value"]
    sure = (judge(net, noisy)[1].amax(1) > 0.9).float().mean().item()
    assert bad["confident"]["value"] == pytest.approx(sure)
    assert sure < 0.9
    assert real["fid"]["floor"] == bad["fid"]["floor"] > 0
    assert all({"value", "error", "floor", "floor_error"} <= row.keys() for row in bad.values())


def test_what_real_digits_score_is_the_mean_over_all_groups_of_as_many(judged):
    """One odd digit can double the distance of a group."""
    net, _, test = judged
    everything = judge(net, test[torch.arange(len(test))][0])[0].numpy()
    found = score(test[torch.arange(40)][0], None, test, net, splits=3)["fid"]
    wanted = []
    for split in range(3):
        reference, spare = (everything[rows] for rows in halves(test, split))
        groups = [spare[start : start + 40] for start in range(0, len(spare) - 39, 40)]
        assert len(groups) > 3
        wanted.append(np.mean([metrics.frechet_distance(group, reference) for group in groups]))
    assert found["floor"] == pytest.approx(np.mean(wanted))
    assert found["floor_error"] == pytest.approx(np.std(wanted, ddof=1))
    everybody = score(test[torch.arange(len(test))][0], None, test, net, splits=1, errors=False)["fid"]
    first, second = halves(test)
    assert everybody["floor"] == pytest.approx(metrics.frechet_distance(everything[second], everything[first]))


def test_real_digits_are_scored_in_the_shares_of_the_drawings(judged):
    net, _, test = judged
    digits = test[torch.arange(len(test))][0]
    features = judge(net, digits)[0].numpy()
    wanted = torch.arange(100) % 2 * 7  # zeros and sevens
    found = score(digits[:100], wanted, test, net, splits=6, errors=False)["fid"]
    picked = []
    for split in range(6):
        reference, spare = halves(test, split)
        some = torch.cat([spare[test.labels[spare] == digit][:20] for digit in (0, 7)])
        picked.append(metrics.frechet_distance(features[some], features[reference]))
    assert found["floor"] == pytest.approx(np.mean(picked), rel=0.2)
    assert found["floor"] > 5 * score(digits[:100], None, test, net, splits=6, errors=False)["fid"]["floor"]
    errors = [score(digits, test.labels, test, net, splits=2, chosen=it)["fid"]["error"] for it in (True, False)]
    assert errors[0] < 0.7 * errors[1]
    assert scores._balanced(torch.tensor([0, 1, 1]), torch.tensor([0, 0])) is None  # a single row has no covariance
    as_wanted = judge(net, digits[:100])[1].argmax(1)
    imbalance = score(digits[:100], as_wanted, test, net)["imbalance"]
    assert (imbalance["value"], imbalance["error"]) == (0, 0)  # whichever of them are looked at


def test_scoring_a_latent_checkpoint(latent_run, copy_of, cache, judged, monkeypatch):
    chosen = []
    monkeypatch.setattr("common.scores.score", lambda *a, **how: chosen.append(how["chosen"]) or score(*a, **how))
    folder = copy_of(latent_run)
    flags = ("--n", 200, "--data", "embedded", "--cache-dir", cache)
    earlier = {"timestamp": ckpt.peek_checkpoint(folder / "latest.pt")["timestamp"], "tstr": 0.5, "details": {}}
    (folder / "checkpoint_epoch_000002.scores.json").write_text(json.dumps(earlier))
    plain = call("common", "evaluate.py", "--ckpt", folder, *flags)
    assert plain.code == 0, plain.text
    assert "not Inception figures" in plain.text
    labelled = call("common", "evaluate.py", "--ckpt", folder, *flags, "--digit", 3, "--sampler", "ddim", "--steps", 5)
    assert labelled.code == 0, labelled.text
    written = json.loads((folder / "checkpoint_epoch_000002.scores.json").read_text())
    assert {"fid", "precision", "recall", "agreement", "fid_labelled", "agreement_labelled"} <= written.keys()
    assert "tstr" not in written  # of other settings
    settings = written["details"]["settings"]  # in which scores that compare are equal
    assert settings.keys() == {"n", *evaluate.SAMPLING, "kind", "only_digit", "splits"}
    assert (settings["n"], settings["only_digit"], settings["splits"]) == (200, 3, SPLITS)
    assert written["details_labelled"]["settings"]["steps"] == 5
    assert written["details_labelled"]["classifier"] == fingerprint(judged[0])
    few = ("--sampler", "dpm", "--steps", 5)
    nameless = call("common", "evaluate.py", "--ckpt", folder, *flags, "--digit", "none", *few)
    assert nameless.code == 0, nameless.text
    more = json.loads((folder / "checkpoint_epoch_000002.scores.json").read_text())
    assert more["details_unlabelled"]["settings"]["kind"] == "without labels"
    assert "agreement_unlabelled" in more  # the run has seen only one digit
    assert chosen == [False, True, False]  # only --digit says how many there are to be of each
    assert {name: value for name, value in more.items() if not name.endswith("_unlabelled")} == written
    few = [line for line in plain.text.splitlines() if "of only 25" in line]
    assert [line.split()[0] for line in few] == ["fid", "imbalance"]
    assert "'real' is of 25 digits, 'value' of 200 images: too few to compare with" in plain.text
    best = run(".", "-m common.find_best_ckpt", folder, "--metric", "fid", "--print-path-only")
    assert str(folder / "checkpoint_epoch_000002.pt") in best.text


def test_scoring_an_autoencoder(ae_run, copy_of, cache, judged):
    folder = copy_of(ae_run)
    flags = ("--ckpt", folder, "--data", "embedded", "--cache-dir", cache, "--n", 200)
    result = call("common", "evaluate.py", *flags)
    assert result.code == 0, result.text
    assert "reconstructions" in result.text
    for sampling in (("--digit", 3), ("--sampler", "ddpm"), ("--seed", 42), ("--guide", folder), ("--tstr",)):
        wrong = call("common", "evaluate.py", *flags, *sampling)
        assert wrong.code == MODEL_MISMATCH
        assert len(wrong.errors) == 1
        assert f"leave out {sampling[0]}" in wrong.errors[0]
    assert call("common", "evaluate.py", "--ckpt", folder, "--n", 3).code == USAGE


def test_a_classifier_learns_from_the_drawings_and_from_as_many_real_digits(
    latent_run, copy_of, cache, judged, monkeypatch
):
    """And is tested on real test digits: --tstr."""
    learned = []

    def train(digits, **_):
        images, labels = digits[torch.arange(len(digits))]
        learned.append((images, labels))
        says = int(len(learned) == 1)  # of the first classifier: all 3, of the second: all 0
        return SimpleNamespace(features=lambda x: x, head=lambda x: torch.eye(10)[[3 * says] * len(x)])

    monkeypatch.setattr(classifier, "train_classifier", train)
    flags = ("--ckpt", copy_of(latent_run), "--n", 200, "--data", "embedded", "--cache-dir", cache)

    def said_of(*more: object) -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            evaluate.main([str(flag) for flag in (*flags, *more, "--sampler", "dpm", "--tstr")])
        return said.getvalue()

    said = said_of()
    written = json.loads(Path(re.search(r"ok: (\S+scores.json)", said)[1]).read_text())
    (drawn, labels), (real, real_labels) = learned
    assert drawn.shape == real.shape == (200, 1, 28, 28)
    assert set(labels.tolist()) == set(real_labels.tolist()) == {3}
    train_set = HF_MNIST("train", cache, 3, "embedded")
    known = {image.numpy().tobytes() for image in train_set[torch.arange(450)][0]}
    assert len({image.numpy().tobytes() for image in real} & known) == 200
    assert not {image.numpy().tobytes() for image in drawn} & known
    assert written["details"]["figures"]["tstr"] == {"value": 1.0, "error": 0.0, "floor": 0.0, "floor_error": 0.0}
    assert written["tstr"] == 1.0
    assert "from only" not in said
    learned.clear()
    assert "real: from only 450" in said_of("--n", 451)
    assert [len(images) for images, _ in learned] == [451, 450]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--digit", "none", "--tstr"), USAGE),
        (("--steps", 10**6), USAGE),
        (("--digit", "none", "--guidance", 2), USAGE),
        (("--json", "scores.txt"), BAD_OUTPUT),
        (("--json", "/dev/null/scores.json"), BAD_OUTPUT),
        (("--json", REPO / "tests" / "losses.json"), BAD_OUTPUT),  # no scores, and not to be lost under them
    ],
)
def test_wrong_flags_are_told_before_anything_is_trained(latent_run, flags, code, tmp_path):
    place = ("--data", "embedded", "--cache-dir", tmp_path)
    result = call("common", "evaluate.py", "--ckpt", latent_run, *place, *flags)
    assert (result.code, len(result.errors)) == (code, 1), result.text
    assert not list(tmp_path.iterdir()), "no digits, no classifier"


@pytest.mark.parametrize("folder", [AE, LATENT, PIXEL])
def test_scores_during_training(folder, tiny, tiny_latent, judged, tmp_path):
    pixel = (*SMALL, "--fine-ch", 0, "--T", 4, *tiny)
    own = {AE: ("--model", "mlp", *tiny), LATENT: tiny_latent, PIXEL: pixel}[folder]
    result = call(folder, "train.py", *own, "--epochs", 2, "--eval-every", 2, "--outdir", tmp_path)
    assert result.code == 0, result.text
    rows = [json.loads(line) for line in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    wanted = {"fid"} if folder == AE else {"fid", "agreement", "fid_labelled", "agreement_labelled"}
    assert not wanted & rows[0].keys()
    assert wanted <= rows[1].keys()
    scores = newest_state(only_run(tmp_path))["scores"]
    assert (scores["fid"], scores["classifier"]) == (rows[1]["fid"], fingerprint(judged[0]))
    assert rows[1]["classifier"] == scores["classifier"]


def test_what_scores_need_is_looked_for_before_training(tiny, cache, tmp_path, monkeypatch):
    """A test split that cannot be had ends the run at its start, not at its first scored epoch."""
    load = mnist.load
    monkeypatch.setattr(mnist, "load", lambda split, *rest: load(split, *rest) if split == "train" else _missing())
    flags = ("--model", "mlp", *tiny, "--epochs", 9, "--outdir", tmp_path)
    result = call(AE, "train.py", *flags, "--eval-every", 9)
    assert (result.code, len(result.errors)) == (NO_DATA, 1), result.text
    assert "train_loss" not in result.text
    assert not list(tmp_path.glob("checkpoints/*"))
    assert call(AE, "train.py", *flags).code == 0  # which needs no test digits


def _missing():
    raise Exit(NO_DATA, "no test digits")


def test_what_is_scored_was_drawn_with_the_guide_and_the_seed(judged, cache, tmp_path, latent_run):
    flags = (
        "--ckpt",
        latent_run,
        "--n",
        200,
        "--data",
        "embedded",
        "--cache-dir",
        cache,
        "--json",
        tmp_path / "a.json",
    )
    found = []
    for more in ((), ("--guide", latent_run / "checkpoint_epoch_000001.pt", "--guide-scale", 50), ("--seed", 7)):
        result = call("common", "evaluate.py", *flags, *more)
        assert result.code == 0, result.text
        found.append(json.loads((tmp_path / "a.json").read_text()))
    assert len({scores["fid"] for scores in found}) == 3
    assert found[1]["details"]["settings"]["guide_scale"] == 50


def test_drawings_of_one_digit_are_compared_with_that_digit(latent_run, cache, judged, tmp_path, monkeypatch):
    """Also of a run that has seen them all; and so are, with --tstr, the real digits that a classifier learns from."""
    state = ckpt.read_checkpoint(latent_run / "latest.pt")
    state["args"] |= {"only_digit": None, "class_counts": [100] * 10}
    ckpt.save_checkpoint(tmp_path / "a.pt", state)
    compared = []

    def spy(images, wanted, real, *rest, **how):
        compared.append(set(real.labels.tolist()))
        return score(images, wanted, real, *rest, **how)

    def learn(_images, _labels, _real, learnable, _say):
        compared.append(set(learnable.labels.tolist()))
        return dict.fromkeys(("value", "error", "floor", "floor_error"), 0.0)

    monkeypatch.setattr(evaluate, "score", spy)
    monkeypatch.setattr(evaluate, "train_on_synthetic", learn)
    flags = ("--ckpt", tmp_path / "a.pt", "--n", 200, "--data", "embedded", "--cache-dir", cache, "--digit", 3)
    evaluate.main([str(flag) for flag in (*flags, "--tstr")])
    assert compared == [{3}, {3}]


def test_too_few_real_digits_are_compared_with_nothing(latent_run, cache, monkeypatch):
    few = HF_MNIST("test", cache, 3, "embedded").subset(torch.arange(FEWEST_REAL - 1))
    monkeypatch.setattr("common.scores.held_out", lambda *_: few)
    monkeypatch.setattr(classifier, "load_classifier", lambda *_: pytest.fail("judged all the same"))
    result = call("common", "evaluate.py", "--ckpt", latent_run, "--data", "embedded", "--cache-dir", cache)
    assert (result.code, len(result.text.splitlines())) == (NO_DATA, 1), result.text
    assert f"too few digits for tests, {FEWEST_REAL - 1}, to compare with" in result.text


def test_an_epoch_whose_images_are_not_finite_is_told_and_not_scored(monkeypatch):
    told, nothing = [], torch.full((2, 1, 28, 28), float("nan"))
    monkeypatch.setattr("common.scores.judges", lambda *_: (None, None, 1.0))
    session = SimpleNamespace(epoch=4, on_first=lambda work: work(), poll=None)
    session.args = SimpleNamespace(eval_every=2, epochs=4, only_digit=None, flags=dict)
    session.log = SimpleNamespace(info=None, debug=print, warning=told.append)
    assert epoch_scorer(session, {"": lambda: (nothing, None)})() == {}
    assert told == ["epoch 4 gives images that are not finite: not scored"]


@pytest.mark.slow
def test_the_classifier_outlives_a_job(judged, cache, tmp_path, latent_run):
    """Trained in a job, it is kept in $SCRATCH/hf_cache; the next job, with another $SLURM_TMPDIR, finds it."""
    scratch = tmp_path / "scratch" / "hf_cache" / "decoded"
    scratch.mkdir(parents=True)
    said = []
    for job in ("one", "two"):
        shutil.copytree(scratch.parent, tmp_path / job)  # as job.sh does
        for file in (cache / "decoded").glob("embedded-*"):
            shutil.copy(file, tmp_path / job / "decoded")
        env = {"SCRATCH": str(tmp_path / "scratch"), "SLURM_TMPDIR": str(tmp_path / job)}
        flags = ("--n", 200, "--data", "embedded", "--json", tmp_path / f"{job}.json")
        said.append(run(".", "-m common.evaluate", "--ckpt", latent_run, *flags, env=env))
        assert said[-1].code == 0, said[-1].text
    assert ["training the digit classifier" in result.text for result in said] == [True, False]
    assert [path.name for path in scratch.iterdir()] == [f"classifier-embedded-v{VERSION}.pt"]
    one, two = (json.loads((tmp_path / f"{job}.json").read_text())["details"]["classifier"] for job in ("one", "two"))
    assert one == two


def test_of_two_jobs_that_train_the_classifier_at_once_both_use_the_first(cache, tmp_path, monkeypatch):
    shutil.copytree(cache / "decoded", tmp_path / "decoded")
    path = tmp_path / "decoded" / f"classifier-embedded-v{VERSION}.pt"
    path.unlink(missing_ok=True)
    other = classifier.DigitClassifier()

    def train(*_args, **_options):
        ckpt.save_checkpoint(path, {"model": other.state_dict(), "accuracy": 0.5})
        return classifier.DigitClassifier().eval()

    monkeypatch.setattr(classifier, "train_classifier", train)
    net, accuracy = load_classifier(tmp_path, "embedded")
    assert (fingerprint(net), accuracy) == (fingerprint(other), 0.5)


def test_a_classifier_that_another_job_keeps_at_the_last_moment_is_taken(cache, tmp_path, monkeypatch):
    shutil.copytree(cache / "decoded", tmp_path / "decoded")
    path = tmp_path / "decoded" / f"classifier-embedded-v{VERSION}.pt"
    path.unlink(missing_ok=True)
    other = classifier.DigitClassifier()

    @contextlib.contextmanager
    def after_another(folder):
        ckpt.save_checkpoint(path, {"model": other.state_dict(), "accuracy": 0.5})
        assert folder == path.parent
        yield

    monkeypatch.setattr(classifier, "train_classifier", lambda *_, **__: classifier.DigitClassifier().eval())
    monkeypatch.setattr(classifier, "alone_in", after_another)
    assert fingerprint(load_classifier(tmp_path, "embedded")[0]) == fingerprint(other)


def test_figures_that_another_process_writes_at_the_last_moment_stay(latent_run, copy_of, cache, judged, monkeypatch):
    folder = copy_of(latent_run)
    said = io.StringIO()

    @contextlib.contextmanager
    def after_another(_folder):
        path, state = ckpt.read_model(folder, ("lddpm",))
        evaluate.scores_file(path).write_text(json.dumps({"timestamp": state["timestamp"], "fid_labelled": 1.0}))
        yield

    monkeypatch.setattr(evaluate, "alone_in", after_another)
    flags = ("--ckpt", folder, "--n", 200, "--data", "embedded", "--cache-dir", cache, "--sampler", "dpm")
    with contextlib.redirect_stdout(said):
        evaluate.main([str(flag) for flag in flags])
    written = json.loads(Path(re.search(r"ok: (\S+scores.json)", said.getvalue())[1]).read_text())
    assert written["fid_labelled"] == 1.0
    assert written["fid"] > 1
