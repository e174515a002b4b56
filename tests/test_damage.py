"""Checkpoints are read without trust: damaged, foreign and hostile files."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from helpers import AE, LATENT, PIXEL, call, make_run, state_of

from common import ckpt, load
from common.error_codes import BAD_CHECKPOINT, NO_AE_CHECKPOINT, OK, USAGE, Exit


def flip(path, offset: int) -> None:
    """Invert one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def offset_in_tensor(path) -> int:
    """Where in the file the first tensor's data lies."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
        return path.read_bytes().index(archive.read(part)[:64]) + part.file_size // 2


class Hostile:
    """Touches a file if it is ever unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def damage(kind: str, path, tmp_path) -> None:
    """Make `path`, a good checkpoint, bad in one way."""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "flipped":
        flip(path, offset_in_tensor(path))
    elif kind == "text":
        path.write_text("#!/bin/sh\ntouch touched\n")
    elif kind == "foreign zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "<xml/>")
    elif kind == "plain weights":
        torch.save({"layer.weight": torch.ones(3)}, path)
    elif kind == "a tensor":
        torch.save(torch.ones(3), path)
    elif kind == "future format":
        torch.save(state_of(1) | {"format": 999}, path)
    elif kind == "hostile":
        torch.save(state_of(1) | {"extra": Hostile(tmp_path / "touched")}, path)
    elif kind == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(tmp_path / "touched")))
    elif kind == "hostile legacy":
        torch.save({"x": Hostile(tmp_path / "touched")}, path, _use_new_zipfile_serialization=False)
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()


KINDS = ["empty", "truncated", "half", "flipped", "text", "foreign zip", "plain weights", "a tensor", "future format"]
KINDS += ["hostile", "hostile pickle", "hostile legacy", "missing", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_one_clear_line_and_nothing_of_it_runs(tmp_path, kind):
    path = make_run(tmp_path / "run", [1]) / "checkpoint_epoch_000001.pt"
    damage(kind, path, tmp_path)
    for read in (ckpt.read_checkpoint, ckpt.load_checkpoint, ckpt.infer_model_from_checkpoint):
        if kind in ("flipped", "hostile") and read is ckpt.infer_model_from_checkpoint:
            continue  # a quick look does not read the tensors, and runs nothing anyway
        with pytest.raises(Exit) as caught:
            read(path)
        assert caught.value.code == BAD_CHECKPOINT
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "touched").exists()
    result = call(AE, "infer.py", "--ckpt", path, "--output", tmp_path / "x.png")
    assert (result.code, len(result.text.splitlines())) == (BAD_CHECKPOINT, 1), result.text


def test_no_flipped_bit_anywhere_changes_what_is_read(tmp_path):
    """Wherever a bit flips, the file is refused or reads as it was written."""
    path = make_run(tmp_path / "run", [1]) / "checkpoint_epoch_000001.pt"
    good, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        path.write_bytes(good)
        flip(path, rng.randrange(len(good)))
        try:
            state = ckpt.read_checkpoint(path)
        except ckpt.UnreadableCheckpoint:
            refused += 1
        else:
            assert torch.equal(state["model"]["weight"], torch.arange(4000.0))
            assert state["epoch"] == 1
    assert refused > 100


@pytest.mark.parametrize("kind", ["empty", "truncated", "flipped", "hostile", "plain weights"])
def test_the_next_older_checkpoint_is_used_and_the_damaged_one_named(tmp_path, kind):
    run, warnings = make_run(tmp_path / "checkpoints" / "run-a"), []
    damage(kind, run / "checkpoint_epoch_000003.pt", tmp_path)
    wanted = run / "checkpoint_epoch_000002.pt"
    path, state = ckpt.newest_readable(run, warnings.append)
    assert (path, state["epoch"]) == (wanted, 2)
    assert len(warnings) == 1
    assert "checkpoint_epoch_000003.pt" in warnings[0]
    assert ckpt.open_checkpoint(run)[0] == wanted
    assert ckpt.find_latest_checkpoint(run.parent, "run-") == wanted
    for resume in (None, str(run), str(run / "latest.pt"), str(run / "latest")):
        assert ckpt.resolve_resume_path(resume, True, run.parent, "run-", warnings.append) == wanted, resume


def test_the_log_of_a_resume_tells_what_was_said_before_there_was_one(ae_run, copy_of, cache):
    folder = copy_of(ae_run)
    damage("truncated", folder / "checkpoint_epoch_000002.pt", None)
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, "--lr", 0.5, "--cache-dir", cache)
    assert result.code == OK, result.text
    log = (folder.parent.parent / "logs" / f"{folder.name}.log").read_text()
    for text in (result.text, log):
        assert text.count("passing over") == 1
        assert text.count("this resume changes --lr") == 1
    started = log[log.index("passing over") :]
    assert started.index("this resume changes --lr") < started.index("resumed from")


def damaged_run(folder):
    """A run of which no checkpoint can be read."""
    for _, path in ckpt.run_checkpoints(make_run(folder)):
        path.write_bytes(b"")
    return folder


def test_all_damaged_means_none(tmp_path):
    run = damaged_run(tmp_path / "run")
    assert ckpt.newest_readable(run, lambda _: None) is None
    assert ckpt.find_latest_checkpoint(tmp_path) is None
    with pytest.raises(ckpt.UnreadableCheckpoint, match="no readable checkpoint"):
        ckpt.open_checkpoint(run)


def test_where_another_run_is_taken_the_damaged_one_is_named(tmp_path, capsys):
    good = make_run(tmp_path / "run-a", [1], time="2026-01-01T00:00:00+00:00")
    bad = damaged_run(tmp_path / "run-b")
    assert ckpt.read_model(tmp_path, ("ae-mlp",))[0].parent == good
    assert capsys.readouterr().err.count(f"passing over {bad}") == 3


READERS = (ckpt.open_checkpoint, ckpt.load_checkpoint, ckpt.inspect_checkpoint, ckpt.infer_model_from_checkpoint)


@pytest.mark.parametrize("read", READERS)
def test_the_functions_name_what_they_pass_over(read, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "checkpoint_epoch_000003.pt").write_bytes(b"")
    read(run)
    assert capsys.readouterr().err.count(f"passing over {run}/checkpoint_epoch_000003.pt") == 1


def test_a_run_that_is_named_twice_is_passed_over_once(latent_run, copy_of, tmp_path, cache, recwarn, capsys):
    run = copy_of(latent_run)
    (run / "checkpoint_epoch_000002.pt").write_bytes(b"")
    twice = ("--ckpt", run, "--guide", run, "--data", "embedded", "--cache-dir", cache)
    drawn = call(LATENT, "infer.py", *twice[:4], "--n", 2, "--steps", 2, "--output", tmp_path / "x.png")
    scored = call("common", "evaluate.py", *twice, "--n", 200, "--steps", 2)
    for result in (drawn, scored):
        assert (result.code, result.text.count("passing over")) == (USAGE, 1), result.text
    capsys.readouterr()
    with pytest.raises(ValueError, match="it is what is to be guided"):
        load(run, "cpu", guide=run)
    assert capsys.readouterr().err == ""
    assert {str(warning.message) for warning in recwarn} == {
        f"passing over {run}/checkpoint_epoch_000002.pt: the file is empty"
    }


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = make_run(tmp_path / "run", [1]) / "latest.pt"
    with pytest.raises(ckpt.UnreadableCheckpoint, match="does not fit"):
        ckpt.load_checkpoint(path, model=torch.nn.Linear(3, 3))


def test_a_run_that_says_its_model_in_short_is_found_and_resumed(ae_run, copy_of, cache):
    folder = copy_of(ae_run)
    for _, path in ckpt.run_checkpoints(folder):
        state = ckpt.read_checkpoint(path)
        ckpt.save_checkpoint(path, state | {"args": state["args"] | {"model": "mlp"}})
    picture = folder / "x.png"
    for script in (("infer.py", "--ckpt", folder.parent, "--output", picture), ("train.py", "--resume", folder)):
        result = call(AE, *script, "--cache-dir", cache)
        assert result.code == OK, result.text
    assert ckpt.peek_checkpoint(folder / "latest.pt")["args"]["model"] == "ae-mlp"
    inside = {"args": {"model": "conv"}}
    ckpt.save_checkpoint(folder / "x.pt", state_of(1, args={"model": "lddpm", "ae_model": "conv"}, ae_ckpt_data=inside))
    state = ckpt.peek_checkpoint(folder / "x.pt")
    assert state["args"]["ae_model"] == state["ae_ckpt_data"]["args"]["model"] == "ae-conv"


def test_short_model_names_are_understood():
    for recorded, model in {"mlp": "ae-mlp", "conv": "ae-conv", "ae-conv": "ae-conv", "lddpm": "lddpm"}.items():
        assert ckpt.infer_model_from_checkpoint(state_of(1, args={"model": recorded})) == model
    with pytest.raises(ckpt.UnreadableCheckpoint, match="gan"):
        ckpt.infer_model_from_checkpoint(state_of(1, args={"model": "gan"}))


TOOLS = {
    "draws pixels": (PIXEL, "infer.py", "--checkpoint", "{ckpt}", "--out", "{picture}"),
    "draws latents": (LATENT, "infer.py", "--ckpt", "{ckpt}", "--output", "{picture}"),
    "decodes with it": (LATENT, "infer.py", "--ckpt", "{good}", "--ae-ckpt", "{ckpt}", "--output", "{picture}"),
    "reconstructs": (AE, "infer.py", "--ckpt", "{ckpt}", "--output", "{picture}"),
    "goes on with pixels": (PIXEL, "train.py", "--resume", "{ckpt}"),
    "goes on with latents": (LATENT, "train.py", "--resume", "{ckpt}"),
    "goes on with an autoencoder": (AE, "train.py", "--resume", "{folder}"),
    "trains on its latents": (LATENT, "train.py", "--ae-ckpt", "{ckpt}", "--outdir", "{out}"),
    "finds it as an autoencoder": (LATENT, "train.py", "--ae-ckpt-dir", "{tree}", "--outdir", "{out}"),
    "scores": ("common", "evaluate.py", "--ckpt", "{ckpt}"),
    "maps its latents": (AE, "run_tsne.py", "--checkpoint", "{ckpt}", "--output", "{out}"),
    "inspects": ("common", "inspect_ckpt.py", "{ckpt}"),
    "ranks": ("common", "find_best_ckpt.py", "{folder}"),
}


@pytest.mark.parametrize("tool", [*TOOLS, "exports", "guides", "perhaps trains on its latents"])
def test_every_tool_names_the_damaged_checkpoints_of_a_run(tool, latent_run, tmp_path):
    more = {
        "perhaps trains on its latents": (*TOOLS["trains on its latents"], "--auto-resume"),
        "exports": (LATENT, "infer.py", "--ckpt", "{ckpt}", "--export", "{out}.pt"),
        "guides": (LATENT, "infer.py", "--ckpt", "{good}", "--guide", "{ckpt}", "--output", "{picture}"),
    }
    folder, script, *args = (TOOLS | more)[tool]
    runs = damaged_run(tmp_path / "runs" / "ae-mlp-x")
    places = {"ckpt": runs, "folder": runs, "tree": runs, "good": latent_run}
    places |= {"out": tmp_path / "out", "picture": tmp_path / "out.png"}
    result = call(folder, script, *(arg.format(**places) for arg in args))
    assert result.code in (BAD_CHECKPOINT, NO_AE_CHECKPOINT), result.text
    for epoch in (1, 2, 3):
        assert result.text.count(f"/checkpoint_epoch_{epoch:06d}.pt: ") == 1, result.text


@pytest.mark.parametrize("tool", TOOLS)
def test_a_hostile_checkpoint_runs_nothing_in_any_tool(tool, latent_run, tmp_path):
    touched = tmp_path / "touched"
    pickle.loads(pickle.dumps(Hostile(touched)))  # it would
    assert touched.exists()
    touched.unlink()
    folder, script, *args = TOOLS[tool]
    runs = make_run(tmp_path / "ae-mlp-x", [1])
    path = runs / "checkpoint_epoch_000001.pt"
    for kind in ("hostile", "hostile pickle", "hostile legacy"):
        damage(kind, path, tmp_path)
        places = {"ckpt": path, "folder": runs, "tree": tmp_path, "good": latent_run}
        places |= {"out": tmp_path / "out", "picture": tmp_path / "out.png"}
        result = call(folder, script, *(arg.format(**places) for arg in args))
        only_looks = tool in ("inspects", "ranks")  # without unpickling anything
        assert result.code in (BAD_CHECKPOINT, NO_AE_CHECKPOINT, *([OK] if only_looks else [])), result.text
        assert "Traceback" not in result.text
    assert not touched.exists()
