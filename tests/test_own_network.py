"""A network of one's own: any module with forward(x, t, labels), or forward(x, t), is enough for everything."""

import json
import shutil

import numpy as np
import pytest
import torch
from forks import run
from helpers import AE, LATENT, PIXEL, REPO, assert_same_training, call, newest_state, only_run

from common import ckpt, classifier, diffusion, load, modules, sampling, threads
from common.error_codes import MODEL_MISMATCH, NO_MODEL_SPECIFIED, OK, USAGE
from common.modules import module_of
from common.play import drawings as play
from common.play.runs import Shelf, find
from common.play.worker import Wish

KINDS = {PIXEL: ("ddpm", "Denoiser", (1, 28, 28)), LATENT: ("lddpm", "LatentDenoiser", (16,))}
LABELLED = """
import torch
from torch import nn

class {kind}(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.told = nn.Embedding(11, width)
        self.body = nn.Sequential(nn.Linear({size} + 1 + width, 32), nn.Dropout(0.2), nn.SiLU(), nn.Linear(32, {size}))

    def forward(self, x, t, labels):
        assert torch.is_grad_enabled() or not self.training, "validated or drawn with dropout"
        rows = torch.cat([x.flatten(1), t[:, None] / 20, self.told(labels)], dim=1)
        return self.body(rows).view_as(x)
"""
UNLABELLED = """
import torch
from torch import nn

class {kind}(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear({size} + 1, 32), nn.SiLU(), nn.Linear(32, {size}))

    def forward(self, x, t):
        return self.body(torch.cat([x.flatten(1), t[:, None] / 20], dim=1)).view_as(x)
"""


def text_of(source: str, folder: str) -> str:
    _, kind, shape = KINDS[folder]
    return source.format(kind=kind, size=int(np.prod(shape)))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(folder, name, text): a module beside a copy of that experiment's model.py, which this process takes."""
    modules._module.cache_clear()

    def write(folder, name, text):
        model, _, _ = KINDS[folder]
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        shutil.copy(REPO / folder / "model.py", place)
        (place / f"{name}.py").write_text(text)
        monkeypatch.setitem(modules.MODULE_FILES, model, str(place / "model.py"))
        modules._module.cache_clear()

    yield write
    modules._module.cache_clear()


@pytest.fixture
def flags(tiny, tmp_path, request):
    """flags(folder): those of a small run."""

    def flags(folder):
        own = ("--ae-ckpt", request.getfixturevalue("ae_run")) if folder == LATENT else ()
        where = ("--outdir", tmp_path / "out")
        return (*own, "--T", 20, *tiny, "--epochs", 1, *where, "--samples-per-epoch", 4)

    return flags


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, into which a test may write."""
    left_out = shutil.ignore_patterns("outputs", "hf_cache", ".*", "__pycache__", "tests", "figures")
    return shutil.copytree(REPO, tmp_path / "copy", ignore=left_out)


def test_a_file_beside_model_py_is_all_it_takes(tiny, copy, tmp_path):
    """In a copy of the repository, by real processes: train, draw, load."""
    (copy / PIXEL / "mine.py").write_text(text_of(LABELLED, PIXEL))

    def done(folder, script, *words):
        result = run(copy / folder, script, *words, env={"PYTHONPATH": str(copy)})
        assert result.code == OK, result.text
        return result.text

    given = ("--network", "mine.py", "--T", 20, *tiny, "--epochs", 1, "--outdir", tmp_path, "--generate-images")
    done(PIXEL, "train.py", *given)
    folder = only_run(tmp_path, "ddpm-mine-d3-*")
    assert (tmp_path / "samples" / folder.name / "epoch_000001.png").is_file()
    done(PIXEL, "infer.py", "--ckpt", folder, "--n", 4, "--digit", 3, "--output", tmp_path / "a.png")
    (tmp_path / "program.py").write_text(
        f"from common import load\nprint(load({str(folder)!r}, 'cpu').draw([3, 3]).shape)"
    )
    assert "[2, 1, 28, 28]" in done(".", str(tmp_path / "program.py"))


@pytest.mark.slow
def test_two_processes_share_a_network_and_data_of_ones_own(copy, tmp_path):
    """And end with the weights of one; what is wrong is said once."""
    (copy / PIXEL / "mine.py").write_text(text_of(LABELLED, PIXEL))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (150, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(150) % 3)
    given = ("--network", "mine", "--data", tmp_path / "mine.npz", "--T", 20, "--batch-size", 32, "--shards", 2)
    two = "-m torch.distributed.run --standalone --nproc-per-node 2"
    for launcher in ("", two):
        where = ("--epochs", 1, "--device", "cpu", "--outdir", tmp_path / f"out{len(launcher)}")
        done = run(copy / PIXEL, f"{launcher} train.py", *given, *where, timeout=300)
        assert done.code == OK, done.text
    assert_same_training(*(only_run(tmp_path / f"out{len(launcher)}") for launcher in ("", two)))
    (copy / PIXEL / "mine.py").write_text("")
    wrong = run(copy / PIXEL, f"{two} train.py", *given, "--outdir", tmp_path / "wrong", timeout=300)
    assert wrong.code != OK
    assert [line for line in wrong.errors if "Denoiser" in line] == wrong.errors[:1]
    assert not list(tmp_path.glob("wrong/checkpoints/*"))


@pytest.mark.parametrize("folder", [PIXEL, LATENT])
def test_it_resumes_is_scored_and_is_recorded(folder, write, flags, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "train_classifier", lambda *_, **__: classifier.DigitClassifier().eval())
    place = ("--cache-dir", shutil.copytree(cache / "decoded", tmp_path / "cache" / "decoded").parent)
    write(folder, "mine", text_of(LABELLED, folder))
    for epochs in (1, 2):
        more = ("--network", "mine", "--auto-resume", "--eval-every", 2, "--epochs", epochs)
        result = call(folder, "train.py", *flags(folder), *place, *more)
        assert result.code == OK, result.text
    run = only_run(tmp_path / "out", "*-mine-*d3-*")
    state = newest_state(run)
    assert (state["epoch"], state["args"]["network"], state["args"]["labelled"]) == (2, "mine", True)
    assert {"fid", "agreement_labelled"} <= state["scores"].keys()
    score = ("--n", 200, "--sampler", "dpm", "--data", "embedded", *place)
    result = call("common", "evaluate.py", "--ckpt", run, *score)
    assert result.code == OK, result.text


@pytest.mark.parametrize("folder", [PIXEL, LATENT])
def test_a_network_without_labels_draws_without(folder, write, flags, tiny, tmp_path):
    write(folder, "plain", text_of(UNLABELLED, folder))
    given = [*flags(folder), "--network", "plain", "--generate-images"]
    if folder == LATENT:  # an autoencoder of all digits
        ae = ("--model", "mlp", *tiny, "--only-digit", "all", "--epochs", 1, "--batch-size", 500)
        assert call(AE, "train.py", *ae, "--outdir", tmp_path / "ae").code == OK
        given[1] = only_run(tmp_path / "ae")
    result = call(folder, "train.py", *given, "--only-digit", "all", "--batch-size", 500)
    assert result.code == OK, result.text
    run = only_run(tmp_path / "out")
    assert newest_state(run)["args"]["labelled"] is False
    draw = ("--ckpt", run, "--n", 3, "--output", tmp_path / "a.png", "--save-npz", tmp_path / "a.npz")
    for more in ((), ("--digit", "none")):
        result = call(folder, "infer.py", *draw, *more)
        assert result.code == OK, result.text
        assert np.load(tmp_path / "a.npz")["labels"].tolist() == [-1] * 3
    for more, code in ((("--digit", 3), MODEL_MISMATCH), (("--guidance", 2), USAGE)):
        result = call(folder, "infer.py", *draw, *more)
        assert (result.code, len(result.errors), len(result.text.splitlines())) == (code, 1, 1), result.text
        assert "takes no" in result.text
    loaded = load(run, "cpu")
    assert loaded.draw(count=2, steps=2).shape == (2, 1, 28, 28)
    with pytest.raises(ValueError, match="takes no labels"):
        loaded.draw([3])
    with pytest.raises(ValueError, match="an effect only on labels"):
        loaded.draw(guidance=2)


def test_of_the_only_digit_a_network_without_labels_can_be_asked(write, flags, tmp_path, monkeypatch):
    write(PIXEL, "plain", text_of(UNLABELLED, PIXEL))
    assert call(PIXEL, "train.py", *flags(PIXEL), "--network", "plain").code == OK  # threes
    draw = ("--ckpt", only_run(tmp_path / "out"), "--n", 2, "--output", tmp_path / "a.png")
    pictures = set()
    for more, code in (((), OK), (("--digit", 3), OK), (("--digit", 5), MODEL_MISMATCH)):
        assert call(PIXEL, "infer.py", *draw, *more).code == code
        pictures.add((tmp_path / "a.png").read_bytes())
    assert len(pictures) == 1
    loaded = load(draw[1], "cpu")
    assert torch.equal(loaded.draw([3, 3]), loaded.draw(count=2))
    # and by the page, whose link may have a guidance
    shelf, said = Shelf(find([str(draw[1])], print), "cpu", 1, None), []
    (described,) = shelf.described()
    assert (described["digits"], described["network"]) == ([3], "plain")
    asked = {"side": 0, "digits": [3], "count": 2, "guidance": 2.0, "sampler": "ddpm", "steps": 20, "seed": 42}
    wish = Wish((None, "draw"), print, print, short=False)
    send = lambda pixels=b"", **header: said.append((header, pixels))  # noqa: E731
    play.draw(shelf, wish, {"run": described["id"], "drawings": [asked]}, send)
    (command,) = (header["command"] for header, _ in said if "command" in header)
    assert "--guidance" not in command
    play.take(shelf, wish, {"run": described["id"], "drawing": asked, "form": "png"}, send)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    measured = Shelf(find([str(draw[1])], print), "cpu", "auto", None).open(described["id"])  # the fastest threads
    assert measured.threads >= 1
    assert {said[-1][1]} == pictures


def test_the_page_offers_no_digit_to_a_network_without_labels(write, flags, tmp_path):
    write(PIXEL, "plain", text_of(UNLABELLED, PIXEL))
    words = [*flags(PIXEL), "--network", "plain", "--only-digit", "all", "--batch-size", 500]
    assert call(PIXEL, "train.py", *words).code == OK
    (entry,) = find([str(only_run(tmp_path / "out"))], print)
    assert entry.described("x")["digits"] == []


def test_labels_are_hidden_and_shown_to_a_network_that_takes_them():
    asked = []

    class Net(torch.nn.Module):
        def forward(self, x, t, labels):
            assert t.shape == labels.shape == (len(x),)
            asked.append((int(t[0]), labels.tolist()))
            return torch.zeros_like(x)

    schedules = diffusion.precompute_schedules(3)
    sampling.draw(Net(), (2,), schedules, labels=[4, 7])
    assert asked == [(2, [4, 7]), (1, [4, 7]), (0, [4, 7])]
    asked.clear()
    sampling.draw(Net(), (2,), schedules, count=2)
    assert {tuple(labels) for _, labels in asked} == {(10, 10)}
    asked.clear()
    sampling.draw(Net(), (2,), schedules, labels=[4, 7], guidance=2.0)
    assert {tuple(labels) for _, labels in asked} == {(4, 7, 10, 10)}


@pytest.mark.parametrize("kept", ["{}", "[({}, 1)]", "{{'of a block': [{}], 'itself': self.__dict__}}"])
def test_a_network_may_keep_what_it_computed(kept, write, flags, monkeypatch):
    """Copies are made of it: at the start, in the trial of threads, and where the machine is found to be busy."""
    text = text_of(LABELLED, PIXEL).replace(
        "return self.body(rows)", f"out = self.body(rows)\n        self.last = {kept.format('out')}\n        return out"
    )
    assert "self.last" in text
    write(PIXEL, "keeping", text)
    monkeypatch.setattr(threads, "available", lambda: 2)
    monkeypatch.setattr(threads, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(threads, "SLOW", 0.0)
    result = call(PIXEL, "train.py", *flags(PIXEL), "--network", "keeping", "--threads", 2, "--device", "cpu")
    assert (result.code, "this machine is busy" in result.text) == (OK, True), result.text


def test_a_network_is_tried_with_its_own_null_label(write, flags):
    text = text_of(LABELLED, PIXEL).replace("def forward", "null_label = 4711\n\n    def forward")
    write(PIXEL, "wrong", text)
    result = call(PIXEL, "train.py", *flags(PIXEL), "--network", "wrong")
    assert (result.code, len(result.errors)) == (NO_MODEL_SPECIFIED, 1), result.text


def test_latents_keep_a_networks_own_null_label():
    class Net(torch.nn.Module):
        null_label = 3

        def forward(self, x, t, labels): ...

    assert diffusion.null_label_of(module_of("lddpm").Own(Net(), 16)) == 3


def test_a_net_without_a_predictor_draws_what_it_draws_with_one():
    class Plain(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, t, labels):
            return self.net(x, t, labels)

    torch.manual_seed(0)
    schedules = diffusion.precompute_schedules(10)
    net = module_of("ddpm").Denoiser(8, schedules=schedules).eval()
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    one, two = (sampling.draw(each, (1, 28, 28), schedules, labels=[1, 2], guidance=2.0) for each in (net, Plain(net)))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_a_network_may_change_what_it_gets(write, flags):
    """In training that is the batch's own noisy copy; in drawing it would be the image itself."""
    drawn = []
    for name, there in (("inplace", "x.tanh_()"), ("copied", "x.tanh()")):
        text = text_of(LABELLED, PIXEL).replace("x.flatten(1)", f"{there}.flatten(1)")
        write(PIXEL, name, text)
        schedules = diffusion.precompute_schedules(5)
        torch.manual_seed(0)
        net = module_of("ddpm", name).Denoiser().eval()
        how = {"labels": [3, 5], "seed": 1}
        drawn.append(sampling.draw(net, (1, 28, 28), schedules, **how))
        net.predictor = lambda net=net: lambda x, t, labels: net(x, torch.full((len(x),), t), labels)
        drawn.append(sampling.draw(net, (1, 28, 28), schedules, **how))
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0])


# --- what is wrong is one line ---

SHAPES = "import torch\nclass Denoiser(torch.nn.Module):\n    def forward(self, x, t, labels):\n        return {}\n"
ASKED = SHAPES.format("x + self.a") + (
    "    def __init__(self):\n        super().__init__()\n        self.a = torch.nn.Parameter(torch.ones(1))\n"
    "    def predictor(self):\n        return lambda x, t, labels: {}\n"
)
FAULTS = [
    # (the file, further flags, exit code, what the line says)
    (None, (), NO_MODEL_SPECIFIED, f"there is no mine.py in {PIXEL}"),
    ("", (), NO_MODEL_SPECIFIED, f"{PIXEL}/mine.py defines no class Denoiser"),
    (SHAPES.format("x[:, :, 1:]"), (), NO_MODEL_SPECIFIED, "it returns (2, 1, 27, 28); the noise has x's shape"),
    (SHAPES.format("(x, t)"), (), NO_MODEL_SPECIFIED, "it returns tuple"),
    (SHAPES.format("x"), (), NO_MODEL_SPECIFIED, "mine.py: what it returns depends on no parameter of it"),
    (SHAPES.format("torch.nn.Embedding(10, 1)(labels)"), (), NO_MODEL_SPECIFIED, "mine.py, line 4: IndexError"),
    (SHAPES.format("x +"), (), NO_MODEL_SPECIFIED, "mine.py, line 4: SyntaxError: invalid syntax"),
    ("import no_such_module", (), NO_MODEL_SPECIFIED, "mine.py, line 1: ModuleNotFoundError: No module named"),
    ("import sys\nsys.exit(3)", (), NO_MODEL_SPECIFIED, "mine.py, line 2: SystemExit: 3"),
    ("class Denoiser:\n    def __init__(self, depth): ...", (), NO_MODEL_SPECIFIED, "argument: 'depth'"),
    (
        SHAPES.format("self.norm(x)") + "    def __init__(self):\n        super().__init__()\n"
        "        self.norm = torch.nn.BatchNorm2d(1)\n",
        ("--shards", 2),
        MODEL_MISMATCH,
        "running statistics would differ between processes: --shards 1",
    ),
    (ASKED.format("again(x)"), (), NO_MODEL_SPECIFIED, "mine.py, line 9: NameError: name 'again' is not defined"),
    (ASKED.format("x[:1]"), (), NO_MODEL_SPECIFIED, "its predictor() draws with has another shape than x"),
    (
        ASKED.format("x").replace("self.a =", "self.file, self.a = open(__file__),"),
        (),
        NO_MODEL_SPECIFIED,
        "cannot pickle",
    ),
    ("class Denoiser: ...", (), NO_MODEL_SPECIFIED, "its Denoiser is no torch.nn.Module"),
    (SHAPES.format("x"), ("--base-ch", 16), USAGE, "--base-ch has no effect on --network mine: drop it"),
]


@pytest.mark.parametrize(("text", "more", "code", "said"), FAULTS, ids=[said for _, _, _, said in FAULTS])
def test_what_is_wrong_with_a_network_is_one_line(text, more, code, said, write, flags, tmp_path):
    write(PIXEL, "mine" if text is not None else "other", text or "")
    result = call(PIXEL, "train.py", *flags(PIXEL), "--network", "mine", *more)
    assert (result.code, len(result.errors)) == (code, 1), result.text
    assert said in result.errors[0]
    assert "Traceback" not in result.text
    assert not list(tmp_path.glob("out/checkpoints/*"))


@pytest.mark.parametrize("name", ["../outside", "{tmp}/outside"])
def test_a_checkpoint_names_only_files_beside_model_py(name, write, flags, tmp_path):
    write(PIXEL, "mine", text_of(LABELLED, PIXEL))
    (tmp_path / "outside.py").write_text(text_of(LABELLED, PIXEL))
    name = name.format(tmp=tmp_path)
    result = call(PIXEL, "train.py", *flags(PIXEL), "--network", name)
    assert (result.code, len(result.text.splitlines())) == (NO_MODEL_SPECIFIED, 1), result.text
    assert call(PIXEL, "train.py", *flags(PIXEL), "--network", "mine").code == OK
    run = only_run(tmp_path / "out")
    state = newest_state(run)
    state["args"]["network"] = name
    ckpt.save_checkpoint_and_link_latest(run, state)
    result = call(PIXEL, "infer.py", "--ckpt", run, "--output", tmp_path / "a.png")
    assert (result.code, len(result.text.splitlines())) == (NO_MODEL_SPECIFIED, 1), result.text


def test_a_constructor_gets_what_it_names(write, flags, tmp_path):
    text = text_of(LABELLED, LATENT).replace("width=8", "latent_dim, hidden_dim, schedules, width=8")
    write(LATENT, "mine", text.replace("super().__init__()", "super().__init__(); assert schedules.T == 20"))
    result = call(LATENT, "train.py", *flags(LATENT), "--network", "mine", "--hidden-dim", 16)
    assert result.code == OK, result.text


# --- a network is what a run is ---


def test_networks_are_not_taken_for_one_another(write, flags, tmp_path):
    write(PIXEL, "mine", text_of(LABELLED, PIXEL))
    given = (*flags(PIXEL), "--auto-resume")
    assert call(PIXEL, "train.py", *given).code == OK
    ours = only_run(tmp_path / "out")
    state = newest_state(ours)
    del state["args"]["network"], state["args"]["labelled"]  # as runs were before there was a choice
    ckpt.save_checkpoint_and_link_latest(ours, state)
    result = call(PIXEL, "train.py", *given, "--network", "mine")
    assert "which has --network model, not mine" in result.text
    (mine,) = set((tmp_path / "out" / "checkpoints").iterdir()) - {ours}
    for begun, network, other in ((ours, "mine", "model"), (mine, "model", "mine")):
        result = call(PIXEL, "train.py", "--resume", begun, "--network", network, "--epochs", 2)
        assert (result.code, len(result.text.splitlines())) == (MODEL_MISMATCH, 1), result.text
        assert f"--network {network} contradicts the run to be resumed, which has {other}" in result.text
    result = call(PIXEL, "infer.py", "--ckpt", ours, "--n", 2, "--output", tmp_path / "a.png")
    assert result.code == OK, result.text


@pytest.mark.parametrize("folder", [PIXEL, LATENT])
def test_a_file_that_was_edited_is_said_and_goes_on(folder, write, flags, tmp_path):
    """Its weights fit, so only the file's content tells."""
    write(folder, "mine", text_of(LABELLED, folder))
    assert call(folder, "train.py", *flags(folder), "--network", "mine").code == OK
    run, said = only_run(tmp_path / "out"), f"{folder}/mine.py has changed since this run was trained with it"
    draw = ("infer.py", "--ckpt", run, "--n", 2, "--output", tmp_path / "a.png")
    more = ("train.py", "--resume", run, "--epochs")
    assert said not in call(folder, *more, 2).text + call(folder, *draw).text
    write(folder, "mine", text_of(LABELLED, folder).replace("SiLU", "ReLU"))
    for words in (draw, (*more, 3)):
        result = call(folder, *words)
        assert (result.code, result.text.count(f"warning: {said}")) == (OK, 1), result.text
    assert said not in call(folder, *draw).text, "the newest epoch is of the file as it is"


def test_weights_of_another_network_are_one_line(write, flags, tmp_path):
    write(PIXEL, "mine", text_of(LABELLED, PIXEL))
    assert call(PIXEL, "train.py", *flags(PIXEL), "--network", "mine").code == OK
    write(PIXEL, "mine", text_of(LABELLED, PIXEL).replace("32", "33").replace("told", "heard"))
    run = only_run(tmp_path / "out")
    for script, more in (
        ("infer.py", ("--ckpt", run, "--output", tmp_path / "a.png")),
        ("train.py", ("--resume", run)),
    ):
        more = (*more, "--epochs", 2) if script == "train.py" else more
        result = call(PIXEL, script, *more)
        assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
        assert "holds the weights of another network than mine.py has: Missing key(s)" in result.errors[0]
    assert ckpt.run_checkpoints(run)  # nothing of the run was lost
    config = json.loads((run / "config.json").read_text())
    config["starts"][0]["git_commit"] = "0123456789abcdef"  # an earlier version of this repository
    (run / "config.json").write_text(json.dumps(config))
    result = call(PIXEL, "infer.py", "--ckpt", run, "--output", tmp_path / "a.png")
    assert "than mine.py has (it was trained by commit 0123456789): Missing key(s)" in result.errors[0]


def test_a_resume_is_exact_with_a_network_that_draws(write, flags, tmp_path):
    """Dropout: torch's own generator is set before each step."""
    write(PIXEL, "mine", text_of(LABELLED, PIXEL))
    for name, all_epochs in (("whole", (2,)), ("resumed", (1, 2))):
        for epochs in all_epochs:
            where = ("--outdir", tmp_path / name, "--epochs", epochs, "--auto-resume")
            assert call(PIXEL, "train.py", *flags(PIXEL), "--network", "mine", *where).code == OK
    assert_same_training(only_run(tmp_path / "whole"), only_run(tmp_path / "resumed"))
