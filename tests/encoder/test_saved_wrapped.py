"""Models in wrappers, in parts on several ranks, or changed by another library: saved right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from folders import check_refused, tree
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.prune import l1_unstructured

from modernbert import ColBERT, Encoder, Tokenizer

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
Model = Encoder | ColBERT


def make(kind: type[Model]) -> Model:
    torch.manual_seed(0)
    encoder = Encoder.from_pretrained(BACKBONE)
    return encoder if kind is Encoder else ColBERT.from_encoder(encoder, Tokenizer.from_pretrained(BACKBONE), dim=8)


def check_saved(folder: Path, wanted: Model) -> None:
    got = type(wanted).from_pretrained(folder).state_dict()
    assert got.keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(got[name], tensor), name


@pytest.fixture(params=[Encoder, ColBERT], ids=["Encoder", "ColBERT"])
def kind(request: pytest.FixtureRequest) -> type[Model]:
    return request.param


# Wrappers


def wrap_parts(model: Model, wrap: Callable[[nn.Module], nn.Module]) -> None:
    encoder = model.base_model
    assert isinstance(encoder, Encoder)
    encoder.layers[0] = wrap(encoder.layers[0])
    encoder.layers[1].mlp = wrap(encoder.layers[1].mlp)
    if isinstance(model, ColBERT):
        model.dense[0] = wrap(model.dense[0])
        model.encoder = wrap(model.encoder)


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper], ids=["compiled", "checkpointed"])
def test_wrapped_parts_are_saved_as_what_is_inside(
    kind: type[Model], wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = make(kind)
    wrap_parts(model, wrap)
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, make(kind))


def test_a_whole_compiled_model_is_saved(kind: type[Model], tmp_path: Path) -> None:
    torch.compile(make(kind)).save_pretrained(tmp_path)
    check_saved(tmp_path, make(kind))


# Tensors that are handed in


class Holder(nn.Module):
    """As DDP names the parameters of a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


NAMED: dict[str, Callable[[Model], dict[str, torch.Tensor]]] = {
    "plain": lambda model: model.state_dict(),
    "parameters": lambda model: dict(model.named_parameters()),
    "compiled": lambda model: torch.compile(model).state_dict(),
    "DDP": lambda model: Holder(model).state_dict(),
    "compiled DDP": lambda model: torch.compile(Holder(model)).state_dict(),
    "DDP of a compiled one": lambda model: Holder(torch.compile(model)).state_dict(),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_state_dict_is_written_in_place_of_the_model(kind: type[Model], name: str, tmp_path: Path) -> None:
    """Also that of a model with another structure, such as an adapter that was merged into a copy."""
    model, other = make(kind), make(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    nn.utils.parametrizations.weight_norm(model.base_model.get_submodule("layers.0.mlp.Wi"))
    model.save_pretrained(tmp_path, state_dict=NAMED[name](other))
    check_saved(tmp_path, other)


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a name too many": (lambda state: state.update(more=torch.ones(1)), "more"),
    "a name too few": (
        lambda state: state.pop(next(n for n in state if "layers.1.mlp.Wo" in n)),
        r"missing.*1\.mlp\.Wo",
    ),
    "a NaN": (lambda state: next(iter(state.values())).fill_(torch.nan), "has NaN"),
    "nothing": (lambda state: state.clear(), "state_dict is empty"),
    "not a tensor": (lambda state: state.update({name: [1.0] for name in [*state][:1]}), "is a list; a plain tensor"),
    "no values": (lambda state: state.update({n: t.to("meta") for n, t in state.items()}), "on meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_dict_that_would_not_load_is_refused(kind: type[Model], name: str, tmp_path: Path) -> None:
    change, words = WRONG[name]
    make(kind).save_pretrained(tmp_path / "model")
    before = tree(tmp_path)
    state = {key: tensor.clone() for key, tensor in make(kind).state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=rf"(?s){words}"):
        make(kind).save_pretrained(tmp_path / "model", state_dict=state)
    assert tree(tmp_path) == before


# Changed by another library


def quantize(model: Model) -> None:
    from torch.ao.nn.quantized import dynamic

    mlp = model.base_model.get_submodule("layers.0.mlp")
    mlp.Wi = dynamic.Linear(mlp.Wi.in_features, mlp.Wi.out_features, bias_=False)


def parametrize(model: Model) -> None:
    nn.utils.parametrizations.orthogonal(model.base_model.get_submodule("layers.0.mlp.Wi"))


def prune(model: Model) -> None:
    l1_unstructured(model.base_model.get_submodule("layers.0.mlp.Wi"), "weight", 3)


def replicate(model: Model) -> None:
    """As DDP around a part, whose names have a part more."""
    model.base_model.set_submodule("layers.0", Holder(model.base_model.get_submodule("layers.0")))


def peft(model: Model, **options: object) -> nn.Module:
    library = pytest.importorskip("peft")
    return library.get_peft_model(model, library.LoraConfig(target_modules=["Wqkv", "Wo", "Wi"], **options))


CHANGED: dict[str, tuple[Callable[[Model], object], str]] = {
    "quantized": (quantize, r"layers\.0\.mlp\.Wi\._packed_params.* is a (tuple|dtype|ScriptObject); a plain tensor"),
    "parametrized": (parametrize, r"0\.mlp\.Wi\.parametrizations.*; call torch\.nn\.utils\.parametrize\.remove"),
    "pruned": (prune, r"0\.mlp\.Wi\.weight_orig.*; call torch\.nn\.utils\.prune\.remove first"),
    "a norm of a weight": (
        lambda model: nn.utils.weight_norm(model.base_model.get_submodule("layers.0.mlp.Wi")),
        r"0\.mlp\.Wi\.weight_g.*; call torch\.nn\.utils\.remove_weight_norm first",
    ),
    "a spectral norm": (
        lambda model: nn.utils.spectral_norm(model.base_model.get_submodule("layers.0.mlp.Wi")),
        r"0\.mlp\.Wi\.weight_u.*; call torch\.nn\.utils\.remove_spectral_norm first",
    ),
    "replicated": (replicate, r"missing.*layers\.0\.attn"),
    "LoRA": (peft, r"0\.mlp\.Wi\.base_layer.*; merge the adapter first, with merge_and_unload\(\) of peft"),
    "DoRA": (lambda model: peft(model, use_dora=True), r"lora_magnitude.*; merge the adapter first"),
    "a trained copy": (
        lambda model: peft(model, modules_to_save=["tok_embeddings"]),
        r"tok_embeddings\.modules_to_save.*; merge the adapter first",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_model_is_refused_with_what_to_do(kind: type[Model], name: str, tmp_path: Path) -> None:
    change, words = CHANGED[name]
    make(kind).save_pretrained(tmp_path / "model")
    model = make(kind)
    change(model)
    check_refused(model, tmp_path / "model", words)


def test_a_merged_adapter_is_saved(kind: type[Model], tmp_path: Path) -> None:
    adapted = peft(make(kind), init_lora_weights=False)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert not torch.equal(merged.state_dict()[name := next(n for n in merged.state_dict() if "Wi" in n)],
                           make(kind).state_dict()[name])  # fmt: skip
    check_saved(tmp_path, merged)


# In parts on several ranks

RANKS = 2


def work(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mesh, root = init_device_mesh("cpu", (RANKS,)), Path(folder)
    (root / "file").touch()
    for kind in (Encoder, ColBERT):
        model = make(kind)
        encoder = model.base_model
        assert isinstance(encoder, Encoder)
        for part in (*encoder.layers, model):
            fully_shard(part, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        model.save_pretrained(root / kind.__name__ / "sharded")
        # Every rank returns when the folder is there, and may load it.
        check_saved(root / kind.__name__ / "sharded", make(kind))
        whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        model.save_pretrained(root / kind.__name__ / "handed in", state_dict=whole, is_main_process=rank == 0)
        # The first rank names the error, and the other does not wait for ever.
        error = NotADirectoryError if rank == 0 else RuntimeError
        with pytest.raises(error, match="file is a file"):
            model.save_pretrained(root / "file")
        with torch.no_grad():
            next(iter(model.parameters())).mul_(torch.nan)
        with pytest.raises(ValueError, match="has NaN"):
            model.save_pretrained(root / kind.__name__ / "nan")

    encoder = make(Encoder)
    for layer in encoder.layers:
        parallelize_module(layer, mesh, {"mlp.Wi": ColwiseParallel()})
    encoder.save_pretrained(root / "Encoder" / "parallel")
    with torch.device("meta"):
        empty = Encoder(encoder.config)
    fully_shard(empty, mesh=mesh)
    with pytest.raises(ValueError, match="on meta"):
        empty.save_pretrained(root / "Encoder" / "empty")
    dist.destroy_process_group()


@pytest.mark.sweep
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_sharded_models_are_gathered_and_written_once(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=RANKS)
    for kind, names in ((Encoder, ["handed in", "parallel", "sharded"]), (ColBERT, ["handed in", "sharded"])):
        assert sorted(path.name for path in (tmp_path / kind.__name__).iterdir()) == names
        for name in names:
            check_saved(tmp_path / kind.__name__ / name, make(kind))
    assert (tmp_path / "file").read_bytes() == b""
