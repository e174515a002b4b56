"""inspect_ckpt on files of any origin: described without torch, without reading tensors, without running anything."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPO, environment, make_run, state_of
from torch import nn

from common import ckpt, inspect_ckpt
from common.error_codes import BAD_CHECKPOINT, run_main


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ModuleDict({"inner": nn.Linear(4, 2, bias=False)}))


def shapes(net):
    names = {"torch.float32": "float32", "torch.int64": "int64"}
    return {name: [names[str(value.dtype)], list(value.shape)] for name, value in net.state_dict().items()}


def test_a_plain_state_dict(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    info = ckpt.inspect_checkpoint(tmp_path / "a.pt")
    assert info["kind"] == "a state_dict"
    assert info["tensors"] == shapes(net)
    assert info["parameters"] == sum(value.numel() for value in net.state_dict().values())


def test_the_function_shows_what_the_tool_shows(ae_run, capsys):
    info = ckpt.inspect_checkpoint(ae_run)
    assert f"experiment  {ae_run.name}" in capsys.readouterr().out
    assert (info["path"], info["epoch"]) == (str(ae_run / "checkpoint_epoch_000002.pt"), 2)
    assert ckpt.inspect_checkpoint(ae_run / "best")["epoch"] == info["best"]["epoch"]


def test_the_format_from_before_zip_archives(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert ckpt.inspect_checkpoint(tmp_path / "a.pt")["tensors"] == shapes(net)


@pytest.mark.parametrize("key", ["state_dict", "net", "model_state_dict"])
def test_somebody_elses_training_checkpoint(key, net, tmp_path):
    optimizer = torch.optim.Adam(net.parameters())
    content = {"epoch": 7, "arch": "tiny", key: net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "a.pt")
    info = ckpt.inspect_checkpoint(tmp_path / "a.pt")
    assert key in info["kind"]
    assert info["tensors"] == shapes(net)
    assert info["values"] == {"epoch": 7, "arch": "tiny"}


def test_a_module_saved_whole(net, tmp_path, capsys):
    torch.save(net, tmp_path / "a.pt")
    info = ckpt.inspect_checkpoint(tmp_path / "a.pt")
    assert "torch.nn.modules.container.Sequential" in info["kind"]
    assert info["tensors"] == shapes(net)
    inspect_ckpt.main([str(tmp_path / "a.pt")])
    assert "without running its pickle" in capsys.readouterr().out


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"model": bad, "x": [bad, torch.ones(2)]}])
def test_a_hostile_pickle_is_described_and_runs_nothing(legacy, wrap, tmp_path, capsys):
    path = tmp_path / "bad.pt"
    torch.save(wrap(Hostile(tmp_path / "touched")), path, _use_new_zipfile_serialization=not legacy)
    inspect_ckpt.main([str(path)])
    assert "posix.system" in capsys.readouterr().out
    assert not (tmp_path / "touched").exists()


def test_many_lists_of_tensors_are_all_counted(tmp_path):
    torch.save({"state_dict": {f"k{i}": [torch.ones(2)] for i in range(300)}}, tmp_path / "a.pt")
    assert ckpt.inspect_checkpoint(tmp_path / "a.pt")["parameters"] == 600


def test_objects_that_contain_themselves_or_nest_deep(tmp_path):
    deep = around = [torch.ones(2)]
    around.append(around)
    for _ in range(200):
        deep = [deep]
    torch.save({"weights": deep}, tmp_path / "a.pt")
    assert ckpt.inspect_checkpoint(tmp_path / "a.pt")["parameters"] == 2


def test_types_without_a_storage_class(tmp_path):
    content = {"a": torch.zeros(4).to(torch.float8_e4m3fn), "b": torch.zeros(3, dtype=torch.uint16)}
    torch.save(content, tmp_path / "a.pt")
    info = ckpt.inspect_checkpoint(tmp_path / "a.pt")
    assert info["tensors"] == {"a": ["float8_e4m3fn", [4]], "b": ["uint16", [3]]}
    assert (info["tensor_bytes"], info["classes"]) == (4 + 2 * 3, [])


class Subclass(torch.Tensor):
    pass


def with_a_note(tensor):
    tensor.note = "an attribute changes how a tensor is saved"
    return tensor


EYE, ONES = torch.eye(4), torch.ones(3, 4)
ODD = {  # name: (what makes a tensor, its type, its parameters, its bytes)
    "coo": (lambda: EYE.to_sparse(), "sparse float32", 4, 4 * 4 + 2 * 4 * 8),
    "csr": (lambda: EYE.to_sparse_csr(), "sparse float32", 4, 4 * 4 + (5 + 4) * 8),
    "csc": (lambda: EYE.to_sparse_csc(), "sparse float32", 4, 4 * 4 + (5 + 4) * 8),
    "bsr": (lambda: EYE.to_sparse_bsr((2, 2)), "sparse float32", 8, 8 * 4 + (3 + 2) * 8),
    "huge": (lambda: torch.sparse_coo_tensor([[7]], [1.0], (10**12,)), "sparse float32", 1, 4 + 8),
    "quantised": (lambda: torch.quantize_per_tensor(ONES, 0.1, 0, torch.qint8), "qint8", 12, 12),
    "qint32": (lambda: torch.quantize_per_tensor(ONES, 0.1, 0, torch.qint32), "qint32", 12, 48),
    "channels": (
        lambda: torch.quantize_per_channel(ONES, ONES[:, 0], torch.zeros(3), 0, torch.quint8),
        "quint8",
        12,
        12,
    ),
    "4 bits": (
        lambda: torch.quantize_per_channel(ONES, ONES[:, 0], torch.zeros(3), 0, torch.quint4x2),
        "quint4x2",
        12,
        6,
    ),
    "nested": (lambda: torch.nested.nested_tensor([ONES, ONES[:2]]), "nested float32", 20, 80),
    "meta": (lambda: torch.empty(7, 2, dtype=torch.bool, device="meta"), "bool", 14, 14),
    "subclass": (lambda: torch.ones(5).as_subclass(Subclass), "float32", 5, 20),
    "attribute": (lambda: with_a_note(torch.ones(2, 3)), "float32", 6, 24),
    "parameter": (lambda: with_a_note(nn.Parameter(torch.ones(6))), "float32", 6, 24),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "complex64", 3, 24),
}


@pytest.mark.filterwarnings("ignore")  # some sorts are announced as new, others as old
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_tensors_of_every_sort_count(name, legacy, tmp_path):
    make, dtype, parameters, size = ODD[name]
    tensor = make()
    torch.save({"state_dict": {"w": tensor}}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    info = ckpt.inspect_checkpoint(tmp_path / "a.pt")
    shape = [parameters] if name == "nested" else list(tensor.shape)
    assert info["tensors"] == {"w": [dtype, shape]}
    assert (info["parameters"], info["tensor_bytes"]) == (parameters, size)
    assert [name for name in info["classes"] if not name.endswith("Subclass")] == []


def save_safetensors(path, tensors, **notes):
    """As documented at huggingface.co/docs/safetensors: the header's length, the header, the tensors' bytes."""
    header, content = {"__metadata__": notes} if notes else {}, b""
    for name, (dtype, array) in tensors.items():
        start, content = len(content), content + array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, len(content)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def test_safetensors(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    weights = {"layer.weight": ("F32", np.ones((3, 4), np.float32)), "layer.bias": ("BF16", np.ones(3, np.int16))}
    save_safetensors(path, weights, format="pt")
    info = ckpt.inspect_checkpoint(path)
    assert (info["kind"], info["values"], info["classes"]) == ("a safetensors file", {"format": "pt"}, [])
    assert info["tensors"] == {"layer.weight": ["float32", [3, 4]], "layer.bias": ["bfloat16", [3]]}
    assert (info["parameters"], info["tensor_bytes"]) == (15, 4 * 12 + 2 * 3)
    inspect_ckpt.main([str(tmp_path)])  # found in a folder, too
    assert "15 in 2 tensors" in capsys.readouterr().out
    whole = path.read_bytes()
    for cut in (whole[:-1], whole[:60], whole[:8]):
        path.write_bytes(cut)
        with pytest.raises(ckpt.UnreadableCheckpoint, match="safetensors file, but truncated"):
            ckpt.inspect_checkpoint(path)


@pytest.mark.parametrize(
    "header", [b"{]", b"[1]", b'{"w": 3}', b'{"w": {"dtype": "F32", "shape": "x"}}', b"{}" + b"x" * 9]
)
def test_a_safetensors_header_that_is_none(header, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ckpt.UnreadableCheckpoint, match=r"safetensors file, but (truncated|its header)"):
        ckpt.inspect_checkpoint(tmp_path / "a.safetensors")


def test_files_of_other_programs_are_named(tmp_path):
    """Where a checkpoint is read, too, not only where a file is described."""
    np.save(tmp_path / "a.npy", np.ones(3))
    np.savez(tmp_path / "b.npz", a=np.ones(3))
    (tmp_path / "c.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    (tmp_path / "d.gguf").write_bytes(b"GGUF" + bytes(99))
    save_safetensors(tmp_path / "e.safetensors", {"w": ("F32", np.ones(3, np.float32))})
    formats = {"a.npy": "NumPy array", "b.npz": "NumPy arrays", "c.h5": "HDF5", "d.gguf": "GGUF"}
    for name, words in (formats | {"e.safetensors": "safetensors file"}).items():
        readers = [ckpt.read_checkpoint] if name[0] == "e" else [ckpt.read_checkpoint, ckpt.inspect_checkpoint]
        for read in readers:
            with pytest.raises(ckpt.UnreadableCheckpoint, match=words) as caught:
                read(tmp_path / name)
            assert "truncated" not in str(caught.value)


@pytest.mark.parametrize("change", [{"timestamp": None}, {"timestamp": "2026-01-01T00:00:00"}, {"args": [1]}])
def test_checkpoints_with_odd_entries(change, tmp_path, capsys):
    torch.save(state_of(1) | change, tmp_path / "a.pt")
    assert run_main(lambda: inspect_ckpt.main([str(tmp_path / "a.pt")])) == 0
    assert "parameters" in capsys.readouterr().out


ENDLESS: list = []
ENDLESS.append(ENDLESS)
UNFIT = [{"best": 3}, {"batch": "x", "val_loss": None}, {"ae_ckpt_data": [1]}]
UNFIT += [{"best": {"epoch": 1, "val_loss": 10**400}}, {"args": {"model": "ae-mlp", "odd": ENDLESS}}]


@pytest.mark.parametrize("change", UNFIT, ids=["best", "batch", "ae_ckpt_data", "huge", "deep"])
def test_a_checkpoint_with_other_values_is_one_line_and_hides_no_other(change, tmp_path, capsys):
    torch.save(state_of(1) | change, tmp_path / "a.pt")
    torch.save(state_of(1), tmp_path / "b.pt")
    assert run_main(lambda: inspect_ckpt.main([str(tmp_path)])) == BAD_CHECKPOINT
    told = capsys.readouterr()
    assert "a.pt: cannot be described: its values are not what they should be" in told.err
    assert len(told.err.splitlines()) == 1
    assert "b.pt" in told.out


def test_terminals_and_scripts_get_nothing_they_cannot_take(tmp_path, capsys):
    torch.save(state_of(1, exp_name="a\x1b[31mred\x9b2J\nline\x7f", train_loss=float("nan")), tmp_path / "a.pt")
    inspect_ckpt.main([str(tmp_path / "a.pt")])
    assert "a\\x1b[31mred\\x9b2J\\nline\\x7f" in capsys.readouterr().out
    inspect_ckpt.main([str(tmp_path / "a.pt"), "--json"])
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["train_loss"] is None


def test_dtypes_and_sizes(tmp_path):
    content = {str(t): torch.zeros(5, 2).to(t) for t in (torch.float64, torch.bfloat16, torch.int8, torch.bool)}
    torch.save(content, tmp_path / "a.pt")
    info = ckpt.inspect_checkpoint(tmp_path / "a.pt")
    assert {name: row[0] for name, row in info["tensors"].items()} == {n: n.removeprefix("torch.") for n in content}
    assert info["tensor_bytes"] == 10 * (8 + 2 + 1 + 1)


def test_torch_is_not_even_imported(latent_run):
    code = f"import sys; from common import inspect_ckpt as tool; tool.main([{str(latent_run)!r}])"
    code += "; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment(), capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False", result.stderr


def test_folders_and_trees(ae_run, latent_run, tmp_path, capsys):
    for name in ("one", "two"):
        make_run(tmp_path / "checkpoints" / name)
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pth")
    inspect_ckpt.main([str(tmp_path), "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("epoch") for row in rows] == [3, 3, None]
    inspect_ckpt.main([str(latent_run / "best"), "--verify"])
    text = capsys.readouterr().out
    assert "checksums  verified" in text
    assert ae_run.name in text


def test_verify_finds_a_flipped_bit(tmp_path, capsys):
    path = make_run(tmp_path / "run", [1]) / "checkpoint_epoch_000001.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run_main(lambda: inspect_ckpt.main([str(path)])) == 0
    assert run_main(lambda: inspect_ckpt.main([str(path), "--verify"])) == BAD_CHECKPOINT
    assert "checksum" in capsys.readouterr().err


def test_verify_says_what_it_did(tmp_path, capsys):
    torch.save(torch.ones(2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    inspect_ckpt.main([str(tmp_path / "old.pt"), "--verify", "--json"])
    assert json.loads(capsys.readouterr().out)["verified"] is False
    inspect_ckpt.main([str(tmp_path / "old.pt"), "--verify"])
    assert "has none" in capsys.readouterr().out


def test_what_is_no_file_at_all(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", tmp_path / ("x" * 300), tmp_path / "nowhere.pt"):
        assert run_main(lambda path=path: inspect_ckpt.main([str(path)])) == BAD_CHECKPOINT
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"hello", b"hello wo{rld", b"PK\x03\x04 not really", b"\x80\x02."])
def test_what_is_no_pytorch_file(content, tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(content)
    assert run_main(lambda: inspect_ckpt.main([str(tmp_path / "a.pt")])) == BAD_CHECKPOINT
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_empty_folder(tmp_path, capsys):
    assert run_main(lambda: inspect_ckpt.main([str(tmp_path)])) == BAD_CHECKPOINT
    assert "no checkpoint" in capsys.readouterr().err


def test_a_damaged_file_or_an_empty_folder_does_not_hide_the_others(net, tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    torch.save(net.state_dict(), tmp_path / "b.pt")
    assert (
        run_main(lambda: inspect_ckpt.main([str(tmp_path / name) for name in ("a.pt", "empty", "b.pt")]))
        == BAD_CHECKPOINT
    )
    shown = capsys.readouterr()
    assert "a.pt" in shown.err
    assert len(shown.err.splitlines()) == 2
    assert "a state_dict" in shown.out
