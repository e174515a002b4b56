"""Which autoencoder a latent training takes, and what it writes down about it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import AE, LATENT, call, inside, make_run, newest_state, only_run, recipe

from common.args import AUTO
from common.autoencoder import describe, find_autoencoder
from common.error_codes import MODEL_MISMATCH, NO_AE_CHECKPOINT


def gather(*runs, into):
    """An output folder that holds copies of runs."""
    for run in runs:
        shutil.copytree(run, into / "checkpoints" / run.name, symlinks=True)
    return into


def train(outdir, tiny, *flags):
    """Train latent diffusion for an epoch; returns (flags in its checkpoint, run folder)."""
    result = call(LATENT, "train.py", "--T", 5, "--hidden-dim", 16, "--epochs", 1, "--outdir", outdir, *tiny, *flags)
    assert result.code == 0, result.text
    folder = only_run(outdir, "lddpm-*")
    return newest_state(folder)["args"], folder


def test_conv_is_found_before_mlp_and_mlp_without_conv(ae_run, conv_run, tiny, tmp_path):
    both, folder = train(gather(ae_run, conv_run, into=tmp_path / "both"), tiny)
    assert (both["ae_model"], both["ae_latent_dim"], both["ae_only_digit"]) == ("ae-conv", 16, 3)
    assert folder.name.startswith("lddpm-Eae-conv-d3-bs64-")
    assert "-D16-T5-seed42-" in folder.name
    mlp, folder = train(gather(ae_run, into=tmp_path / "mlp"), tiny)
    assert mlp["ae_model"] == "ae-mlp"
    assert folder.name.startswith("lddpm-Eae-mlp-d3-")
    assert mlp["ae_ckpt"].startswith(str(tmp_path / "mlp" / "checkpoints" / ae_run.name))


def test_a_folder_of_autoencoders_or_one_run(ae_run, conv_run, tiny, tmp_path):
    autoencoders = gather(ae_run, conv_run, into=tmp_path / "ae") / "checkpoints"
    assert train(tmp_path / "1", tiny, "--ae-ckpt-dir", autoencoders)[0]["ae_model"] == "ae-conv"
    assert train(tmp_path / "2", tiny, "--ae-ckpt-dir", autoencoders / ae_run.name)[0]["ae_model"] == "ae-mlp"
    assert train(tmp_path / "3", tiny, "--ae-ckpt", ae_run / "best")[0]["ae_model"] == "ae-mlp"


def test_a_damaged_autoencoder_is_passed_over(ae_run, conv_run, tmp_path):
    checkpoints = gather(ae_run, conv_run, into=tmp_path) / "checkpoints"
    (checkpoints / conv_run.name / "checkpoint_epoch_000001.pt").write_bytes(b"")
    warnings = []
    found = find_autoencoder([checkpoints], 3, warnings.append)
    assert found["path"] == str(checkpoints / ae_run.name / "checkpoint_epoch_000002.pt")
    assert len(warnings) == 1


def test_the_digit_is_the_autoencoders(ae_run, cache, tmp_path):
    flags = (
        "--ae-ckpt",
        ae_run,
        "--T",
        5,
        "--hidden-dim",
        16,
        "--epochs",
        1,
        "--data",
        "embedded",
        "--cache-dir",
        cache,
    )
    result = call(LATENT, "train.py", *flags, "--outdir", tmp_path)
    assert result.code == 0, result.text
    assert newest_state(only_run(tmp_path))["args"]["only_digit"] == 3


def test_names_once_the_autoencoder_is_known():
    with inside(LATENT):
        latent = recipe(LATENT, "train.py")
    args = latent.parse_args(["--batch-size", "64", "--lr", "1e-3", "--seed", "7"])
    args.derive(ae_model="ae-conv", ae_latent_dim=8, only_digit=None)
    assert latent.experiment_name(args) == "lddpm-Eae-conv-dall-bs64-lr0.001-D8-T1000-seed7"
    with inside(AE):
        ae = recipe(AE, "train.py")
    assert ae.experiment_name(ae.parse_args(["--model", "conv"])).startswith("ae-conv-dall-bs128-")


def test_the_deviation_of_latents_is_that_of_their_dimensions():
    with inside(AE):
        ae = recipe(AE, "train.py")
    latents = torch.tensor([[-1.0, -11.0], [1.0, -9.0]])
    found = ae.latent_statistics(SimpleNamespace(encode=lambda images: images), latents)
    assert found == pytest.approx({"latent/mean": -5, "latent/std": 1, "latent/max": 11})


@pytest.mark.parametrize("flag", ["--hidden-dim", "--T"])
def test_the_denoisers_shape_is_fixed_too(latent_run, flag):
    result = call(LATENT, "train.py", "--resume", latent_run, "--epochs", 9, flag, 77)
    assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
    assert f"{flag} 77" in result.errors[0]


def test_another_autoencoder_does_not_slip_in(latent_run, conv_run):
    result = call(LATENT, "train.py", "--resume", latent_run, "--epochs", 9, "--ae-ckpt", conv_run)
    assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text


def test_full_mnists_autoencoder_comes_before_the_embedded_digits(tmp_path):
    for name, model, data in (("a", "ae-mlp", "hub"), ("b", "ae-conv", "embedded")):
        make_run(tmp_path / name, [1], args={"model": model, "data": data, "epochs": 1, "latent_dim": 16})
    found = find_autoencoder([tmp_path], AUTO, pytest.fail)
    assert found["args"]["data"] == "hub"
    assert "all embedded digits" in describe(found | {"args": {"model": "ae-conv", "data": "embedded"}})


def test_a_folder_without_an_autoencoder_is_no_other_runs(latent_run, copy_of, tiny, tmp_path):
    outdir = copy_of(latent_run).parent.parent
    flags = ("--T", 20, "--hidden-dim", 16, "--amp", *tiny, "--epochs", 3, "--outdir", outdir, "--auto-resume")
    result = call(LATENT, "train.py", *flags, "--ae-ckpt-dir", tmp_path)
    assert result.code == NO_AE_CHECKPOINT, result.text
    assert "has --ae-ckpt-dir none, not " in result.text  # it is that flag alone: without it these are the run's
    assert call(LATENT, "train.py", *flags).code == 0
