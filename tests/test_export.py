"""infer.py --export: a small file from which everything draws, and that nobody takes for a run."""

import json

import pytest
import torch
from forks import run
from helpers import AE, LATENT, PIXEL, REPO, assert_same, call, newest_state, only_run
from PIL import Image

from common import ckpt, load
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, MODEL_MISMATCH, USAGE
from common.export import PLACES, reduced


@pytest.fixture(scope="module")
def runs(latent_run, pixel_run, ae_run, conv_run):
    """A trained run of every kind, by (folder, kind)."""
    return {"lddpm": latent_run, "ddpm": pixel_run, "ae-mlp": ae_run, "ae-conv": conv_run}


FOLDER = {"lddpm": LATENT, "ddpm": PIXEL, "ae-mlp": AE, "ae-conv": AE}


@pytest.fixture(scope="module")
def files(runs, tmp_path_factory):
    """What is exported from each, by kind."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, trained in runs.items():
        result = call(FOLDER[kind], "infer.py", "--ckpt", trained, "--export", folder / f"{kind}.pt")
        assert result.code == 0, result.text
        assert f"{kind}.pt" in result.text
    return {kind: folder / f"{kind}.pt" for kind in runs}


def texts(value):
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in texts(key) + texts(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in texts(inner)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("kind", FOLDER)
def test_it_holds_what_drawing_needs_and_nothing_of_the_place_it_comes_from(kind, files, runs):
    state, source = torch.load(files[kind], weights_only=True), newest_state(runs[kind])
    assert not state.keys() & {"ema", "optimizer", "scaler", "running", "scores"}
    assert state["args"] == {name: value for name, value in source["args"].items() if name not in PLACES}
    networks = [state["model"]] + ([state["ae_ckpt_data"]["model"]] if kind == "lddpm" else [])
    count = size = 0
    for tensor in (tensor for network in networks for tensor in network.values()):
        assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else tensor.dtype)
        count, size = count + tensor.numel(), size + (4 if tensor.ndim < 2 else 2) * tensor.numel()
    assert files[kind].stat().st_size < size + 40_000
    assert size < 2.2 * count + 16_000
    for text in texts(state):
        assert str(runs[kind].parent.parent) not in text
        assert "/" not in text or text.startswith(f"cd {AE} && python train.py"), text
    averaged = {key.removeprefix("module."): value for key, value in (source["ema"] or source["model"]).items()}
    for name, tensor in state["model"].items():
        torch.testing.assert_close(tensor.float(), averaged[name].float(), rtol=5e-4, atol=1e-6)
        if tensor.ndim < 2:
            assert_same(tensor, averaged[name], name)


@pytest.mark.parametrize("kind", ["lddpm", "ddpm"])
@pytest.mark.parametrize("how", [{}, {"sampler": "dpm"}, {"labels": 3, "guidance": 2.0}])
def test_it_draws_nearly_what_its_run_draws_in_float32(kind, how, files, runs):
    one, other = load(runs[kind], "cpu"), load(files[kind], "cpu")
    assert {parameter.dtype for parameter in other.drawer.args[0].parameters()} == {torch.float32}
    drawn, wanted = other.draw(seed=1, **how), one.draw(seed=1, **how)
    assert drawn.dtype == torch.float32
    difference = (drawn - wanted).abs()
    assert difference.mean() < 1e-3
    assert difference.max() < 0.03
    assert not torch.equal(drawn, wanted)


@pytest.mark.parametrize("kind", ["ae-mlp", "ae-conv"])
def test_an_exported_autoencoder_rebuilds_nearly_what_its_run_does(kind, files, runs, cache, tmp_path):
    one, other, images = load(runs[kind], "cpu"), load(files[kind], "cpu"), torch.rand(4, 1, 28, 28)
    assert {parameter.dtype for parameter in other.net.parameters()} == {torch.float32}
    assert (one.decode(one.encode(images)) - other.decode(other.encode(images))).abs().max() < 0.01
    flags = ("--ckpt", files[kind], "--output", tmp_path / "a.png", "--data", "embedded", "--cache-dir", cache)
    assert call(AE, "infer.py", *flags).code == 0


@pytest.mark.parametrize("kind", ["lddpm", "ddpm"])
def test_infer_draws_from_it(kind, files, tmp_path):
    flags = ("--ckpt", files[kind], "--num-images", 4, "--steps", 2, "--device", "cpu", "--output", tmp_path / "a.png")
    assert call(FOLDER[kind], "infer.py", *flags).code == 0
    assert Image.open(tmp_path / "a.png").size == (62, 62)


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("kind", ["lddpm", "ae-mlp"])
def test_evaluate_scores_it(kind, files, cache, tmp_path):
    target = tmp_path / "a.json"
    flags = ("--ckpt", files[kind], "--n", 200, "--data", "embedded", "--cache-dir", cache, "--json", target)
    result = run(".", "-m common.evaluate", *flags)
    assert result.code == 0, result.text
    assert json.loads(target.read_text())["fid"] > 0


def test_inspect_tells_what_it_is_and_how_it_was_made(files, runs):
    shown = run(".", "-m common.inspect_ckpt", files["lddpm"], "--verify")
    assert shown.code == 0, shown.text
    assert "exported  for drawing, in float16" in shown.text
    assert "cd mnist_latent_diffusion && python train.py --epochs 2 --generate-images --amp --T 20" in shown.text
    assert "cd mnist_ae && python train.py --model mlp --epochs 2" in shown.text
    info = json.loads(run(".", "-m common.inspect_ckpt", files["lddpm"], "--json").text)
    assert info["exported"]["scores"] == {}
    plain = json.loads(run(".", "-m common.inspect_ckpt", runs["lddpm"], "--json").text)
    assert plain["exported"] is None


def test_its_scores_are_its_checkpoints_own(latent_run, copy_of, tmp_path):
    trained = copy_of(latent_run)
    scores = {"timestamp": newest_state(trained)["timestamp"], "fid": 0.25, "details": {"figures": {}}}
    (trained / "checkpoint_epoch_000002.scores.json").write_text(json.dumps(scores))
    for source, wanted in (
        (trained, scores),
        (trained / "latest.pt", scores),
        (trained / "checkpoint_epoch_000001.pt", {}),
    ):
        assert call(LATENT, "infer.py", "--ckpt", source, "--export", tmp_path / "a.pt").code == 0  # over the last one
        assert ckpt.read_checkpoint(tmp_path / "a.pt")["exported"]["scores"] == wanted, source
    assert call(LATENT, "infer.py", "--ckpt", trained, "--export", tmp_path / "a.pt").code == 0
    assert "fid=0.25" in run(".", "-m common.inspect_ckpt", tmp_path / "a.pt").text
    (trained / "config.json").unlink()
    (trained / "checkpoint_epoch_000002.scores.json").write_text("torn")
    assert call(LATENT, "infer.py", "--ckpt", trained, "--export", tmp_path / "a.pt").code == 0
    assert ckpt.read_checkpoint(tmp_path / "a.pt")["exported"]["scores"] == {}
    assert not any("latent" in text for text in ckpt.read_checkpoint(tmp_path / "a.pt")["exported"]["commands"])


@pytest.mark.parametrize("kind", ["lddpm", "ddpm", "ae-mlp"])
@pytest.mark.parametrize("auto", [(), ("--auto-resume",)])
def test_it_cannot_be_trained_on(kind, auto, files, tiny, tmp_path):
    result = call(FOLDER[kind], "train.py", "--resume", files[kind], *auto, "--epochs", 3, "--outdir", tmp_path / "out")
    assert result.code == MODEL_MISMATCH, result.text
    (line,) = result.errors
    assert "was exported for drawing (infer.py --export)" in line
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_an_exported_autoencoder_can_be_diffused_on(files, tiny, tmp_path):
    flags = ("--ae-ckpt", files["ae-mlp"], "--T", 20, "--hidden-dim", 16, "--epochs", 1, *tiny)
    result = call(LATENT, "train.py", *flags, "--outdir", tmp_path)
    assert result.code == 0, result.text
    assert newest_state(only_run(tmp_path))["ae_ckpt_data"]["model"]["decoder.0.layer.weight"].dtype == torch.float16
    assert load(only_run(tmp_path), "cpu").draw(count=2).isfinite().all()


def test_it_is_no_run_to_be_ranked(files, runs, copy_of):
    alone = run(".", "-m common.find_best_ckpt", files["lddpm"])
    assert (alone.code, len(alone.text.splitlines())) == (BAD_CHECKPOINT, 1), alone.text
    assert "was exported for drawing" in alone.text
    trained = copy_of(runs["lddpm"])
    (trained / "mine.pt").write_bytes(files["lddpm"].read_bytes())
    ranked = run(".", "-m common.find_best_ckpt", trained)
    assert ranked.code == 0, ranked.text
    (line,) = [line for line in ranked.text.splitlines() if "mine.pt" in line]
    assert "passing over" in line
    assert len(ckpt.recorded_runs([trained.parent], pytest.fail)) == 1
    assert load(trained, "cpu").path.name == "checkpoint_epoch_000002.pt"


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--export", "a.pt", "--digit", 3), USAGE, "leave out --digit"),
        (("--export", "a.pt", "--num-images", 64), USAGE, "leave out --num-images"),
        (("--export", "a.png"), BAD_OUTPUT, "ends in .pt"),
        (("--export", "/proc/nowhere/a.pt"), BAD_OUTPUT, "cannot write"),
        (("--export", "latest.pt"), BAD_OUTPUT, "give another name"),
        (("--export", "checkpoint_epoch_000007.pt"), BAD_OUTPUT, "give another name"),
        (("--export", "other.pt"), BAD_OUTPUT, "exists, and is no exported file"),
        (("--export", "run.pt"), BAD_OUTPUT, "exists, and is no exported file"),
    ],
    ids=str,
)
def test_a_wrong_export_is_one_line_and_overwrites_nothing(flags, code, said, latent_run, tmp_path):
    (tmp_path / "other.pt").write_text("mine")
    (tmp_path / "run.pt").write_bytes((latent_run / "latest.pt").read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    paths = [tmp_path / flag if isinstance(flag, str) and "." in flag and flag[0] != "/" else flag for flag in flags]
    result = call(LATENT, "infer.py", "--ckpt", latent_run, *paths)
    assert result.code == code, result.text
    assert len(result.text.splitlines()) == 1, result.text
    assert said in result.text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cannot_be_exported_is_one_line(files, runs, tmp_path):
    state = newest_state(runs["ddpm"])
    state["ema"]["module.stem.1.layer.weight"][0] = float("nan")
    ckpt.save_checkpoint(tmp_path / "nan.pt", state)
    for folder, source, code, said in (
        (LATENT, files["lddpm"], MODEL_MISMATCH, "was exported for drawing"),
        (LATENT, runs["ae-mlp"], MODEL_MISMATCH, "lddpm is needed"),
        (AE, runs["ddpm"], MODEL_MISMATCH, "is needed"),
        (PIXEL, tmp_path / "nan.pt", BAD_CHECKPOINT, "no numbers"),
        (PIXEL, tmp_path / "nothing.pt", BAD_CHECKPOINT, "no such file"),
    ):
        result = call(folder, "infer.py", "--ckpt", source, "--export", tmp_path / "a.pt")
        assert (result.code, len(result.text.splitlines())) == (code, 1), result.text
        assert said in result.text
    result = call(AE, "infer.py", "--ckpt", runs["ae-mlp"], "--export", tmp_path / "a.pt", "--interpolate")
    assert (result.code, len(result.errors)) == (USAGE, 1), result.text
    assert not (tmp_path / "a.pt").exists()


def test_what_float16_cannot_hold_stays_as_it_is(tmp_path):
    """It would round a table of places, as some networks keep one, from 2,048 on; and nothing above 65,504 fits."""
    weights = {"places": torch.arange(3000, 3004).view(2, 2), "mask": torch.ones(2, 2, dtype=torch.bool)}
    weights["large"] = torch.tensor([[1e6, 1.0]])
    args = {"model": "ddpm", "network": "mine"}
    state = {"model": weights | {"w": torch.ones(2, 2)}, "args": args, "epoch": 1, "exp_name": "x", "format": 1}
    made = reduced(tmp_path / "a.pt", state)["model"]
    for name, tensor in weights.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor)
    assert made["w"].dtype == torch.float16
    causal = torch.full((2, 2), float("-inf")).triu(1)  # a buffer of attention's
    state["model"] = {"causal": causal}
    assert torch.equal(reduced(tmp_path / "a.pt", state)["model"]["causal"], causal.half())


def test_a_file_of_data_is_named_and_its_place_is_not(tmp_path):
    run = tmp_path / "checkpoints" / "x"
    run.mkdir(parents=True)
    place = str(tmp_path / "mine.npz")
    words = ([f"--data={place}"], ["--data", place], ["--data", "hub:a/b", "--lr", "0.1"])
    starts = [{"command": ["train.py", *some]} for some in words]
    starts += [{"command": odd} for odd in (7, [], [None], ["train.py", 5])] + [{}, None]
    (run / "config.json").write_text(json.dumps({"starts": starts}))
    args = {"model": "ddpm", "data": place, "dataset": "0123456789ab"}
    state = {"model": {"w": torch.ones(2, 2)}, "args": args, "epoch": 1, "exp_name": "x", "format": 1}
    made = reduced(run / "a.pt", state)
    assert (made["args"]["data"], made["args"]["dataset"]) == ("mine.npz", "0123456789ab")
    typed = [command.split("train.py ")[1] for command in made["exported"]["commands"]]
    assert typed == ["--data=mine.npz", "--data mine.npz", "--data hub:a/b --lr 0.1"]


def test_how_it_was_trained_is_said_once(tmp_path):
    """However often it was resumed, and under whatever flags that concern only the place."""
    run = tmp_path / "checkpoints" / "x"
    run.mkdir(parents=True)
    words = ([], ["--auto-resume"], ["--no-auto-resume", "--outdir", "o"], ["--epochs", "9"], [])
    starts = [{"command": ["train.py", *some, "--lr", "0.1"]} for some in words]
    (run / "config.json").write_text(json.dumps({"starts": starts}))
    state = {"model": {"w": torch.ones(2, 2)}, "args": {"model": "ddpm"}, "epoch": 1, "exp_name": "x", "format": 1}
    typed = [command.split("train.py ")[1] for command in reduced(run / "a.pt", state)["exported"]["commands"]]
    assert typed == ["--lr 0.1", "--epochs 9 --lr 0.1"]


@pytest.mark.parametrize(("folder", "known"), [("ae", True), ("another", False)])
def test_the_autoencoders_commands_are_those_of_its_own_run(folder, known, tmp_path):
    """And not of whatever lies by now where it lay: jobs often use the same folders again."""
    run = tmp_path / "checkpoints" / folder
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"starts": [{"command": ["train.py", "--lr", "0.1"]}]}))
    common = {"model": {"w": torch.ones(2, 2)}, "epoch": 1, "format": 1}
    inner = {**common, "args": {"model": "ae-mlp"}, "exp_name": "ae", "path": str(run / "a.pt")}
    state = {**common, "args": {"model": "lddpm"}, "exp_name": "x", "ae_ckpt_data": inner}
    commands = reduced(tmp_path / "b.pt", state)["exported"]["commands"]
    assert commands == ([f"cd {AE} && python train.py --lr 0.1"] if known else [])


def test_the_pretrained_model_draws_and_says_where_it_comes_from():
    path = REPO / LATENT / "pretrained.pt"
    if not path.is_file():
        pytest.skip(f"no {path.name} has been exported yet")
    assert path.stat().st_size <= 6_000_000
    exported = ckpt.read_checkpoint(path)["exported"]
    assert [command.split()[1] for command in exported["commands"]] == [AE, LATENT]
    assert {"fid", "fid_labelled"} <= exported["scores"].keys()
    images = load(path, "cpu").draw(list(range(10)), sampler="dpm")
    assert 0.05 < images.mean() < 0.25
    assert images.amax((1, 2, 3)).min() > 0.5
