"""Golden losses: the first twenty of every recipe, so that a refactoring cannot change the training unseen.

Where training is changed on purpose, `bash tests/run.sh -k losses --write-losses` writes losses.json anew: say in the
commit why.
"""

import json
from pathlib import Path

import pytest
from helpers import AE, LATENT, PIXEL, call, metrics, only_run

from common.learner import Learner

GOLDEN = Path(__file__).with_name("losses.json")
STEPS = 20  # two epochs of ten: 4,050 embedded digits to learn from
RATE = ("--lr", 2e-3, "--lr-scheduler", "cosine")  # so high that every step shows in the next losses


@pytest.fixture(scope="module")
def losses_of(cache, tmp_path_factory):
    """losses_of(recipe) -> {"training": its first twenty losses, "validation": those of its two epochs}."""
    outdir = tmp_path_factory.mktemp("losses")
    flags = {
        "ae-mlp": (AE, "--model", "mlp"),
        "ae-conv": (AE, "--model", "conv"),
        "lddpm": (LATENT, "--ae-ckpt-dir", outdir / "ae-mlp" / "checkpoints"),
        "ddpm": (PIXEL, "--base-ch", 8),
    }

    def losses_of(model):
        if model == "lddpm" and not (outdir / "ae-mlp").exists():
            losses_of("ae-mlp")
        folder, *own = flags[model]
        seen, gradient = [], Learner.gradient

        def watched(self, *what):
            loss = gradient(self, *what)
            seen.append(loss.item())
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "gradient", watched)
            where = ("--data", "embedded", "--cache-dir", cache, "--outdir", outdir / model, "--device", "cpu")
            result = call(folder, "train.py", *own, *where, "--batch-size", 405, "--epochs", 2, *RATE)
        assert result.code == 0, result.text
        return {"training": seen, "validation": [row["val_loss"] for row in metrics(only_run(outdir / model))]}

    return losses_of


@pytest.mark.parametrize("model", ["ae-mlp", "ae-conv", "lddpm", "ddpm"])
def test_losses_are_those_of_before(model, losses_of, pytestconfig):
    found = losses_of(model)
    assert len(found["training"]) == STEPS
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if pytestconfig.getoption("--write-losses"):
        rounded = {kind: [float(f"{loss:.6g}") for loss in losses] for kind, losses in found.items()}
        rows = (f'"{name}": {json.dumps(losses)}' for name, losses in (golden | {model: rounded}).items())
        GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        pytest.skip("written, not compared")
    for kind, losses in golden[model].items():
        assert found[kind] == pytest.approx(losses, rel=1e-4), f"{kind}: is the training meant to change?"
