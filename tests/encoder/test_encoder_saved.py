"""What `save_pretrained` writes loads again; a model that would not is refused, and the old folder is as it was."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import check_refused, tree
from torch import nn
from torch.nn.utils import prune

from modernbert import Encoder, EncoderConfig, pack
from modernbert.checkpoint import save

CONFIG = EncoderConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, norm_bias=True
)
BATCH = pack([[1, 2, 3, 4], [5]])


def make() -> Encoder:
    torch.manual_seed(0)
    return Encoder(CONFIG).eval()


class Scaled(nn.Linear):
    """An adapter whose parameters have the names of a plain layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Adapter(nn.Module):
    """An adapter as peft makes them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 1, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.base_layer(input) + self.lora_A(input)


def mlp(encoder: Encoder) -> nn.Module:
    return encoder.layers[1].mlp


def tied_layers(encoder: Encoder) -> None:
    encoder.layers[2] = encoder.layers[1]


def tied_weights(encoder: Encoder) -> None:
    encoder.layers[2].mlp.Wi.weight = encoder.layers[1].mlp.Wi.weight


def one_storage(encoder: Encoder) -> None:
    rows = torch.randn(40, 16) * 0.02
    for layer, start in ((1, 0), (2, 8)):
        encoder.layers[layer].mlp.Wi.weight = nn.Parameter(rows[start : start + 32])


def turned(encoder: Encoder) -> None:
    mlp(encoder).Wi.weight = nn.Parameter(torch.randn(16, 32).T)


def repeated(encoder: Encoder) -> None:
    mlp(encoder).Wi.weight = nn.Parameter(torch.full((1, 1), 0.02).expand(32, 16))


def plain_linear(encoder: Encoder) -> None:
    weight = mlp(encoder).Wi.weight
    mlp(encoder).Wi = nn.Linear(16, 32, bias=False)
    mlp(encoder).Wi.weight = weight


def another_vocabulary(encoder: Encoder) -> None:
    encoder.resize_token_embeddings(60)


def read_only(encoder: Encoder) -> None:
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)


SAVED = [
    tied_layers,
    tied_weights,
    one_storage,
    turned,
    repeated,
    plain_linear,
    another_vocabulary,
    read_only,
]


@torch.inference_mode()
@pytest.mark.parametrize("change", SAVED, ids=lambda change: change.__name__)
def test_what_is_saved_loads_with_the_same_output(change: Callable[[Encoder], None], tmp_path: Path) -> None:
    with torch.inference_mode(mode=False):
        encoder = make()
        change(encoder)
    encoder.save_pretrained(tmp_path)
    torch.testing.assert_close(Encoder.from_pretrained(tmp_path)(BATCH), encoder(BATCH), rtol=0, atol=1e-6)


def test_a_compiled_module_is_saved_as_the_module_inside(tmp_path: Path) -> None:
    encoder, wanted = make(), make().state_dict()
    encoder.layers[1] = torch.compile(encoder.layers[1])
    encoder.layers[2].mlp = torch.compile(encoder.layers[2].mlp)
    encoder.save_pretrained(tmp_path)
    for name, tensor in Encoder.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtypes_of_a_model_are_kept_also_mixed_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    encoder = make()
    encoder.layers[1].to(dtype)
    encoder.save_pretrained(tmp_path)
    loaded = Encoder.from_pretrained(tmp_path, dtype=torch.float64)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.double()), name


def number(value: float) -> Callable[[Encoder], None]:
    def change(encoder: Encoder) -> None:
        encoder.final_norm.weight.data[3] = value

    return change


def weight(make_weight: Callable[[], torch.Tensor]) -> Callable[[Encoder], None]:
    def change(encoder: Encoder) -> None:
        mlp(encoder).Wi.weight = nn.Parameter(make_weight(), requires_grad=False)

    return change


def module(name: str, make_module: Callable[[nn.Module], nn.Module]) -> Callable[[Encoder], None]:
    def change(encoder: Encoder) -> None:
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, make_module(encoder.get_submodule(name)))

    return change


REFUSED: dict[str, tuple[Callable[[Encoder], object], str]] = {
    "nan": (number(float("nan")), r"final_norm\.weight has NaN, infinity or numbers beyond 65,504"),
    "infinity": (number(-float("inf")), r"final_norm\.weight has NaN"),
    "beyond float16": (number(70_000), r"final_norm\.weight has NaN"),
    "beyond float16, in one": (lambda e: e.half() and number(70_000)(e), r"final_norm\.weight has NaN"),
    "no values": (lambda e: e.to("meta"), r"tok_embeddings\.weight is a Tensor, torch\.strided, on meta"),
    "sparse": (weight(lambda: torch.eye(32, 16).to_sparse()), r"1\.mlp\.Wi\.weight is a Tensor, torch\.sparse_coo"),
    "integers": (weight(lambda: torch.ones(32, 16, dtype=torch.int8)), r"1\.mlp\.Wi\.weight \(int8\[32, 16\] instead"),
    "complex": (weight(lambda: torch.ones(32, 16) * 1j), r"1\.mlp\.Wi\.weight"),
    "another shape": (weight(lambda: torch.zeros(30, 16)), r"1\.mlp\.Wi\.weight \(float32\[30, 16\] instead"),
    "an adapter": (module("layers.1.mlp.Wi", Adapter), r"unexpected .*1\.mlp\.Wi\.base_layer\.weight"),
    "a subclass": (module("layers.1.mlp.Wi", lambda _: Scaled(16, 32, bias=False)), r"1\.mlp\.Wi is Scaled\("),
    "another module": (module("layers.1.mlp.Wi", lambda m: nn.Sequential(m)), r"unexpected .*1\.mlp\.Wi\.0\.weight"),
    "a module left out": (module("layers.1.attn_norm", lambda _: nn.Identity()), r"missing .*1\.attn_norm\.weight"),
    "another eps": (
        lambda e: setattr(e.embeddings.norm, "eps", 0.1),
        r"embeddings\.norm is Norm\(\(16,\), eps=0\.1",
    ),
    "a layer without parameters": (lambda e: e.layers.append(nn.Tanh()), r"layers\.3 is Tanh\(\)"),
    "a parametrized weight": (
        lambda e: nn.utils.parametrizations.weight_norm(mlp(e).Wi),
        r"missing .*1\.mlp\.Wi\.weight",
    ),
    "a pruned weight": (lambda e: prune.l1_unstructured(mlp(e).Wi, "weight", 3), r"1\.mlp\.Wi\.weight_orig"),
    "a bias": (lambda e: setattr(mlp(e).Wi, "bias", nn.Parameter(torch.ones(32))), r"unexpected .*1\.mlp\.Wi\.bias"),
    "a buffer": (lambda e: e.register_buffer("steps", torch.zeros(1)), r"unexpected \(1\): steps"),
    "fewer layers": (lambda e: e.layers.__delitem__(2), r"missing .*layers\.2\."),
    "more layers": (lambda e: e.layers.append(e.layers[0]), r"unexpected .*layers\.3\."),
}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_load_is_refused_and_nothing_is_written(name: str, exists: bool, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    if exists:
        make().save_pretrained(tmp_path / "model")
    encoder = make()
    change(encoder)
    check_refused(encoder, tmp_path / "model", words)


# Where to


def test_the_empty_string_does_not_fill_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"empty string; give '\.' for the working directory"):
        make().save_pretrained("")
    assert list(tmp_path.iterdir()) == []
    make().save_pretrained(".")
    Encoder.from_pretrained(".")


def test_a_file_or_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to("disk/model")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("file", "nowhere", "circle"):
        with pytest.raises(NotADirectoryError, match=rf"{name} is a file, or a link that leads nowhere"):
            make().save_pretrained(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["circle", "file", "nowhere"]
    assert (tmp_path / "file").read_text() == "mine"


def test_files_of_others_survive_a_save_and_a_refused_one(tmp_path: Path) -> None:
    others = {".env": b"1", ".git/config": b"2", "shards/0.tar": b"3", "README.md": b"4", "model": b"5", "lock": b"6"}
    for name, content in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    encoder = make()
    encoder.save_pretrained(tmp_path)
    saved = tree(tmp_path)
    assert saved.keys() == others.keys() | {"config.json", "model.safetensors"}
    assert others.items() <= saved.items()
    number(float("nan"))(encoder)
    with pytest.raises(ValueError, match="NaN"):
        encoder.save_pretrained(tmp_path)
    assert tree(tmp_path) == saved


def full_disk(work: Callable[[], object]) -> BaseException | None:
    """The error of `work` with files of at most 4,000 bytes."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        work()
    except OSError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_is_named_and_leaves_the_old_folder(tmp_path: Path) -> None:
    encoder, target = make(), tmp_path / "model"
    encoder.save_pretrained(target)
    before = tree(target)
    number(2.0)(encoder)
    assert f"{target}: the weights cannot be written" in str(full_disk(lambda: encoder.save_pretrained(target)))
    large = {"notes": b"x" * 5000}
    assert str(target) in str(full_disk(lambda: save(target, config={}, state={}, files=large)))
    assert tree(target) == before
    assert os.listdir(tmp_path) == ["model"]
