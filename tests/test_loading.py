"""`from common import load, picture`: for notebooks and other programs; and which run a folder of runs means."""

import inspect
import pickle
import shutil

import numpy as np
import pytest
import torch
from forks import run as forked
from helpers import LATENT, call, make_run, state_of
from PIL import Image

from common import ckpt, load, picture, sampling
from common.autoencoder import build_autoencoder, read_autoencoder
from common.error_codes import MODEL_MISMATCH, Exit
from common.flags import DEFAULT_GUIDANCE
from common.images import save_image_grid, to_bytes
from common.modules import module_of
from common.run import require_checkpoint

THREES = [3, 3, 3]


def test_a_diffusion_draws_what_infer_draws(latent_run, tmp_path):
    run = load(latent_run, torch.device("cpu"))
    assert (run.model, run.name, run.epoch, run.flags["T"]) == ("lddpm", latent_run.name, 2, 20)
    assert repr(run) == f"<lddpm: {latent_run.name}, epoch 2>"
    draw, _ = module_of("lddpm").load_for_drawing(latent_run)
    for given, expected in (
        ({}, {"labels": [3] * 16}),  # it has seen no others
        ({"count": 3, "seed": 7}, {"labels": THREES, "seed": 7}),
        ({"labels": THREES}, {"labels": THREES, "guidance": DEFAULT_GUIDANCE}),
        ({"labels": THREES, "guidance": 2}, {"labels": THREES, "guidance": 2}),
        ({"labels": 3, "count": 3, "steps": 5}, {"labels": THREES, "guidance": DEFAULT_GUIDANCE, "steps": 5}),
        ({"count": 3, "sampler": "ddim", "steps": 4}, {"labels": THREES, "sampler": "ddim", "steps": 4}),
    ):
        images = run.draw(**given)
        assert images.dtype == torch.float32
        assert images.shape[1:] == (1, 28, 28)
        assert torch.equal(images, draw(**expected)), given
    flags = ("--ckpt", latent_run, "--digit", 3, "--num-images", 9, "--seed", 5, "--output", tmp_path / "a.png")
    assert call(LATENT, "infer.py", *flags, "--device", "cpu").code == 0
    mine = picture(run.draw(3, count=9, seed=5), scale=1)
    assert (np.asarray(mine) == np.asarray(Image.open(tmp_path / "a.png").convert("L"))).all()


def test_what_is_loaded_can_be_given_to_another_process(latent_run, tmp_path):
    """As a pool that starts its processes anew does."""
    run = load(latent_run, "cpu")
    (tmp_path / "run.pickle").write_bytes(pickle.dumps(run))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).draw(count=2).sum().item())"
    result = forked(".", "-c", code, tmp_path / "run.pickle")
    assert (result.code, result.text) == (0, f"{run.draw(count=2).sum().item()}\n")


def test_a_guide_is_loaded_beside_the_model_that_it_guides(latent_run, ae_run, tmp_path):
    first = latent_run / "checkpoint_epoch_000001.pt"
    flags = ("--ckpt", latent_run, "--digit", 3, "--num-images", 9, "--device", "cpu", "--output", tmp_path / "a.png")
    how = {"guidance": 99, "guidance_interval": (-1, 2), "guide_scale": 50}
    typed = ("--guidance", 99, "--guidance-interval", -1, 2, "--guide-scale", 50)
    assert call(LATENT, "infer.py", *flags, "--guide", first, *typed).code == 0
    run = load(latent_run, "cpu", guide=first)
    mine, theirs = picture(run.draw(3, count=9, **how), scale=1), Image.open(tmp_path / "a.png").convert("L")
    assert (np.asarray(mine) == np.asarray(theirs)).all()
    plain = load(latent_run, "cpu")
    assert not torch.equal(plain.draw(3, count=9, **dict(list(how.items())[:2])), run.draw(3, count=9, **how))
    with pytest.raises(ValueError, match="load the run with one"):
        plain.draw(3, count=9, **how)
    with pytest.raises(ValueError, match="guided"):
        load(ae_run, "cpu", guide=first)
    with pytest.raises(ValueError, match="ae-mlp"):
        load(latent_run, "cpu", guide=ae_run)


@pytest.mark.parametrize(
    "alike", [tuple, np.array, torch.tensor, lambda labels: torch.tensor(labels, dtype=torch.uint8)]
)
def test_lists_arrays_and_tensors_are_alike(alike, latent_run):
    run = load(latent_run, "cpu")
    assert torch.equal(run.draw(alike(THREES), steps=2), run.draw(THREES, steps=2))
    draw, _ = module_of("lddpm").load_for_drawing(latent_run)
    assert torch.equal(draw(labels=alike(THREES), steps=2), draw(labels=THREES, steps=2))


def test_a_seed_may_be_a_number_of_numpy(latent_run):
    run = load(latent_run, "cpu")
    assert torch.equal(run.draw(3, seed=np.int64(7), steps=2), run.draw(3, seed=7, steps=2))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"labels": [3, 10]}, "from 0 to 9; 10 is none"),
        ({"labels": -1}, "from 0 to 9; -1 is none"),
        ({"labels": [2.5]}, "2.5 is none"),
        ({"labels": "33"}, "'3' is none"),
        ({"labels": 3.0}, "3.0 is none"),
        ({"labels": []}, r"\[\] is none"),
        ({"labels": torch.tensor(3.0)}, "3.0 is none"),
        ({"labels": [3, 3], "count": 3}, "these are 2 labels, one for each image: count cannot be 3"),
        ({"labels": torch.tensor([[3]])}, r"\[3\] is none"),
        ({"labels": [3, 5]}, "trained on 3s only"),
        ({"count": 0}, "count must be a whole number of at least 1, not 0"),
        ({"count": 2.5}, "count must be a whole number of at least 1, not 2.5"),
        ({"labels": 3, "count": 0}, "count must be a whole number of at least 1, not 0"),
        ({"labels": 3, "guidance": -1}, "guidance must be a number from 0 to 1000, not -1"),
        ({"labels": 3, "guidance": float("nan")}, "guidance must be a number from 0 to 1000, not nan"),
        ({"labels": 3, "guidance": 1e39}, "guidance must be a number from 0 to 1000, not 1e\\+39"),
        ({"labels": 3, "guidance": "2"}, "guidance must be a number from 0 to 1000, not 2"),
        ({"labels": 3, "guidance": 2, "guidance_interval": (1, -1)}, "guidance_interval must be two numbers"),
        ({"labels": 3, "guidance": 2, "guidance_interval": 5}, "must be two numbers, the second the larger, not 5"),
        ({"labels": 3, "guidance": 2, "guidance_interval": (1, 2, 3)}, "guidance_interval must be two numbers"),
        ({"labels": 3, "guidance": 2, "guidance_interval": (9, 10)}, "9 to 10 has none of the timesteps"),
        ({"labels": 3, "guidance": 1, "guidance_interval": (-1, 1)}, "give a guidance other than 1"),
        ({"labels": 3, "guide_scale": 2}, "load the run with one"),
        ({"labels": 3, "guide_scale": float("nan")}, "guide_scale must be a number from 0 to 1000, not nan"),
        ({"steps": 21}, "steps must be a whole number from 1 to T = 20, not 21"),
        ({"steps": 2.5}, "steps must be a whole number from 1 to T = 20, not 2.5"),
        ({"steps": "3"}, "steps must be a whole number from 1 to T = 20, not 3"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"strength": "0.5"}, "strength must be greater than 0 and at most 1"),
        ({"resample": 1.5}, "resample must be at least 1 and at most 1000, not 1.5"),
        ({"resample": 10**9}, "resample must be at least 1 and at most 1000"),
        ({"sampler": None}, "sampler must be one of"),
        ({"sampler": "euler"}, "'euler'"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_a_value_error(wrong, said, latent_run):
    with pytest.raises(ValueError, match=said):
        load(latent_run, "cpu").draw(**wrong)


def test_an_autoencoder_encodes_and_decodes(ae_run):
    run = load(ae_run / "best", "cpu")
    net = build_autoencoder(read_autoencoder(ae_run / "best"))
    images = torch.rand(3, 1, 28, 28)
    latents = run.encode(images)
    assert torch.equal(latents, net.encode(images))
    flipped = images.flip(2).numpy()[:, :, ::-1]
    for alike in (images.tolist(), images.double().numpy(), images.numpy().astype(">f4"), flipped, images.to_sparse()):
        assert torch.equal(run.encode(alike), latents)
    assert torch.equal(run.decode(latents), net.decode(latents))
    assert torch.equal(run.encode(images[:, 0]), latents)
    for wrong in (lambda: run.encode(latents), lambda: run.decode(images), lambda: run.decode(latents[0])):
        with pytest.raises(ValueError, match=r"must be of shape \("):
            wrong()
    with pytest.raises(ValueError, match="must be from 0"):  # bytes, as pictures and --save-npz have them
        run.encode(images.mul(255).byte())


def test_what_cannot_be_loaded_is_a_value_error(latent_run, tmp_path, copy_of):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for path in (tmp_path / "empty", tmp_path / "text.pt", tmp_path / "nothing.pt", str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match=str(path)) as raised:
            load(path)
        assert len(str(raised.value).splitlines()) == 1
        assert raised.value.__suppress_context__  # one line, not two tracebacks
    for nothing in (None, 3, b"run", "~no-such-user/run"):
        with pytest.raises(ValueError, match="names no checkpoint"):
            load(nothing)
    with pytest.raises(ValueError, match="names no checkpoint"):
        load(latent_run, guide=3)
    with pytest.raises(ValueError, match="no such kind of device"):
        load(latent_run, "gpu")


def test_a_picture_is_the_grid_and_scales(tmp_path):
    images = torch.rand(5, 1, 28, 28)
    save_image_grid(images, tmp_path / "a.png", nrow=2)
    small = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert (np.asarray(picture(images, nrow=2, scale=1)) == small).all()
    assert (np.asarray(picture(images.numpy(), nrow=2, scale=1)) == small).all()
    with pytest.raises(ValueError, match="no images"):
        picture(images[:0])
    assert (np.asarray(picture(images, nrow=2)) == small.repeat(2, 0).repeat(2, 1)).all()
    assert picture(images[0], scale=1).size == (28, 28)  # a single one has no frame
    assert picture(images).size == picture(images, nrow=3).size
    assert (np.asarray(picture(images[:, 0], nrow=2, scale=1)) == small).all()
    kept = to_bytes(images)[:, 0].numpy()  # as --save-npz keeps them
    assert (np.asarray(picture(kept, nrow=2, scale=1)) == small).all()
    assert (np.asarray(picture(list(kept), nrow=2, scale=1)) == small).all()
    for wrong in (images[0, 0, 0], images.expand(5, 3, 28, 28)):
        with pytest.raises(ValueError, match="images are"):
            picture(wrong)
    for wrong in (kept.astype(int), 2 * images - 1, images * float("nan"), {}, "a.png"):
        with pytest.raises(ValueError, match=r"images (must be from 0|are numbers)"):
            picture(wrong)
    for wrong in ({"nrow": 0}, {"nrow": 2.0}, {"scale": 0}, {"scale": "2"}):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            picture(images, **wrong)
    picture(images.requires_grad_())


def test_the_options_of_both_models_are_those_of_draw():
    parameters = inspect.signature(sampling.draw).parameters.values()
    options = {
        it.name: it.annotation
        for it in parameters
        if it.kind is it.KEYWORD_ONLY and it.name not in ("to_images", "of_images")
    }
    assert sampling.Drawing.__annotations__.keys() == options.keys()
    assert {name: it.__forward_arg__ for name, it in sampling.Drawing.__annotations__.items()} == options


# --- a folder of runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(ae_run, latent_run, tmp_path):
    """A folder as a cluster's jobs leave it: an autoencoder, and a latent diffusion that is newer."""
    for run in (ae_run, latent_run):
        shutil.copytree(run, tmp_path / "checkpoints" / run.name, symlinks=True)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    return tmp_path / "checkpoints"


def test_a_folder_of_runs_means_its_newest_run_of_the_kind(runs, ae_run, latent_run):
    assert load(runs, "cpu").name == latent_run.name
    assert ckpt.read_model(runs, ("lddpm", "ddpm"))[0].parent.name == latent_run.name
    assert read_autoencoder(runs)["exp_name"] == ae_run.name
    path, state = ckpt.read_model(runs, ("ae-mlp",))
    assert (path.name, state["epoch"]) == ("checkpoint_epoch_000002.pt", 2)
    with pytest.raises(Exit, match="holds no run of type ddpm") as raised:
        ckpt.read_model(runs, ("ddpm",))
    assert raised.value.code == MODEL_MISMATCH


@pytest.mark.parametrize("scratch", [True, False])
def test_latest_is_the_newest_run_that_is_trained_from_here(scratch, runs, ae_run, latent_run, tmp_path, monkeypatch):
    monkeypatch.delenv("SCRATCH", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^latest: no run in outputs/checkpoints: train one"):
        load("latest", "cpu")
    if scratch:
        monkeypatch.setenv("SCRATCH", str(tmp_path))
    else:
        (tmp_path / "outputs").symlink_to(tmp_path)
    assert load("latest", "cpu").name == latent_run.name
    assert ckpt.read_model("latest", ("ae-mlp",))[0].parent.name == ae_run.name
    with pytest.raises(Exit, match="holds no run of type ddpm"):
        ckpt.read_model("latest", ("ddpm",))
    if scratch:  # where jobs leave theirs
        (tmp_path / "ddpm-output" / "checkpoints").mkdir(parents=True)
        shutil.move(runs / latent_run.name, tmp_path / "ddpm-output" / "checkpoints")
        assert load("latest", "cpu").name == latent_run.name
        with pytest.raises(Exit, match=f"the newest run here would be --ckpt .*ddpm-output.*{latent_run.name}"):
            require_checkpoint(None, ("lddpm",))
    (tmp_path / "latest").mkdir()  # a folder of that name is that folder
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load("latest", "cpu")


def test_newest_is_by_what_the_runs_recorded(tmp_path):
    for name, day in (("old", 1), ("new", 2)):
        make_run(tmp_path / name, time=f"2026-01-{day:02}T00:00:00+00:00")
    (tmp_path / "old" / "checkpoint_epoch_000003.pt").touch()
    assert ckpt.read_model(tmp_path, ("ae-mlp",))[0].parent.name == "new"


def test_a_run_is_no_folder_of_runs(tmp_path):
    run = make_run(tmp_path / "run", [1])
    make_run(run / "nested", [1], time="2027-01-01T00:00:00+00:00")
    assert ckpt.read_model(run, ("ae-mlp",))[0].parent == run


def test_a_damaged_run_is_passed_over_for_the_one_before(tmp_path):
    for name, day in (("old", 1), ("new", 2)):
        make_run(tmp_path / name, [1], time=f"2026-01-{day:02}T00:00:00+00:00")
    file = tmp_path / "new" / "checkpoint_epoch_000001.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF  # a glance does not see it, the checksum does
    file.write_bytes(content)
    said = []
    assert ckpt.read_model(tmp_path, ("ae-mlp",), said.append)[0].parent.name == "old"
    assert any("checksum" in text for text in said)


def test_load_warns_of_a_damaged_file(latent_run, copy_of):
    run = copy_of(latent_run)
    (run / "checkpoint_epoch_000002.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="passing over .*empty"):
        assert load(run, "cpu").epoch == 1


def test_other_projects_files_are_not_ours(tmp_path):
    ckpt.save_checkpoint(tmp_path / "run" / "checkpoint_epoch_000001.pt", state_of(1) | {"args": {"model": "gan"}})
    with pytest.raises(Exit, match="holds no run"):
        ckpt.read_model(tmp_path, ckpt.MODEL_TYPES)
