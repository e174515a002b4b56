"""The command-line tools: what is in a checkpoint, and which one is best."""

import argparse
import errno
import json
import math
import os
import shutil

import pytest
import torch
from helpers import finish, run, start

from common import ckpt, find_best_ckpt, inspect_ckpt, scores
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, USAGE, Exit, run_main


def save(folder, epoch: int, **values) -> None:
    """A small checkpoint whose state holds `values`."""
    state = {"format": ckpt.FORMAT, "exp_name": folder.name, "epoch": epoch, "args": {"model": "ae-mlp"}}
    state |= {
        "model": {"weight": torch.ones(3, 4)},
        "timestamp": "2026-01-01T00:00:00+00:00",
        "val_loss": 1.0,
        **values,
    }
    state |= {"global_step": 10 * epoch, "batch": 0, "best": None}
    ckpt.save_checkpoint_and_link_latest(folder, state)


@pytest.fixture
def tree(tmp_path):
    """Two runs: a is best at epoch 2 by val_loss and at 3 by train_loss; b holds a partial file and a NaN."""
    checkpoints = tmp_path / "checkpoints"
    for epoch, val_loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        save(checkpoints / "a", epoch, val_loss=val_loss, train_loss=1 / epoch)
    save(checkpoints / "b", 1, val_loss=0.15, train_loss=0.9)
    save(checkpoints / "b", 2, val_loss=math.nan, train_loss=0.8)
    save(checkpoints / "b", 9, val_loss=None, train_loss=0.01)  # saved within its epoch
    return checkpoints


def best(*argv, capsys) -> tuple[int, str, str]:
    """(code, stdout, stderr) of find_best_ckpt."""
    code = run_main(lambda: find_best_ckpt.main([str(arg) for arg in argv]))
    said = capsys.readouterr()
    return code, said.out.strip(), said.err


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((), "a/checkpoint_epoch_000002.pt"),
        (("--metric", "val_loss", "--mode", "min"), "a/checkpoint_epoch_000002.pt"),
        (("--metric", "val_loss", "--mode", "max"), "a/checkpoint_epoch_000001.pt"),
        (("--metric", "train_loss"), "a/checkpoint_epoch_000003.pt"),
        (("--metric", "epoch"), "a/checkpoint_epoch_000003.pt"),  # grows unless told otherwise
        (("--metric", "epoch", "--mode", "min"), "a/checkpoint_epoch_000001.pt"),
        (("--metric", "batch"), "a/checkpoint_epoch_000003.pt"),  # 0 in all: the latest epoch
    ],
)
def test_the_best(tree, flags, wanted, capsys):
    code, path, _ = best(tree, *flags, "--print-path-only", capsys=capsys)
    assert (code, path) == (0, str(tree / wanted))


def test_the_table_names_what_it_passes_over(tree, capsys):
    (tree / "a" / "checkpoint_epoch_000004.pt").write_bytes(b"damaged")
    for copy in (b"of a Mac", (tree / "a" / "checkpoint_epoch_000002.pt").read_bytes()):
        (tree / "a" / f"._{len(copy)}.pt").write_bytes(copy)
    code, table, warnings = best(tree, "--top", 2, capsys=capsys)
    assert code == 0
    rows = [line.split() for line in table.splitlines()[1:3]]
    assert [(row[0], row[1], row[2]) for row in rows] == [("1", "0.1", "2"), ("2", "0.15", "1")]
    assert "checkpoint_epoch_000004.pt" in warnings
    assert "NaN" in warnings
    assert "checkpoint_epoch_000009.pt" not in table + warnings  # partial, not damaged
    assert "._" not in table + warnings  # hidden
    assert len(table.splitlines()) == 4


def test_runs_that_were_gathered_by_symlinks_are_ranked_and_shown(tree, tmp_path, capsys):
    """As for a comparison; a link to what lies in the same tree is no other run, and one to no run is not followed."""
    gathered = tmp_path / "gathered"
    shutil.move(tree / "b", tmp_path / "elsewhere" / "b")
    shutil.copytree(tree, gathered)
    (gathered / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (gathered / "b-too").symlink_to(tmp_path / "elsewhere" / "b")
    (gathered / "again").symlink_to("a")
    (gathered / "all").symlink_to(tmp_path / "elsewhere")
    (gathered / "round").symlink_to(gathered)
    code, table, _ = best(gathered, capsys=capsys)
    assert code == 0
    assert [line.split()[-1].removeprefix(f"{gathered}/") for line in table.splitlines()[1:-1]] == [
        "a/checkpoint_epoch_000002.pt",
        "b/checkpoint_epoch_000001.pt",
        "a/checkpoint_epoch_000003.pt",
        "a/checkpoint_epoch_000001.pt",
    ]
    assert run_main(lambda: inspect_ckpt.main([str(gathered), "--json"])) == 0
    shown = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
    assert [os.path.relpath(path, gathered) for path in shown] == [
        "a/checkpoint_epoch_000003.pt",
        "b/checkpoint_epoch_000009.pt",
    ]


def test_copying_the_best(tree, tmp_path, capsys):
    target = tmp_path / "new" / "best_model.pt"
    assert best(tree, "--copy-to", target, capsys=capsys)[0] == 0
    assert target.read_bytes() == (tree / "a" / "checkpoint_epoch_000002.pt").read_bytes()
    assert best(tree, "--copy-to", target, "--metric", "epoch", capsys=capsys)[0] == BAD_OUTPUT
    assert ckpt.read_checkpoint(target)["epoch"] == 2
    assert best(tree, "--copy-to", target, "--metric", "epoch", "--force", capsys=capsys)[0] == 0
    assert ckpt.read_checkpoint(target)["epoch"] == 3
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "nowhere")
    for wrong in (tmp_path, tmp_path / "dangling.pt"):
        assert best(tree, "--copy-to", wrong, capsys=capsys)[0] == BAD_OUTPUT
    assert (tmp_path / "dangling.pt").is_symlink()
    os.mkfifo(tmp_path / "pipe.pt")
    assert best(tree, "--copy-to", tmp_path / "pipe.pt", "--force", capsys=capsys)[0] == BAD_OUTPUT
    assert (tmp_path / "pipe.pt").is_fifo()


@pytest.mark.parametrize("tool", [find_best_ckpt, inspect_ckpt])
def test_a_path_that_is_empty_is_not_this_folder(tool, tree, capsys, monkeypatch):
    """As a shell's variable that is not set leaves it."""
    monkeypatch.chdir(tree)
    assert run_main(lambda: tool.main([""])) == USAGE
    assert "the value is empty" in capsys.readouterr().err


def test_a_checkpoint_pruned_before_it_is_copied_is_not_the_targets_fault(tree, tmp_path, capsys, monkeypatch):
    ranked = find_best_ckpt.rank

    def rank_and_prune(*how):
        found = ranked(*how)
        found[0][0].path.unlink()
        return found

    monkeypatch.setattr(find_best_ckpt, "rank", rank_and_prune)
    code, _, said = best(tree, "--copy-to", tmp_path / "best.pt", capsys=capsys)
    assert (code, said.count("in training, removed it: try again")) == (BAD_CHECKPOINT, 1)
    assert not (tmp_path / "best.pt").exists()


def test_a_folder_that_goes_while_they_look_hides_no_other(tree, capsys, monkeypatch):
    """As one of a run that ended in vain does."""
    (tree / "0").mkdir()
    scandir = os.scandir

    def gone(folder):
        if str(folder).endswith("/0"):
            raise FileNotFoundError(2, "No such file or directory", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", gone)
    assert best(tree, "--print-path-only", capsys=capsys)[:2] == (0, str(tree / "a" / "checkpoint_epoch_000002.pt"))
    assert run_main(lambda: inspect_ckpt.main([str(tree)])) == 0


def test_a_failing_disk_is_not_passed_over(tree, capsys, monkeypatch):
    def failing(_folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "scandir", failing)
    for tool in (inspect_ckpt, find_best_ckpt):
        assert run_main(lambda tool=tool: tool.main([str(tree)])) == BAD_CHECKPOINT
        assert "Input/output error" in capsys.readouterr().err


def test_nothing_to_find(tree, tmp_path, capsys):
    for folder, metric in ((tmp_path / "nowhere", "val_loss"), (tree, "beauty"), (tmp_path / "empty", "val_loss")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        code, out, err = best(folder, "--metric", metric, capsys=capsys)
        assert (code, out) == (BAD_CHECKPOINT, "")
        assert err.splitlines()[-1].startswith("error:")
        if metric == "beauty":
            assert "known are batch, epoch, format, global_step, train_loss, val_loss" in err


def test_checkpoints_of_other_projects_are_ranked(tmp_path, capsys):
    """SPEC's own format without this project's marks, a Lightning-like file, flags in an argparse.Namespace."""
    spec = {"model": {"w": torch.ones(2)}, "epoch": 3, "global_step": 9, "args": {"lr": 0.1}, "exp_name": "x"}
    torch.save(spec | {"val_loss": 0.5}, tmp_path / "checkpoint_epoch_000003.pt")
    torch.save({"state_dict": {}, "val_loss": 0.25, "epoch": 7}, tmp_path / "last.ckpt")
    torch.save({"model": {}, "args": argparse.Namespace(val_loss=0.75)}, tmp_path / "a.pth")
    torch.save({"epoch": [3, 4], "val_loss": 0.8, "seed": 10**400}, tmp_path / "odd.pt")  # where we have numbers
    torch.save({"model": {}, "val_loss": "low"}, tmp_path / "words.pt")
    code, table, warnings = best(tmp_path, capsys=capsys)
    assert code == 0
    rows = [line.split() for line in table.splitlines()[1:4]]
    assert [(row[1], row[2], row[3], row[4]) for row in rows] == [
        ("0.25", "7", "?", str(tmp_path / "last.ckpt")),
        ("0.5", "3", "?", str(tmp_path / "checkpoint_epoch_000003.pt")),
        ("0.75", "-", "?", str(tmp_path / "a.pth")),
    ]
    assert "1 checkpoint(s) do not know val_loss" in warnings


def test_a_score_is_found_under_the_name_it_has_with_labels(tmp_path, capsys):
    for epoch in (1, 2):
        save(tmp_path / "a", epoch, scores={"fid_labelled": 1 / epoch})
    code, path, warnings = best(tmp_path, "--metric", "fid", "--print-path-only", capsys=capsys)
    assert (code, path) == (0, str(tmp_path / "a" / "checkpoint_epoch_000002.pt"))
    assert "ranking by fid_labelled" in warnings


@pytest.mark.parametrize(("day", "wanted"), [("01", "1"), ("02", "9")])
def test_scores_measured_later_go_before_those_of_training_if_they_are_of_this_checkpoint(
    day, wanted, tmp_path, capsys
):
    save(tmp_path / "a", 1, scores={"fid": 9})
    scores = {"timestamp": f"2026-01-{day}T00:00:00+00:00", "fid": 1}
    find_best_ckpt.scores_file(tmp_path / "a" / "checkpoint_epoch_000001.pt").write_text(json.dumps(scores))
    assert best(tmp_path, "--metric", "fid", capsys=capsys)[1].splitlines()[1].split()[1] == wanted


def test_metrics_and_logs_fill_what_checkpoints_lack(tree, capsys):
    (tree / "a" / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"epoch": epoch, "latent/std": value}) + "\n" for epoch, value in ((1, 5.0), (2, 4.0), (3, 9.0))
        )
        + '{"epoch": 4, "torn'
    )
    find_best_ckpt._written_figures.cache_clear()
    code, path, _ = best(tree, "--metric", "latent/std", "--mode", "max", "--print-path-only", capsys=capsys)
    assert (code, path) == (0, str(tree / "a" / "checkpoint_epoch_000003.pt"))


def test_the_best_of_real_runs_by_its_log_alone(latent_run, copy_of, capsys):
    """images_per_second stands in no checkpoint; without metrics.jsonl it is taken from the log's lines."""
    folder = copy_of(latent_run)
    wanted = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["train_loss"]
    (folder / "metrics.jsonl").unlink()
    find_best_ckpt._written_figures.cache_clear()
    figures = find_best_ckpt._written_figures(folder)
    assert figures[1]["train_loss"] == pytest.approx(wanted, abs=1e-6)
    assert set(figures) == {1, 2}
    lowest = min(figures, key=lambda epoch: figures[epoch]["val_loss"])
    for path in folder.glob("checkpoint_*.pt"):  # as if they held no losses
        state = ckpt.read_checkpoint(path)
        del state["val_loss"], state["train_loss"]
        ckpt.save_checkpoint(path, state)
    code, path, _ = best(folder, "--print-path-only", capsys=capsys)
    assert (code, path) == (0, str(folder / f"checkpoint_epoch_{lowest:06d}.pt"))


def test_a_figure_of_the_epoch_goes_before_the_flag_of_that_name(tree, capsys):
    save(tree / "a", 3, args={"model": "ae-mlp", "lr": 1.0})
    (tree / "a" / "metrics.jsonl").write_text('{"epoch": 3, "lr": 0.25}\n')
    find_best_ckpt._written_figures.cache_clear()
    assert "0.25" in best(tree, "--metric", "lr", capsys=capsys)[1]


def test_odd_neighbours_do_not_spoil_the_ranking(tree, capsys):
    save(tree / "c", 1, args={"model": "vae"})
    save(tree / "d", 1, args=None)
    for name in ("latest.pt", "best.pt"):  # copies, where symlinks are not allowed
        (tree / "a" / name).unlink(missing_ok=True)
        shutil.copy(tree / "a" / "checkpoint_epoch_000002.pt", tree / "a" / name)
    logs = tree.parent / "logs"
    logs.mkdir()
    (logs / "a.log").write_text("epoch 1 took 1.2.3 and 0.25.\n")
    find_best_ckpt.scores_file(tree / "a" / "checkpoint_epoch_000001.pt").write_text("[1]")
    find_best_ckpt._written_figures.cache_clear()
    code, table, warnings = best(tree, capsys=capsys)
    assert code == 0
    assert table.count("/a/") == 4  # three rows and the last line
    assert "/c/" in table  # of another project: ranked too, and told
    assert "/d/" in table
    assert "?, autoencoders, vae do not compare" in warnings


def test_losses_of_runs_that_learned_other_things_are_told_apart(tree, tmp_path, capsys):
    for name, flags in (("one", {}), ("two", {"min_snr_gamma": 1.0, "only_digit": 3}), ("three", {"lr": 1.0})):
        save(tmp_path / "more" / name, 1, args={"model": "ddpm", **flags})
    warned = best(tmp_path / "more", capsys=capsys)[2]
    assert "val_loss of runs that differ in --only-digit, --min-snr-gamma do not compare" in warned
    for model in ("ae-mlp", "ae-conv", "mlp"):  # all rebuild the same digits
        save(tmp_path / "autoencoders" / model, 1, args={"model": model})
    assert best(tmp_path / "autoencoders", capsys=capsys)[2] == ""
    save(tmp_path / "autoencoders" / "threes", 1, args={"model": "ae-conv", "only_digit": 3})
    warned = best(tmp_path / "autoencoders", capsys=capsys)[2]
    assert "val_loss of runs that differ in --only-digit do not compare" in warned
    shutil.rmtree(tmp_path / "more" / "two")
    save(tmp_path / "more" / "four", 1, args={"model": "ddpm", "schedule": "linear"})  # which older ones had, unsaid
    assert best(tmp_path / "more", capsys=capsys)[2] == ""
    file = tree / "a" / "checkpoint_epoch_000001.pt"
    assert "a file: give the folder" in best(file, capsys=capsys)[2]


def test_figures_nested_too_deeply_are_passed_over(tree, capsys):
    find_best_ckpt.scores_file(tree / "a" / "checkpoint_epoch_000001.pt").write_text("[" * 100_000)
    (tree / "a" / "metrics.jsonl").write_text("[" * 100_000)
    find_best_ckpt._written_figures.cache_clear()
    assert best(tree, capsys=capsys)[0] == 0


def test_what_grows_is_best_when_largest():
    falling = ("fid", "imbalance", "seconds", "train_loss", "val_loss")
    rising = ("epoch", "global_step", "images_per_second", "accuracy", "tstr", *set(scores.ORDER) - set(falling))
    for suffix in ("", "_labelled", "_unlabelled"):
        assert {find_best_ckpt.default_mode(f"{metric}{suffix}") for metric in falling} == {"min"}
    modes = {metric: find_best_ckpt.default_mode(metric) for metric in rising}
    assert modes == dict.fromkeys(rising, "max")


@pytest.mark.parametrize("figure", [*scores.ORDER, "tstr", "epoch", "global_step"])
def test_scores_of_models_of_all_kinds_compare(figure, tmp_path, capsys):
    for model in ("ddpm", "lddpm"):
        save(tmp_path / model, 1, args={"model": model}, scores={figure: 0.5})
    assert best(tmp_path, "--metric", figure, capsys=capsys)[::2] == (0, "")


def test_scores_that_were_measured_differently_are_told(tmp_path, capsys):
    for epoch in (1, 2, 3):
        save(tmp_path / "a", epoch)
        details = {"settings": {"n": 5000, "digit": None, "seed": epoch}, "classifier": "0123456789ab"}
        scores = {"timestamp": "2026-01-01T00:00:00+00:00", "fid": 1 / epoch, "details": details}
        find_best_ckpt.scores_file(tmp_path / "a" / f"checkpoint_epoch_{epoch:06d}.pt").write_text(json.dumps(scores))
    assert best(tmp_path, "--metric", "fid", capsys=capsys)[::2] == (0, "")
    save(tmp_path / "b", 1, scores={"fid": 0.1})  # of train.py --eval-every, from fewer images
    save(tmp_path / "b", 2, scores=[0.1])  # of somebody else
    code, _, errors = best(tmp_path, "--metric", "fid", capsys=capsys)
    assert code == 0
    assert "not measured alike" in errors


def test_scores_of_training_name_their_classifier(tmp_path, capsys):
    for epoch, judged in ((1, "0123456789ab"), (2, "0123456789ab")):
        save(tmp_path, epoch, scores={"fid": epoch, "classifier": judged})
    assert best(tmp_path, "--metric", "fid", capsys=capsys)[::2] == (0, "")
    save(tmp_path, 3, scores={"fid": 3, "classifier": "ba9876543210"})
    code, _, errors = best(tmp_path, "--metric", "fid", capsys=capsys)
    assert code == 0
    assert "not measured alike" in errors


def test_find_best_as_a_process(latent_run):
    """stdout is the path and nothing else, for use in scripts; folders above and the run itself both do."""
    for folder in (latent_run, latent_run.parent):
        result = run(".", "-m common.find_best_ckpt", folder, "--print-path-only")
        path = latent_run / (latent_run / "best.pt").readlink()
        assert (result.code, result.text) == (0, f"{path}\n")


def test_inspect(latent_run, ae_run, capsys):
    inspect_ckpt.main([str(latent_run), str(ae_run / "best")])
    text = capsys.readouterr().out
    for word in (latent_run.name, ae_run.name, "lddpm", "ae-mlp", "2 (complete)", "hidden_dim=16", "T=20"):
        assert word in text, word
    inspect_ckpt.main([str(latent_run), str(ae_run / "checkpoint_epoch_000001.pt"), "--json"])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["model"], first["epoch"], first["autoencoder"]["exp_name"]) == ("lddpm", 2, ae_run.name)
    assert first["autoencoder"]["parameters"] == second["parameters"]
    assert (second["model"], second["epoch"], second["complete"]) == ("ae-mlp", 1, True)
    assert first["parameters"] == sum(math.prod(shape) for _, shape in first["tensors"].values())


def test_inspect_of_a_partial_checkpoint(tmp_path, capsys):
    save(tmp_path / "run", 3, val_loss=None, batch=7)
    inspect_ckpt.main([str(tmp_path / "run")])
    assert "partial" in capsys.readouterr().out


def test_wrong_input_of_the_tools(tmp_path, capsys):
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"")
    assert run_main(lambda: inspect_ckpt.main([str(bad)])) == BAD_CHECKPOINT
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    with pytest.raises(SystemExit) as caught:
        find_best_ckpt.main([str(tmp_path), "--top", "0"])
    assert caught.value.code == USAGE
    with pytest.raises(Exit):
        find_best_ckpt.main([str(bad)])
    result = finish(start(".", "-m common.inspect_ckpt", tmp_path / "nothing"))
    assert (result.code, len(result.text.splitlines())) == (BAD_CHECKPOINT, 1), result.text


def test_what_is_damaged_is_not_copied_as_the_best(tree, tmp_path, capsys):
    path = tree / "a" / "checkpoint_epoch_000002.pt"
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(3).numpy().tobytes())] ^= 16
    path.write_bytes(content)
    code, _, said = best(tree, "--copy-to", tmp_path / "kept.pt", capsys=capsys)
    assert (code, (tmp_path / "kept.pt").exists()) == (BAD_CHECKPOINT, False)
    assert "damaged" in said
