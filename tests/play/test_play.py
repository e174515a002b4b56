"""`python -m common.play`: the server as a process, spoken to as a browser does."""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from forks import run
from helpers import AE, LATENT, REPO, call, environment
from serving import PLAY, last_pictures, moments, one_epoch_more, parts_of, settings, talk, waited
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from common import ckpt, classifier, load
from common.data import HF_MNIST
from common.drawing import wanted_labels
from common.error_codes import BAD_CHECKPOINT, INTERRUPTED, NO_DEVICE, USAGE, Exit
from common.images import to_bytes
from common.play import answers as answers_module
from common.play import drawings, judge, wishes
from common.play import runs as play_runs
from common.play.__main__ import main
from common.play.runs import Shelf, find
from common.play.server import MOST_TABS, Tab, is_own_name, names_of, packed
from common.play.space import Space
from common.play.wishes import MOST_BYTES, MOST_IMAGES, MOST_PASSES, Refused, drawing, parsed
from common.play.worker import Cancelled, Wish

# --- the command ---


def test_what_cannot_be_served_is_one_line(tmp_path, server, runs):
    nothing = {"SCRATCH": str(tmp_path / "scratch"), "PYTHONPATH": str(REPO)}
    for words, code, said in (
        ((tmp_path / "nothing.pt",), BAD_CHECKPOINT, "nothing.pt"),
        ((tmp_path,), BAD_CHECKPOINT, str(tmp_path)),
        ((runs["lddpm"], "--port", server.port), USAGE, f"--port {server.port}: another program listens there"),
        ((runs["lddpm"], "--port", 70000), USAGE, "--port"),
        ((runs["lddpm"], "--host", "nowhere.invalid", "--port", 0), USAGE, "--host nowhere.invalid"),
        ((runs["lddpm"], "--device", "cuda:7", "--port", 0), NO_DEVICE, "cuda:7"),
    ):
        result = run(".", PLAY, *words)
        assert (result.code, len(result.errors)) == (code, 1), result.text
        assert said in result.errors[0]
        assert "Traceback" not in result.text
    copy = tmp_path / "copy"  # of the repository, in which nobody has trained anything
    shutil.copytree(REPO / "common", copy / "common", ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run(
        [sys.executable, "-m", "common.play"], cwd=copy, capture_output=True, text=True, env=environment(**nothing)
    )
    assert result.returncode == USAGE
    assert len(result.stderr.splitlines()) == 1
    assert "bash mnist_latent_diffusion/run.sh" in result.stderr


def test_it_finds_the_runs_that_the_trainers_leave_newest_first(server, elsewhere, runs):
    hello, _ = talk(server, until=0)
    assert {run["id"]: run["model"] for run in hello["runs"]} == {path.name: model for model, path in runs.items()}
    times = [run["time"] for run in hello["runs"]]
    assert times == sorted(times, reverse=True)
    assert "3 runs" in server.said[-1]
    assert {run["id"] for run in talk(elsewhere, until=0)[0]["runs"]} >= {"of-a-job", "of-a-trainer"}
    assert sum("nothing asks for a password" in line for line in elsewhere.said) == 1
    assert urlopen(elsewhere.address).status == 200


def test_a_cache_that_is_not_there_is_said(ae_run, tmp_path, monkeypatch, capsys):
    async def served(*_):
        pass

    monkeypatch.setattr("common.play.server.serve", served)
    for folder, times in ((tmp_path / "nowhere", 1), (tmp_path, 0)):
        main([str(ae_run), "--cache-dir", str(folder)])
        assert capsys.readouterr().err.count(f"--cache-dir {folder}: there is no such folder") == times


def test_an_exported_file_can_be_played_with(latent_run, pixel_run, tmp_path, monkeypatch):
    file = tmp_path / "mnist_latent_diffusion" / "pretrained.pt"
    file.parent.mkdir()
    assert call(LATENT, "infer.py", "--ckpt", latent_run, "--export", file).code == 0
    monkeypatch.setattr(play_runs, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for entries in (find([str(file)], print), find([], print), find([str(latent_run), str(file)], print)[1:]):
        shelf = Shelf(entries, "cpu", 1, None)
        assert [run["id"] for run in shelf.described()] == ["pretrained"]
        assert torch.equal(shelf.open("pretrained").diffusion.draw(3, count=2), load(file, "cpu").draw(3, count=2))
    shutil.copy(ckpt.run_checkpoints(pixel_run)[0][1], file)  # of another kind
    shelf.open("pretrained")
    assert shelf.described()[0]["model"] == "ddpm"
    file.write_bytes(b"damaged")
    warned = []
    monkeypatch.setenv("SCRATCH", str(latent_run.parent.parent))
    assert [entry.source for entry in find([], warned.append)] == [latent_run]
    assert str(file) in warned[0]
    assert [entry.source for entry in find(["latest"], print)] == [latent_run]


def test_a_run_of_an_unknown_kind_keeps_no_other_from_the_list(latent_run, copy_of):
    copy = copy_of(latent_run)
    other = Path(shutil.copytree(copy, copy.with_name("other"), symlinks=True))
    for file in other.glob("checkpoint_epoch_*.pt"):
        state = torch.load(file, weights_only=True)
        state["args"]["model"] = "transformer"
        torch.save(state, file)
    warned = []
    assert [entry.source for entry in find([str(copy.parent)], warned.append)] == [copy]
    assert len(warned) == 1
    assert "unknown model type 'transformer'" in warned[0]
    with pytest.raises(Exit, match="unknown model type"):
        find([str(other)], warned.append)


def test_latents_are_drawn_by_one_thread_beside_the_browser_and_pixels_by_the_fastest_number(runs, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(play_runs.threads, "fastest", lambda _work: (torch.set_num_threads(3), 3)[::-1])
    monkeypatch.setattr(play_runs.threads, "available", lambda: 4)
    shelf = Shelf(find([str(runs["lddpm"]), str(runs["ddpm"])], print), "cpu", "auto", None)
    try:
        torch.set_num_threads(2)  # of a drawing between whose steps they are opened
        opened = {model: shelf.open(runs[model].name).threads for model in ("ddpm", "lddpm")}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert opened == {"ddpm": 3, "lddpm": 1}


def test_a_download_that_was_cut_off_is_no_mnist(latent_run, copy_of, tmp_path):
    folder = copy_of(latent_run)
    for _, path in ckpt.run_checkpoints(folder):
        state = ckpt.read_checkpoint(path)
        ckpt.save_checkpoint(path, state | {"args": state["args"] | {"data": "hub"}})
    shelf = Shelf(find([str(folder)], print), "cpu", 1, str(tmp_path))
    opened = shelf.open(folder.name)
    arrow = tmp_path / "ylecun___mnist" / "mnist" / "0.0.0" / "abc.incomplete" / "mnist-test.arrow"
    arrow.parent.mkdir(parents=True)
    arrow.touch()
    assert shelf.data_of(opened) == (tmp_path, "embedded")
    arrow.parent.rename(arrow.parent.with_name("abc"))
    assert shelf.data_of(opened) == (tmp_path, "hub")


def test_the_networks_used_last_stay_in_memory(runs, monkeypatch):
    monkeypatch.setattr(play_runs, "KEPT", 2)
    shelf = Shelf(find([str(runs["ddpm"].parent)], print), "cpu", 1, None)
    one, two, three = (run.name for run in runs.values())
    opened = {name: shelf.open(name) for name in (one, two, one, three)}
    assert [shelf.open(name) is opened[name] for name in (one, three, two)] == [True, True, False]


def test_files_in_one_folder_keep_a_map_each(ae_run, conv_run, cache, tmp_path):
    for run_folder, name in ((ae_run, "a.pt"), (conv_run, "b.pt")):
        assert call(AE, "infer.py", "--ckpt", run_folder, "--export", tmp_path / name).code == 0
    shelf = Shelf(find([str(tmp_path / "a.pt"), str(tmp_path / "b.pt")], print), "cpu", 1, str(cache))
    for name in ("a", "b"):
        space = Space(shelf, shelf.open(name))
        space.begin()
        while space.points is None:
            time.sleep(0.01)
    assert all(Space(shelf, shelf.open(name)).points is not None for name in ("a", "b"))


def test_ctrl_c_ends_it_at_once_even_in_the_middle_of_a_drawing(elsewhere):
    many = settings(count=MOST_IMAGES, sampler="ddpm", steps=20)

    async def ask_and_interrupt() -> tuple[int, float]:
        headers = {"Origin": elsewhere.address.rstrip("/")}
        socket = await websocket_connect(
            HTTPRequest(f"{elsewhere.address.replace('http', 'ws')}socket", headers=headers)
        )
        wish = {"do": "draw", "id": 1, "run": "of-a-trainer", "drawings": [many, many | {"side": 1}]}
        await socket.write_message(json.dumps(wish))
        for _ in range(2):  # the server's greeting, and the first steps
            await socket.read_message()
        return elsewhere.interrupt()

    code, seconds = waited(ask_and_interrupt())
    assert code == INTERRUPTED
    assert seconds < 2


# --- what it answers ---


@pytest.mark.parametrize("kind", ["lddpm", "ddpm"])
def test_a_drawing_is_what_load_draws_bit_for_bit(server, runs, kind):
    name = runs[kind].name
    sides = [settings(), settings(side=1, digits=[], sampler="ddpm", guidance=1.0, seed=2**32 - 1)]
    _, answers = talk(server, {"do": "draw", "run": name, "drawings": sides})
    images = load(runs[kind], "cpu")
    for side, how in ((0, {"labels": 3, "guidance": 2.0, "seed": 7}), (1, {"sampler": "ddpm", "seed": 2**32 - 1})):
        own = [part for part in answers if part[0].get("side") == side]
        mine = images.draw(**{"count": 4, "steps": 5, "sampler": "ddim"} | how)
        assert last_pictures(own) == to_bytes(mine).numpy().tobytes()
        shown = moments(own)
        assert sorted(shown) == [0, 1, 2, 3, 4, 5]
        assert shown[0][0]["labels"] == [3] * 4
        assert shown[0][0]["epoch"] == images.epoch
        assert own[-1][0]["done"]


def test_fewer_images_than_digits_can_be_taken_too():
    asked = settings(count=3, digits=[5, 6, 7, 8, 9])
    drawing = wishes.drawing(asked, 20)
    assert drawing.digits == wanted_labels([5, 6, 7, 8, 9], 3, 0, {}) == [5, 6, 8]
    shelf = Shelf(find([str(REPO / LATENT / "pretrained.pt")], print), "cpu", 1, None)
    wish, sent = Wish((), lambda _: None, lambda _: None, short=True), []
    wanted = {"run": "pretrained", "form": "png", "drawing": asked}
    drawings.take(shelf, wish, wanted, lambda *pixels, **_: sent.extend(pixels))
    assert any(sent)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_network_that_takes_no_labels_is_not_guided(labelled):
    """infer.py would refuse the flag."""
    words = wishes.words_of(wishes.drawing(settings(digits=[]), 20, labelled))
    assert ("--guidance" in words) == labelled


@pytest.mark.parametrize(("every", "order"), [(-1, [5, 4, 3, 2, 1, 0]), (1e9, [0, 5, 4, 3, 2, 1])])
def test_a_quick_picture_comes_before_its_moments(runs, monkeypatch, every, order):
    monkeypatch.setattr(drawings, "SHOW_EVERY", every)
    shelf = Shelf(find([str(runs["lddpm"])], print), "cpu", 1, None)
    asked = {"run": runs["lddpm"].name, "drawings": [settings()]}
    said = []
    wish = Wish((), lambda _: None, lambda _: None, short=True)
    drawings.draw(shelf, wish, asked, lambda pixels=b"", **header: said.append(header))
    assert [header["left"] for header in said if "left" in header] == order
    assert said[-2]["done"]


def test_a_newer_wish_ends_the_moments_of_an_older_one(runs, monkeypatch):
    monkeypatch.setattr(drawings, "SHOW_EVERY", 1e9)
    shelf = Shelf(find([str(runs["lddpm"])], print), "cpu", 1, None)
    said = []

    def poll() -> None:
        if any(header.get("left") == 0 for header in said):
            raise Cancelled

    wish = Wish((), lambda _: None, lambda _: None, short=True)
    wish.poll = poll
    asked = {"run": runs["lddpm"].name, "drawings": [settings()]}
    with pytest.raises(Cancelled):
        drawings.draw(shelf, wish, asked, lambda pixels=b"", **header: said.append(header))
    assert [header["left"] for header in said] == [0]  # and not "done": its moments are asked for again


def test_frames_are_x_t_and_the_x_0_predicted_from_it(server, runs):
    _, answers = talk(server, {"do": "draw", "run": runs["ddpm"].name, "drawings": [settings()]})
    seen = {}
    load(runs["ddpm"], "cpu").draw(
        3,
        count=4,
        guidance=2.0,
        seed=7,
        sampler="ddim",
        steps=5,
        watch=lambda left, x, x_0, to: seen.update({left: to(x_0)}),
    )
    shown = moments(answers)
    for left, (_, pixels) in shown.items():
        assert pixels[len(pixels) // 2 :] == to_bytes(seen[left]).numpy().tobytes()
    first, final = shown[5][1], shown[0][1]
    assert first[: len(first) // 2] != first[len(first) // 2 :]
    assert final[: len(final) // 2] == final[len(final) // 2 :]


def test_a_newer_epoch_is_picked_up(server, runs):
    asked = {"do": "draw", "run": runs["lddpm"].name, "drawings": [settings()]}
    _, before = talk(server, asked)
    with one_epoch_more(runs["lddpm"]):
        _, after = talk(server, asked)
        assert [moments(answers)[0][0]["epoch"] for answers in (before, after)] == [2, 3]
        assert last_pictures(before) != last_pictures(after)
        assert talk(server, {"do": "look", "run": runs["lddpm"].name})[1][0][0]["flags"]["epochs"] == "3"
    assert last_pictures(talk(server, asked)[1]) == last_pictures(before)


def test_a_newer_wish_cancels_and_a_closed_tab_stops_its_work(server, runs):
    slow = {"do": "draw", "run": runs["ddpm"].name, "drawings": [settings(count=MOST_IMAGES, steps=20, sampler="ddpm")]}
    quick = {"do": "draw", "run": runs["ddpm"].name, "drawings": [settings(count=1, steps=1)]}
    began = time.monotonic()
    _, answers = talk(server, slow)
    whole = time.monotonic() - began
    for newest in (quick, slow | {"drawings": []}):
        _, answers = talk(server, slow, slow, slow, newest)
        assert [header["id"] for header, _ in answers if "last" in header] == [3]  # the others never end
        assert "error" not in answers[-1][0]
    talk(server, slow, slow, until=0)  # leaves at once
    began = time.monotonic()
    talk(server, quick)
    assert time.monotonic() - began < max(whole / 2, 0.5)


def test_short_work_comes_between_the_steps_of_long_work(server, runs):
    slow = {"do": "take", "form": "png", "run": runs["ddpm"].name, "drawing": settings(count=64, steps=20)}
    quick = {"do": "draw", "run": runs["lddpm"].name, "drawings": [settings()]}
    _, answers = talk(server, slow, quick, until=2)
    assert [header["id"] for header, _ in answers if "last" in header] == [1, 0]
    alone = talk(server, slow)[1][-1][1]
    assert answers[-1][1] == alone  # and changes none of its bits


def test_what_is_short_is_so_on_both_sides(runs, monkeypatch):
    monkeypatch.setattr(drawings, "SHORT_STEPS", 5)
    shelf = Shelf(find([str(runs["lddpm"].parent)], print), "cpu", 1, None)

    def short(model: str, *steps: int) -> bool:
        sides = [settings(side=side, steps=count) for side, count in enumerate(steps)]
        return drawings.is_short(shelf, {"run": runs[model].name, "drawings": sides})

    assert [short("lddpm", 5, 5), short("lddpm", 5, 6), short("lddpm", 6, 5), short("ddpm", 5)] == [True, *[False] * 3]


def test_the_look_into_a_run(server, runs, monkeypatch):
    _, answers = talk(server, {"do": "look", "run": runs["lddpm"].name})
    header = answers[0][0]
    assert [row["epoch"] for row in header["rows"]] == [1, 2]
    assert header["pictures"] == [1, 2]
    assert header["flags"]["hidden_dim"] == "16"
    assert header["epochs"] == 2
    picture = urlopen(f"{server.address}picture?run={runs['lddpm'].name}&epoch=2").read()
    outdir = runs["lddpm"].parent.parent
    assert picture == (outdir / "samples" / runs["lddpm"].name / "epoch_000002.png").read_bytes()


def test_of_very_many_epochs_some_are_shown_with_the_last_and_the_best(monkeypatch):
    monkeypatch.setattr(answers_module, "MOST_ROWS", 4)
    losses = {2: 0.5, 3: float("nan"), 4: -float("inf"), 5: None, 6: 0.25}  # of the others 1
    rows = [{"epoch": epoch, "val_loss": losses.get(epoch, 1.0)} for epoch in range(1, 12)]
    assert [row["epoch"] for row in answers_module.thinned(rows)] == [2, 5, 6, 8, 11]
    assert answers_module.thinned(rows[:4]) == rows[:4]
    assert answers_module.thinned([]) == []


@pytest.mark.parametrize("kind", ["lddpm", "ae-mlp"])
def test_the_latent_space(server, runs, kind, cache):
    name, found = runs[kind].name, load(runs[kind], "cpu")
    autoencoder = found.autoencoder if kind == "lddpm" else found
    _, (*_, (header, _)) = talk(server, {"do": "map", "run": name})
    assert len(header["points"]) == len(header["labels"]) == 50  # the threes among the embedded test digits
    assert set(header["labels"]) == {3}
    latents = autoencoder.encode(HF_MNIST("test", cache, 3, source="embedded")[torch.arange(50)][0])
    assert header["mean"] == pytest.approx(latents.mean(0).tolist(), abs=1e-4)
    assert header["deviation"] == pytest.approx(latents.std(0, correction=0).tolist(), abs=1e-4)
    assert (runs[kind] / "latent_map.npz").is_file()
    assert talk(server, {"do": "map", "run": name})[1][-1][0]["points"] == header["points"]
    _, ((digit, pixels),) = talk(server, {"do": "digit", "run": name, "index": 5})
    image = torch.tensor(list(pixels[:784])).view(1, 1, 28, 28) / 255
    assert torch.allclose(autoencoder.encode(image)[0], torch.tensor(digit["latent"]), atol=1e-5)
    assert pixels[784:] == to_bytes(autoencoder.decode(torch.tensor([digit["latent"]]))).numpy().tobytes()
    _, ((walk, strip),) = talk(server, {"do": "walk", "run": name, "from": 5, "to": 6})
    assert (walk["ends"], walk["latents"][0]) == ([5, 6], digit["latent"])
    ends = to_bytes(autoencoder.decode(torch.tensor(walk["latents"]))).numpy().tobytes()
    assert (len(strip), strip[:784], strip[-784:]) == (11 * 784, ends[:784], ends[784:])
    middle = [(a + b) / 2 for a, b in zip(*walk["latents"], strict=True)]
    _, ((_, pixels),) = talk(server, {"do": "decode", "run": name, "latent": middle})
    near = np.frombuffer(pixels, np.uint8).astype(int) - np.frombuffer(strip[5 * 784 : 6 * 784], np.uint8)
    assert abs(near).max() <= 1


def test_a_kept_map_of_other_weights_or_digits_is_not_taken(runs, copy_of, cache):
    copy = copy_of(runs["ae-mlp"])
    shelf = Shelf(find([str(copy)], print), "cpu", 1, str(cache))
    first = Space(shelf, shelf.open(copy.name))
    first.begin()
    while first.points is None:
        time.sleep(0.01)
    assert np.array_equal(Space(shelf, shelf.open(copy.name)).points, first.points)
    with np.load(copy / "latent_map.npz") as kept:
        arrays = dict(kept)
    for changed in ({"digest": np.array("another")}, {"labels": arrays["labels"] + 1}):
        np.savez(copy / "latent_map.npz", **arrays | changed)
        assert Space(shelf, shelf.open(copy.name)).points is None
    (copy / "latent_map.npz").write_bytes(b"damaged")
    assert Space(shelf, shelf.open(copy.name)).points is None


def test_a_sketch_is_what_load_makes_of_it(server, runs):
    sketch = np.zeros((28, 28), np.uint8)
    sketch[6:14, 10:13] = 200
    image = torch.tensor(sketch) / 255
    asked = settings(image=sketch.flatten().tolist(), strength=0.5, finish=False, steps=20)
    for kind in ("lddpm", "ddpm"):
        how = {"count": 4, "seed": 7, "sampler": "ddim", "from_image": image}
        for digits, told in (([], {}), ([3], {"labels": 3, "guidance": 2.0})):  # who is told no digit is not guided
            drawings = [asked | {"digits": digits}]
            _, answers = talk(server, {"do": "draw", "run": runs[kind].name, "drawings": drawings})
            mine = load(runs[kind], "cpu").draw(**told, **how, strength=0.5, steps=10)  # half of T = 20 are left
            assert last_pictures(answers) == to_bytes(mine).numpy().tobytes()
    _, answers = talk(
        server, {"do": "draw", "run": runs["ddpm"].name, "drawings": [asked | {"finish": True, "passes": 2}]}
    )
    mine = load(runs["ddpm"], "cpu").draw(**told, **how, inpaint=image == 0, resample=2, steps=20)
    assert last_pictures(answers) == to_bytes(mine).numpy().tobytes()
    drawn = np.frombuffer(last_pictures(answers), np.uint8).reshape(4, 28, 28)
    assert (drawn[:, sketch > 0] == 200).all()
    assert (drawn[:, sketch == 0] > 0).any()
    _, answers = talk(
        server, {"do": "draw", "run": runs["lddpm"].name, "drawings": [asked | {"finish": True, "passes": 1}]}
    )
    assert "only a model of pixels" in answers[-1][0]["error"]


def test_the_classifier_is_trained_only_where_somebody_asks(runs, cache, tmp_path, monkeypatch):
    def quickly(digits, progress, poll):
        trained.append(len(digits))
        progress("classifier: step 100/600")
        poll()
        return classifier.DigitClassifier().eval()

    trained, said = [], []
    monkeypatch.setattr(classifier, "train_classifier", quickly)
    copy = Path(shutil.copytree(cache, tmp_path / "cache"))
    for kept in copy.glob("decoded/classifier-*"):
        kept.unlink()
    shelf = Shelf(find([str(runs["ddpm"])], print), "cpu", 1, str(copy))
    asked = {"do": "judge", "run": runs["ddpm"].name, "image": [0] * 300 + [255] * 30 + [0] * 454}
    wish = Wish((None, "judge"), print, print, short=False)
    send = lambda **header: said.append(header)  # noqa: E731
    judge.judge(shelf, wish, asked, send)
    assert (said, trained) == ([{"missing": True, "last": True}], [])
    judge.judge(shelf, wish, asked | {"train": True}, send)
    assert trained == [4500]
    assert {"progress": "classifier: step 100/600"} in said
    assert sum(said[-1]["probabilities"]) == pytest.approx(1, abs=1e-5)
    judge.judge(Shelf(find([str(runs["ddpm"])], print), "cpu", 1, str(copy)), wish, asked, send)  # another server
    assert said[-1] == said[-2]
    assert trained == [4500]
    with pytest.raises(Refused, match="nothing on the canvas"):
        judge.judge(shelf, wish, asked | {"image": [0] * 784}, send)


# --- hostile requests ---


def test_foreign_hosts_and_origins_are_refused(server):
    def status(path: str = "", **headers: str) -> int:
        try:
            return urlopen(Request(server.address + path, headers=headers)).status
        except HTTPError as error:
            return error.code

    assert (
        status()
        == status(Host=f"localhost:{server.port}")
        == status(Host="localhost:1234")
        == status(Host="[::1]:8")
        == 200
    )
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "[",
        "",
    ):
        assert status(Host=host) == 403, host
    own = server.address.rstrip("/")
    for origin in (
        "http://evil.example",
        "null",
        f"http://127.0.0.1:{server.port + 1}",
        f"http://localhost:{server.port}",
    ):
        with pytest.raises(Exception, match="403"):
            talk(server, until=0, origin=origin)
    with pytest.raises(Exception, match="403"):
        talk(server, until=0, host="evil.example", origin="http://evil.example")  # a name that leads here
    assert talk(server, until=0, origin=own)[0]["runs"]
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "x" * 22 + "==",
        "Sec-WebSocket-Version": "13",
    }
    assert status("socket", **upgrade) == 403  # no Origin at all
    assert status("socket", **upgrade, Origin="http://[") == 403


def test_own_names():
    assert is_own_name("cluster-7:8000", names_of("cluster-7"))
    assert not is_own_name("cluster-8:8000", names_of("cluster-7"))
    assert is_own_name("192.168.1.7:80", names_of("0.0.0.0"))
    assert not is_own_name("evil.example:80", names_of("0.0.0.0"))


def test_no_path_leads_out_of_the_page(server, runs):
    def raw(request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            try:
                connection.sendall(request)
                return b"".join(iter(lambda: connection.recv(65536), b""))
            except OSError:  # it did not want to hear all of it
                return b""

    host = f"Host: localhost:{server.port}\r\nConnection: close\r\n"
    run = f"/picture?run={runs['lddpm'].name}"
    for path in (
        "/../server.py", "/..%2fserver.py", "/%2e%2e/server.py", "/static/../../server.py", "//etc/passwd",
        "/server.py", "/picture", "/picture?run=../../etc&epoch=1", "/picture?run=x&epoch=1",
        f"{run}&epoch=../1", f"{run}&epoch=99", f"{run}&epoch=1e999",
    ):  # fmt: skip
        assert raw(f"GET {path} HTTP/1.1\r\n{host}\r\n".encode()).startswith(b"HTTP/1.1 404"), path
    assert raw(f"POST / HTTP/1.1\r\n{host}Content-Length: 3\r\n\r\nabc".encode()).startswith(b"HTTP/1.1 405")
    big = f"POST / HTTP/1.1\r\n{host}Content-Length: {2**33}\r\n\r\n".encode()
    assert not raw(big).startswith(b"HTTP/1.1 200")
    assert not raw(f"GET / HTTP/1.1\r\n{host}X: {'y' * 10 * MOST_BYTES}\r\n\r\n".encode()).startswith(b"HTTP/1.1 200")
    reply = raw(f"GET / HTTP/1.1\r\n{host}\r\n".encode())
    assert b"default-src 'none'" in reply
    assert b"frame-ancestors 'none'" in reply
    assert b"X-Content-Type-Options: nosniff" in reply
    assert b"\r\nServer:" not in reply


WRONG = [
    # (what is sent, what the sentence names)
    ("{", "JSON"),
    ("[" * 50_000, "JSON"),
    ('{"do": "draw", "id": NaN}', "JSON"),
    ("[]", "object"),
    ('{"do": ["draw"], "id": 1}', "object"),
    ('{"do": "draw"}', "Id"),
    ({"do": "__class__"}, "nothing of this name"),
    ({"do": "draw", "run": "../../etc"}, "not in the server's list"),
    ({"do": "draw", "run": ["x"]}, "not in the server's list"),
    ({"do": "draw", "drawings": [settings()] * 3}, "one or two"),
    ({"do": "draw", "drawings": [1]}, "object"),
    ({"do": "draw", "drawings": [settings(count=10**9)]}, "Count"),
    ({"do": "draw", "drawings": [settings(count=0)]}, "Count"),
    ({"do": "draw", "drawings": [settings(count=True)]}, "Count"),
    ({"do": "draw", "drawings": [settings(steps=21)]}, "Steps must be a whole number from 1 to 20"),
    ({"do": "draw", "drawings": [settings(steps="5")]}, "Steps"),
    ({"do": "draw", "drawings": [settings(guidance=1e308)]}, "Guidance"),
    ({"do": "draw", "drawings": [settings(guidance=None)]}, "Guidance"),
    ({"do": "draw", "drawings": [settings(seed=-1)]}, "Seed"),
    ({"do": "draw", "drawings": [settings(seed=2**32)]}, "Seed"),
    ({"do": "draw", "drawings": [settings(sampler="; rm -rf /")]}, "sampler"),
    ({"do": "draw", "drawings": [settings(digits=[3, 3])]}, "Digits"),
    ({"do": "draw", "drawings": [settings(digits=[10])]}, "Digits"),
    ({"do": "draw", "drawings": [settings(digits=[4])]}, "trained on 3s only"),
    ({"do": "draw", "drawings": [settings(image=[0] * 783, strength=0.5)]}, "784"),
    ({"do": "draw", "drawings": [settings(image=[256] * 784, strength=0.5)]}, "784"),
    ({"do": "draw", "drawings": [settings(image=[0] * 784, strength=0)]}, "Strength"),
    ({"do": "draw", "drawings": [settings(image=[9] * 784, finish=True)]}, "left to be filled"),
    ({"do": "take", "form": "../x", "drawing": settings()}, "form"),
    ({"do": "take", "form": [], "drawing": settings()}, "form"),
    ({"do": "take", "form": "png"}, "object"),
    ({"do": "decode", "latent": [0] * 15}, "list of 16"),
    ({"do": "decode", "latent": [1e9] * 16}, "Latent"),
    ({"do": "digit", "index": 5000}, "Index"),
    ({"do": "judge", "image": "x"}, "784"),
]  # fmt: skip


def test_wrong_wishes_are_answered_with_a_sentence(server, runs):
    wishes = [{"run": runs["lddpm"].name, **wish} if isinstance(wish, dict) else wish for wish, _ in WRONG]
    for wish, (_, said) in zip(wishes, WRONG, strict=True):
        _, answers = talk(server, wish)
        assert said in answers[-1][0]["error"], (wish, answers)
    _, answers = talk(server, {"do": "draw", "run": runs["ae-mlp"].name, "drawings": [settings()]})
    assert "draws nothing by itself" in answers[-1][0]["error"]
    _, answers = talk(server, {"do": "map", "run": runs["ddpm"].name})
    assert "no latent space" in answers[-1][0]["error"]
    with pytest.raises(Refused):
        parsed('{"do": "draw", "x": Infinity}')
    with pytest.raises(Refused):
        drawing(settings(guidance=float("nan")), 20)
    paper = {"image": [0] * 783 + [1], "finish": True, "passes": MOST_PASSES}
    assert drawing(settings(count=MOST_IMAGES, steps=1000, sampler="ddpm"), 1000).all_steps == 1000
    with pytest.raises(Refused, match="2,880,000 images times steps, and at most 300,000"):
        drawing(settings(count=MOST_IMAGES, steps=1000, **paper), 1000)


def test_an_oversized_message_closes_the_connection(server, runs):
    assert talk(server, "x" * (2 * MOST_BYTES))[1] == [({"closed": True}, b"")]
    assert talk(server, {"do": "look", "run": runs["lddpm"].name})[1]  # the server lives


def test_more_tabs_than_it_serves_are_told_so(server):
    async def conversation() -> tuple[int, str]:
        address, headers = f"ws://127.0.0.1:{server.port}/socket", {"Origin": server.address.rstrip("/")}
        tabs = [await websocket_connect(HTTPRequest(address, headers=headers)) for _ in range(MOST_TABS + 1)]
        greetings = [await tab.read_message() for tab in tabs]
        reason = tabs[-1].close_reason
        for tab in tabs:
            tab.close()
        return sum(greeting is not None for greeting in greetings), reason

    served, reason = waited(conversation())
    assert served <= MOST_TABS
    assert reason == "too many tabs are open"
    time.sleep(0.5)
    assert talk(server, until=0)[0]["runs"]  # there is room again


def test_a_tab_that_was_turned_away_makes_no_room(monkeypatch):
    monkeypatch.setattr(Tab, "open_tabs", MOST_TABS)
    for counted, left in ((False, MOST_TABS), (True, MOST_TABS - 1)):
        Tab.on_close(SimpleNamespace(counted=counted, worker=SimpleNamespace(drop=lambda _: None)))
        assert Tab.open_tabs == left


def test_what_json_has_not_is_not_sent():
    """A browser would pass over the whole message."""
    assert parts_of(packed({"guess": 0.5}) + b"ab") == ({"guess": 0.5}, b"ab")
    with pytest.raises(ValueError, match="JSON"):
        packed({"guess": float("nan")})


def test_twenty_tabs_at_once(server, runs, request):
    """Every answer is right, and memory stays bounded; --tab-seconds 60 for a minute."""
    until = time.monotonic() + request.config.getoption("--tab-seconds")
    right = {}
    for seed in range(5):
        _, answers = talk(server, {"do": "draw", "run": runs["lddpm"].name, "drawings": [settings(seed=seed)]})
        right[seed] = last_pictures(answers)
    before = server.memory()

    async def tab(number: int) -> int:
        headers = {"Origin": server.address.rstrip("/")}
        socket = await websocket_connect(HTTPRequest(f"ws://127.0.0.1:{server.port}/socket", headers=headers))
        await socket.read_message()
        count = 0
        while time.monotonic() < until or not count:
            count += 1
            seed, final = (number + count) % 5, b""
            wish = {"do": "draw", "id": count, "run": runs["lddpm"].name, "drawings": [settings(seed=seed)]}
            if count % 3 == 0:  # one that is replaced at once
                await socket.write_message(json.dumps(wish | {"id": -count + 10**6, "drawings": [settings(seed=99)]}))
            await socket.write_message(json.dumps(wish))
            while True:
                header, pixels = parts_of(await asyncio.wait_for(socket.read_message(), 60))
                if header["id"] != count:
                    continue
                final = pixels if header.get("left") == 0 else final
                if "last" in header:
                    break
            assert final[len(final) // 2 :] == right[seed]
        socket.close()
        return count

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*map(tab, range(20)))

    counts = waited(all_of_them())
    print(f"{sum(counts)} drawings for 20 tabs, {before} MB before, {server.memory()} MB after")
    assert min(counts) >= 1
    assert server.memory() < before + 150
