"""Other devices than the CPU: what a stand-in for them can show on any machine (see fake_device.py), and CUDA itself."""

from unittest import mock

import pytest
from fake_device import FakeDevice
from helpers import AE, LATENT, PIXEL, call, newest_state, only_run

from common.classifier import load_classifier

RECIPES = {
    "ae-mlp": (AE, "--model", "mlp"),
    "ae-conv": (AE, "--model", "conv"),
    "latent": (LATENT, "--T", 20, "--hidden-dim", 16, "--samples-per-epoch", 4),
    "pixel": (PIXEL, "--base-ch", 8, "--T", 20, "--samples-per-epoch", 4),
}
KINDS = ("mps", "cuda")


@pytest.fixture(scope="module")
def train(tiny, ae_run, cache):
    """train(recipe, device, outdir, *flags): a run of the script, in this process."""
    load_classifier(cache, "embedded")  # it is trained on the CPU, where the stand-in would only slow it down

    def run(recipe, device, outdir, *flags):
        folder, *own = RECIPES[recipe]
        own += ["--ae-ckpt", ae_run] if recipe == "latent" else []
        return call(folder, "train.py", *own, *tiny, "--batch-size", 16, "--device", device, "--outdir", outdir, *flags)

    with mock.patch("common.drawing.EVAL_IMAGES", 100):
        yield run


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """trained(recipe, kind) -> (run folder, FakeDevice): two epochs with pictures and scores, once each."""
    done = {}

    def get(recipe, kind):
        if (recipe, kind) not in done:
            outdir = tmp_path_factory.mktemp(f"{recipe}-{kind}")
            with FakeDevice(kind) as device:
                result = train(recipe, kind, outdir, "--epochs", 2, "--generate-images", "--eval-every", 2)
            assert result.code == 0, result.text
            done[recipe, kind] = only_run(outdir), device
        return done[recipe, kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_validates_previews_and_scores(recipe, kind, trained):
    folder, device = trained(recipe, kind)
    assert newest_state(folder)["scores"]["fid"] > 0
    assert len(list((folder.parent.parent / "samples" / folder.name).glob("epoch_*.png"))) == 2
    assert device.counted("to device")
