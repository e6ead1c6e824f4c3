"""Checkpoints: against safetensors', transformers' and torch's own files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from folders import tree
from torch import Tensor, nn

from modernbert import checkpoint, files
from modernbert.checkpoint import load_state_dict, locate, read_json, read_state_dict, save

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
ROOT = Path(__file__).parents[2]


class Small(nn.Module):
    """Two parameters, a persistent buffer and one that no checkpoint knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0, device="cpu"), persistent=False)


def small_on_meta() -> Small:
    with torch.device("meta"):
        return Small()


FLOAT32 = {"dtype": "float32", "torch_dtype": "float32"}  # what saving adds to a config


def small_state() -> dict[str, Tensor]:
    return {"linear.weight": torch.randn(5, 3), "linear.bias": torch.randn(5), "steps": torch.tensor([3, 4])}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def run(code: str, *arguments: object, **environment: str) -> str:
    """Run Python in a process of its own; what it prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Reading files


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    state = small_state() | {
        "half": torch.randn(4, 2).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(()).double(),
        "flag": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 4),
        "nan": torch.tensor([0.0, -0.0]),
    }
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert_same(read_state_dict(tmp_path), state)


def test_converts_floating_point_tensors_only(tmp_path: Path) -> None:
    state = small_state()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    want = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    assert_same(read_state_dict(tmp_path, dtype=torch.bfloat16), want)


def test_reads_pickled_weights_of_both_formats(tmp_path: Path) -> None:
    state = small_state()
    for zipped in (True, False):
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert_same(read_state_dict(tmp_path), state)
        assert read_state_dict(tmp_path, dtype=torch.float16)["linear.bias"].dtype == torch.float16


def test_prefers_safetensors_to_a_pickle(tmp_path: Path) -> None:
    state = small_state()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same(read_state_dict(tmp_path), state)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    torch.save({"w": Bomb(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged, or holds more than tensors"):
        read_state_dict(tmp_path)
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged, or holds more than tensors"):
        read_state_dict(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [{"state_dict": {"w": torch.zeros(2)}}, [torch.zeros(2)]])
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not a state dict"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "noise", "head"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    writer: Callable[..., None] = safetensors.torch.save_file if name.endswith("s") else torch.save
    writer({"w": torch.randn(100, 100)}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    broken = {"empty": b"", "truncated": whole[:-999], "noise": b"\xff" * 500, "head": whole[:11]}[damage]
    (tmp_path / name).write_bytes(broken)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_state_dict(tmp_path)


def shard(folder: Path, **shards: dict[str, Tensor]) -> None:
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    weight_map = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_reads_shards(tmp_path: Path) -> None:
    state = small_state()
    shard(tmp_path, a={"steps": state["steps"]}, b={k: v for k, v in state.items() if k != "steps"})
    assert_same(read_state_dict(tmp_path), state)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path, a={"x": torch.zeros(1)}, b={"y": torch.zeros(1)})
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"\['b\.safetensors'\]"):
        read_state_dict(tmp_path)


def test_a_shard_and_an_index_that_differ_are_refused(tmp_path: Path) -> None:
    shard(tmp_path, a={"x": torch.zeros(1), "y": torch.zeros(1)})
    safetensors.torch.save_file({"x": torch.zeros(1), "z": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"only the index has \['y'\], only the file \['z'\]"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("path", ["../x.safetensors", "/etc/x", "sub/x.safetensors", "..\\x", "C:x", "", ".."])
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "model" / "sub"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent, tmp_path):
        safetensors.torch.save_file({"w": torch.zeros(1)}, place / "x.safetensors")
    index = folder.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": path}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"index\.json points to"):
        read_state_dict(folder.parent)


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="no weight_map"):
        read_state_dict(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        read_state_dict(tmp_path)


def test_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes('{"a": "é"}'.encode())
    assert read_json(tmp_path, "config.json") == {"a": "é"}
    with pytest.raises(FileNotFoundError, match=r"modules\.json is missing; next to it: \['config\.json'\]"):
        read_json(tmp_path, "modules.json")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_json(tmp_path / "gone", "modules.json")
    for damage in (b'{"a": 1', b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
            read_json(tmp_path, "config.json")


@linux
def test_a_load_never_holds_two_copies(tmp_path: Path) -> None:
    """Growth of the peak of all memory, mapped pages included, in units of the 200 MB on the disk.

    Also: a local folder does without the hub client, whose import would take longer than most loads.
    """
    layers, width = 20, 1600
    state = {f"{i}.weight": torch.randn(width, width) for i in range(layers)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 200e6
    code = """
        import re, sys, torch
        from pathlib import Path
        from torch import nn
        from modernbert.checkpoint import load_state_dict, locate, read_state_dict

        folder, layers, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

        def memory(kind):
            return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

        def growth(dtype):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is used now
            before = memory("VmRSS")
            with torch.device("meta"):
                model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
            load_state_dict(model, read_state_dict(locate(folder), dtype=dtype))
            for parameter in model.parameters():
                parameter.detach().view(-1)[::256].sum()  # touches every page
            return memory("VmHWM") - before

        growth(torch.float16)  # whatever is loaded and allocated once
        print(growth(torch.float32), growth(torch.bfloat16), "huggingface_hub" in sys.modules)
    """
    kept, converted, client = run(code, tmp_path, layers, width).split()
    assert 0.8 < int(kept) / size < 1.1
    assert 0.4 < int(converted) / size < 0.6
    assert client == "False"


# Into a module


def test_the_module_takes_the_tensors_uncopied() -> None:
    state, module = small_state(), small_on_meta()
    module.linear.bias.requires_grad_(False)
    load_state_dict(module, state)
    assert_same(module.state_dict(), state)
    assert module.linear.weight.data_ptr() == state["linear.weight"].data_ptr()
    assert isinstance(module.linear.weight, nn.Parameter)
    assert module.linear.weight.requires_grad
    assert not module.linear.bias.requires_grad
    assert torch.equal(module.table, torch.arange(4.0))


def test_a_loaded_module_trains_and_leaves_the_file_alone(tmp_path: Path) -> None:
    """The parameters are views of a mapped file: it must be a private map."""
    save(tmp_path / "model", config={}, state=small_state())
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    module = small_on_meta()
    load_state_dict(module, read_state_dict(tmp_path / "model"))
    start = module.linear.weight.detach().clone()
    module.linear(torch.ones(2, 3)).sum().backward()
    with torch.no_grad():
        module.linear.weight -= 0.5 * module.linear.weight.grad
    assert torch.equal(module.linear.weight, start - 0.5 * 2.0)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_one_error_lists_all_that_does_not_fit() -> None:
    state = {"linear.weight": torch.zeros(3, 5), "steps": torch.zeros(2), "more": torch.zeros(1)}
    with pytest.raises(ValueError, match="do not fit this Small") as caught:
        load_state_dict(small_on_meta(), state | {"other": torch.zeros(1)})
    assert str(caught.value).splitlines()[1:] == [
        "  missing (1): linear.bias",
        "  unexpected (2): more, other",
        "  unfit (2): steps (float32[2] instead of int64[2]), linear.weight (float32[3, 5] instead of float32[5, 3])",
    ]


def test_a_refused_load_changes_nothing() -> None:
    module = Small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="missing"):
        load_state_dict(module, {"linear.weight": torch.zeros(5, 3)})
    assert_same(module.state_dict(), before)


def test_heads_are_left_out_and_the_prefix_is_cut() -> None:
    state, head = small_state(), {"head.norm.weight": torch.zeros(1), "decoder.bias": torch.zeros(1)}
    head |= {"classifier.weight": torch.zeros(1)}
    module = small_on_meta()
    load_state_dict(module, {f"model.{name}": tensor for name, tensor in state.items()} | head)
    assert_same(module.state_dict(), state)


def test_a_file_with_a_head_has_all_names_under_the_prefix() -> None:
    state = {f"model.{name}": tensor for name, tensor in small_state().items()}
    state["steps"] = state.pop("model.steps")
    with pytest.raises(ValueError, match="missing") as caught:
        load_state_dict(small_on_meta(), state)
    assert str(caught.value).splitlines()[1:] == ["  missing (1): steps", "  unexpected (1): steps"]


def test_a_module_with_a_head_of_its_own_is_strict_about_it() -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"model": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    state = {name: torch.randn(tensor.shape) for name, tensor in module.state_dict().items()}
    load_state_dict(module, state, prefix="", ignore=())
    assert_same(module.state_dict(), state)
    state["decoder.bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unexpected \(1\): decoder\.bias"):
        load_state_dict(module, state, prefix="", ignore=())


def test_non_persistent_buffers_on_meta_are_refused() -> None:
    with torch.device("meta"):
        module = nn.Module()
        module.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(ValueError, match=r"\['table'\] are still on the meta device"):
        load_state_dict(module, {})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.decoder = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.decoder.weight = self.embeddings.weight


@pytest.mark.parametrize("given", [["embeddings.weight"], ["decoder.weight"], ["decoder.weight", "embeddings.weight"]])
def test_tied_parameters_stay_tied(given: list[str]) -> None:
    weight = torch.randn(6, 4)
    with torch.device("meta"):
        module = Tied()
    load_state_dict(module, {name: weight.clone() for name in given} | {"decoder.bias": torch.ones(6)})
    assert module.decoder.weight is module.embeddings.weight
    assert torch.equal(module.decoder.weight, weight)


def test_tied_parameters_of_different_values_are_refused() -> None:
    state = {"embeddings.weight": torch.zeros(6, 4), "decoder.weight": torch.ones(6, 4)}
    with pytest.raises(ValueError, match=r"decoder\.weight \(tied to embeddings\.weight"):
        load_state_dict(Tied(), state | {"decoder.bias": torch.ones(6)})


def test_weights_with_nan_load() -> None:
    """NaN differs from itself: a comparison of tied names must not trip over it."""
    state = small_state()
    state["linear.bias"][0] = float("nan")
    module = small_on_meta()
    load_state_dict(module, state)
    assert module.linear.bias.isnan().tolist() == [True, False, False, False, False]


# Saving


def test_safetensors_reads_what_save_wrote(tmp_path: Path) -> None:
    state = small_state() | {"turned": torch.randn(3, 4).T, "nothing": torch.zeros(0), "void": torch.zeros(0)}
    files = {"modules.json": [{"idx": 0}], "1_Dense/model.safetensors": b"\0\1"}
    save(tmp_path / "new" / "model", config={"name": "é"}, state=state, files=files)
    written = tree(tmp_path / "new" / "model")
    assert_same(safetensors.torch.load(written.pop("model.safetensors")), state)
    assert json.loads(written.pop("config.json")) == {"name": "é"} | FLOAT32
    assert json.loads(written.pop("modules.json")) == [{"idx": 0}]
    assert written == {"1_Dense/model.safetensors": b"\0\1"}
    with safetensors.safe_open(tmp_path / "new" / "model" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # without which transformers 4 refuses it
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    module = Tied()
    save(tmp_path / "model", config={}, state=module.state_dict())
    assert read_state_dict(tmp_path / "model").keys() == {"embeddings.weight", "decoder.bias"}
    with torch.device("meta"):
        again = Tied()
    load_state_dict(again, read_state_dict(tmp_path / "model"))
    assert_same(again.state_dict(), module.state_dict())


def test_views_of_one_storage_are_all_written(tmp_path: Path) -> None:
    rows = torch.randn(4, 3)
    save(tmp_path / "model", config={}, state={"first": rows[:2], "second": rows[2:]})
    assert_same(read_state_dict(tmp_path / "model"), {"first": rows[:2], "second": rows[2:]})


def test_large_weights_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100)
    rows = torch.randn(4, 20)
    state = {f"row{i}": row for i, row in enumerate(rows)}  # of one storage, which must not keep them together
    save(tmp_path, config={}, state=state)
    names = {path.name for path in tmp_path.iterdir()}
    shards = {f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)}
    assert names == shards | {"config.json", "model.safetensors.index.json"}
    assert_same(read_state_dict(tmp_path), state)


def test_a_file_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    for name in ("../x", "a/../../x", str(tmp_path / "x")):
        with pytest.raises(ValueError, match="is outside"):
            save(tmp_path / "model", config={}, state={}, files={name: b""})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["swapped", "moved"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder."""
    if request.param == "moved":
        monkeypatch.setattr(files, "_swap", lambda new, target, stale: False)
    elif sys.platform != "linux":
        pytest.skip("folders are swapped on Linux only")
    return request.param


def test_a_save_replaces_the_weights_and_keeps_other_files(tmp_path: Path, way: str) -> None:
    target, outside = tmp_path / "model", tmp_path / "outside"
    outside.write_text("far")
    (target / "runs" / "1").mkdir(parents=True)
    (target / "1_Dense").mkdir()
    others = {"README.md": b"card", "runs/1/log": b"12", "1_Dense/notes": b"n", "model_card.bin": b"kept"}
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    for name, content in (others | dict.fromkeys([*stale, "1_Dense/config.json", "config.json"], b"old")).items():
        (target / name).write_bytes(content)
    (target / "link").symlink_to("../outside")
    (target / "dangling").symlink_to("nowhere")
    (target / "folder").symlink_to("runs")
    inode = (target / "README.md").stat().st_ino
    target.chmod(0o750)

    state = small_state()
    save(target, config={"new": 1}, state=state, files={"1_Dense/config.json": {"in": 2}})
    written = tree(target)
    assert_same(safetensors.torch.load(written.pop("model.safetensors")), state)
    assert json.loads(written.pop("config.json")) == {"new": 1} | FLOAT32
    assert json.loads(written.pop("1_Dense/config.json")) == {"in": 2}
    assert written == others | {"link": b"far"}
    assert os.readlink(target / "link") == "../outside"
    assert os.readlink(target / "dangling") == "nowhere"
    assert os.readlink(target / "folder") == "runs"
    assert (target / "README.md").stat().st_ino == inode
    assert target.stat().st_mode & 0o777 == 0o750
    assert {path.name for path in tmp_path.iterdir()} == {"model", "outside"}


def test_a_module_can_be_saved_over_the_file_it_is_a_view_of(tmp_path: Path, way: str) -> None:
    save(tmp_path / "model", config={}, state=small_state())
    mapped = read_state_dict(tmp_path / "model")
    want = {name: tensor.clone() for name, tensor in mapped.items()}
    for _ in range(2):
        save(tmp_path / "model", config={}, state=mapped)
        assert_same(read_state_dict(tmp_path / "model"), want)
        assert_same(mapped, want)


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, way: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", config={}, state=small_state())
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()


def test_a_mount_point_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's volume can neither be renamed nor share a file system with its parent."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "README.md").write_text("card")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    renamed: list[Path] = []
    monkeypatch.setattr(files, "_swap", lambda new, target, stale: renamed.append(target))
    save(tmp_path / "volume", config={}, state=small_state())
    assert renamed == []
    assert set(tree(tmp_path / "volume")) == {"README.md", "config.json", "model.safetensors"}


def test_the_working_directory_stays_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped away, it would be deleted under this process and the shell that started it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = Path.cwd().stat().st_ino
    save(".", config={}, state=small_state())
    assert Path("model.safetensors").is_file()
    assert (tmp_path / "here").stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [tmp_path / "here"]


@linux
def test_a_file_that_comes_during_the_save_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log begun between the copy of the old folder's entries and the swap would go with the old folder."""
    save(tmp_path / "model", config={}, state=small_state())

    calls: list[tuple[Path, ...]] = []

    def begin_a_log(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == 2:  # of the folders, when all is copied
            (tmp_path / "model" / "log").write_text("1")

    monkeypatch.setattr(files, "flush", begin_a_log)
    save(tmp_path / "model", config={"new": 1}, state=small_state())
    assert read_json(tmp_path / "model", "config.json") == {"new": 1} | FLOAT32
    assert (tmp_path / "model" / "log").read_text() == "1"
    assert len(calls) == 3


def test_others_may_read_what_is_saved(tmp_path: Path, way: str) -> None:
    for _ in range(2):
        save(tmp_path / "model", config={}, state=small_state())
        umask = os.umask(0)
        os.umask(umask)
        for path in (tmp_path / "model").iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
        assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path, way: str) -> None:
    save(tmp_path / "model", config={}, state=small_state())
    before = tree(tmp_path / "model")
    with pytest.raises(TypeError):
        save(tmp_path / "model", config={"a": object()}, state=small_state())
    assert tree(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@linux
@pytest.mark.parametrize("exists", [False, True])
def test_a_crash_leaves_the_old_folder_or_the_new_one(tmp_path: Path, way: str, exists: bool) -> None:
    """The process ends before its first, second, ... operation on the file system, until it gets through."""
    old, new = {"w": torch.zeros(3), "v": torch.zeros(1)}, {"w": torch.ones(4)}
    seen: set[str] = set()
    for step in range(1, 500):
        target = tmp_path / str(step) / "model"
        if exists:
            save(target, config={"is": "old"}, state=old)
            (target / "README.md").write_text("card")
        child = os.fork()
        if child == 0:
            left = step

            def count(event: str, _: object) -> None:
                nonlocal left
                left -= event.split(".")[0] in ("open", "os", "shutil", "ctypes")
                if left == 0:
                    os._exit(9)

            sys.addaudithook(count)
            try:
                save(target, config={"is": "new"}, state=new)
                os._exit(0)
            finally:
                os._exit(1)
        through = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        found = "nothing" if not target.exists() else "refused"
        if (target / "config.json").exists():
            found = read_json(target, "config.json")["is"]
            assert_same(read_state_dict(target), {"old": old, "new": new}[found])
        assert not (exists and target.exists()) or (target / "README.md").read_text() == "card"
        seen.add(found)
        if through:
            assert found == "new"
            break
    else:
        pytest.fail("the save never got through")
    assert step > 10
    if not exists:
        assert seen == {"nothing", "new"}
    elif way == "swapped":
        assert seen == {"old", "new"}
    else:
        assert seen == {"old", "refused", "new"}


def test_a_file_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        save(tmp_path / "model", config={}, state={})


# With transformers


@pytest.fixture(scope="module")
def hf() -> dict[str, nn.Module]:
    """Small models of transformers: bare, with a (tied) language head, with a classifier."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ModernBertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    torch.manual_seed(1)
    heads = {"base": "Model", "mlm": "ForMaskedLM", "classifier": "ForSequenceClassification"}
    return {name: getattr(transformers, f"ModernBert{head}")(config).eval() for name, head in heads.items()}


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("kind", ["base", "mlm", "classifier"])
def test_folders_of_transformers_load(tmp_path: Path, hf: dict[str, nn.Module], kind: str, shard_size: str) -> None:
    """The target is transformers' own encoder with other weights, which also has non-persistent buffers."""
    hf[kind].save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    encoder = type(hf["base"])(hf["base"].config).eval()
    load_state_dict(encoder, read_state_dict(tmp_path))
    want = hf["base"] if kind == "base" else hf[kind].model
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(encoder(ids).last_hidden_state, want(ids).last_hidden_state)


@pytest.mark.parametrize("shard_bytes", [checkpoint.SHARD_BYTES, 20_000])
def test_transformers_loads_what_save_wrote(
    tmp_path: Path, hf: dict[str, nn.Module], shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    mlm, ids = hf["mlm"], torch.arange(3, 20)[None]
    save(tmp_path, config=mlm.config.to_dict(), state=mlm.state_dict())
    again, report = type(mlm).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids).logits, mlm(ids).logits)


# Folders that are here


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    assert locate(tmp_path / "model") == tmp_path / "model"
    assert locate(str(tmp_path / "model"), revision="any") == tmp_path / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/model") == tmp_path / "model"
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        locate(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"gone' is not a local folder"):
        locate(tmp_path / "gone")
