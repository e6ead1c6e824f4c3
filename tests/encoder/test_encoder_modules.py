"""Submodules are called, not read past: hooks, replaced modules, computed weights, adapters, offloading, FSDP units."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hf_twin import BIASES, TINY, make_loud, pad, random_ids, twins
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

import modernbert_kernels as ops
from modernbert import Encoder, pack
from modernbert.encoder import Rope

TEXTS = random_ids([3, 40, 17], 100)
NAMES = [
    "embeddings.tok_embeddings",
    "embeddings.norm",
    "layers.1.attn_norm",
    "layers.2.mlp_norm",
    "final_norm",
    "layers.1.attn.Wo",
    "layers.2.mlp.Wi",
]


class Wrapped(nn.Module):
    """Another module in the place of one, as adapters do it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x).abs()


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.square()


def changed_input(module: nn.Module, args: tuple[Tensor]) -> Tensor:
    return args[0].abs() if args[0].is_floating_point() else (args[0] + 1) % 100


def patch(module: nn.Module) -> None:
    module.forward = lambda x, run=module.forward: run(x).abs()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "hook": lambda module: module.register_forward_hook(lambda module, args, out: out.abs()),
    "pre-hook": lambda module: module.register_forward_pre_hook(changed_input),
    "forward of its own": patch,
    "parametrized": lambda module: parametrize.register_parametrization(module, "weight", Squared()),
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@pytest.mark.parametrize("change", [*CHANGES, "replaced"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_done_to_a_submodule_counts(name: str, change: str) -> None:
    """As in transformers (trl#889: NEFTune; captum#624): values, and the gradient of every parameter."""
    theirs, ours = twins(replace(TINY, **BIASES))
    ids, mask = pad(TEXTS)
    with torch.no_grad():
        before = ours(pack(TEXTS))
    for model in (theirs, ours):
        if change == "replaced":
            put(model, name, Wrapped(model.get_submodule(name)))
        else:
            CHANGES[change](model.get_submodule(name))
    got, wanted = ours(pack(TEXTS)), theirs(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert (got - before).abs().max() > 1e-2
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
    weights = torch.randn_like(wanted)
    grads = [torch.autograd.grad((x * weights).sum(), list(m.parameters())) for x, m in ((got, ours), (wanted, theirs))]
    for mine, yours in zip(*grads, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=2e-4 * yours.abs().max().item())


def test_one_hook_for_all_modules_runs() -> None:
    encoder, seen = Encoder(TINY), set()
    handle = register_module_forward_hook(lambda module, args, out: seen.add(module) or None)
    try:
        encoder(pack(TEXTS))
    finally:
        handle.remove()
    assert seen == {m for m in encoder.modules() if not isinstance(m, nn.ModuleList)}


@pytest.mark.parametrize("name", ["embeddings.tok_embeddings", "embeddings.norm", "layers.2.mlp_norm", "final_norm"])
def test_backward_hooks_run(name: str) -> None:
    encoder, seen = Encoder(TINY), []
    encoder.get_submodule(name).register_full_backward_hook(lambda module, into, outof: seen.append("after"))
    encoder.get_submodule(name).register_full_backward_pre_hook(lambda module, outof: seen.append("before"))
    encoder(pack(TEXTS)).sum().backward()
    assert seen == ["before", "after"]


def test_a_norm_of_another_kind() -> None:
    """PyTorch's own LayerNorm, RMSNorm, and none at all take the place of ours."""
    encoder = Encoder(TINY)
    make_loud(encoder)
    wanted = encoder(pack(TEXTS))
    own = nn.LayerNorm(64, eps=TINY.norm_eps, bias=False)
    own.weight = encoder.layers[1].mlp_norm.weight
    encoder.layers[1].mlp_norm = own
    torch.testing.assert_close(encoder(pack(TEXTS)), wanted, rtol=0, atol=2e-5)
    for norm in (nn.RMSNorm(64), nn.Identity()):
        encoder.final_norm = norm
        assert (encoder(pack(TEXTS)) - wanted).abs().max() > 1e-2


def test_options_of_a_table_count() -> None:
    """Transformers' table gives the pad token no gradient."""
    encoder = Encoder(TINY)
    table = encoder.embeddings.tok_embeddings
    batch = pack([[3, 5, 3, 7]])
    for options in ({}, {"padding_idx": 3}, {"padding_idx": 3, "sparse": True}, {"scale_grad_by_freq": True}):
        encoder.embeddings.tok_embeddings = nn.Embedding.from_pretrained(table.weight, freeze=False, **options)
        encoder(batch).square().sum().backward()
        gradient = encoder.embeddings.tok_embeddings.weight.grad
        assert gradient.is_sparse is options.get("sparse", False)
        assert gradient.to_dense()[3].eq(0).all() == ("padding_idx" in options)
    table.max_norm = 1e-3
    encoder.embeddings.tok_embeddings = table
    encoder(batch)
    assert table.weight[[3, 5, 7]].norm(dim=1).max() < 2e-3


def test_plain_modules_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("embed_layer_norm", "add_layer_norm", "layer_norm"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, name=name: calls.append(name) or op(*a))
    encoder = Encoder(TINY)
    encoder(pack(TEXTS))
    assert calls == ["embed_layer_norm"] + ["add_layer_norm"] * 8
    calls.clear()
    handles = [encoder.get_submodule(name).register_forward_hook(lambda *_: None) for name in NAMES[:4]]
    encoder(pack(TEXTS))
    assert calls.count("embed_layer_norm") == 0
    assert (calls.count("add_layer_norm"), calls.count("layer_norm")) == (6, 3)
    for handle in handles:
        handle.remove()
    calls.clear()
    encoder(pack(TEXTS))
    assert calls == ["embed_layer_norm"] + ["add_layer_norm"] * 8


def test_a_hook_is_compiled_too() -> None:
    torch._dynamo.reset()
    encoder = Encoder(replace(TINY, num_hidden_layers=2))
    for name in ("embeddings.tok_embeddings", "embeddings.norm", "layers.1.attn_norm"):
        encoder.get_submodule(name).register_forward_hook(lambda module, args, out: 1.5 * out)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pack(TEXTS)), encoder(pack(TEXTS)), rtol=0, atol=2e-5)
    torch._dynamo.reset()


# Libraries


def test_peft_adapts_the_table() -> None:
    """LoRA on the table was ignored in silence (peft#349), and its parameters had no gradient."""
    peft = pytest.importorskip("peft")
    theirs, ours = twins(TINY)
    ids, mask = pad(TEXTS)
    models = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules=["Wqkv", "tok_embeddings"], init_lora_weights=False)
        models.append(peft.get_peft_model(model, lora))
    got, wanted = (model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()] for model in models[::-1])
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    got.square().sum().backward()
    assert [name for name, p in models[1].named_parameters() if p.requires_grad and p.grad is None] == []


def test_peft_trains_single_tokens_norms_and_whole_modules() -> None:
    peft = pytest.importorskip("peft")
    for config in (
        peft.LoraConfig(target_modules=["Wqkv"], trainable_token_indices={"tok_embeddings": [1, 7]}),
        peft.LoraConfig(target_modules=["Wqkv"], modules_to_save=["tok_embeddings", "norm", "final_norm"]),
        peft.LNTuningConfig(target_modules=["norm", "attn_norm", "mlp_norm", "final_norm"]),
        peft.IA3Config(target_modules=["Wqkv", "Wo"], feedforward_modules=["Wo"]),
    ):
        model = peft.get_peft_model(Encoder(TINY), config)
        model(input_ids=torch.tensor([[1, 7, 9]])).last_hidden_state.square().sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert [name for name, gradient in trained.items() if gradient is None] == []


def test_accelerate_offloads_weights() -> None:
    """Its hooks bring the weights of a module when it is called (transformers#48409)."""
    accelerate = pytest.importorskip("accelerate")
    encoder = Encoder(TINY).eval()
    make_loud(encoder)
    batch, (ids, mask) = pack(TEXTS), pad(TEXTS)
    with torch.no_grad():
        wanted = encoder(batch)
        offloaded = accelerate.cpu_offload(copy.deepcopy(encoder), execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        assert torch.equal(offloaded(batch), wanted)
        assert torch.equal(offloaded(ids, mask).last_hidden_state[mask.bool()], wanted)


def test_a_rotary_table_moves() -> None:
    """Accelerate moves the arguments of a layer to the layer's device by their method `to`."""
    moved = Rope(torch.zeros(2, 4), torch.ones(2, 4)).to("meta", non_blocking=True)
    assert moved.cos.is_meta
    assert moved.sin.is_meta


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_every_module_may_be_a_unit_of_fsdp(tmp_path: Path) -> None:
    """The table, each norm, each linear layer, attention, MLP and layer: values and gradients stay."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    encoder = Encoder(replace(TINY, **BIASES)).double()
    make_loud(encoder)
    batch, sharded = pack(TEXTS), copy.deepcopy(encoder)
    wanted = encoder(batch)
    wanted.square().sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in [m for m in sharded.modules() if not isinstance(m, nn.ModuleList)][::-1]:
            fully_shard(module, mesh=mesh)
        got = sharded(batch)
        got.square().sum().backward()
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        for mine, (name, yours) in zip(sharded.parameters(), encoder.named_parameters(), strict=True):
            limit = 1e-12 * yours.grad.abs().max().item()
            torch.testing.assert_close(mine.grad.full_tensor(), yours.grad, rtol=0, atol=limit, msg=name)
        mixed, seen = copy.deepcopy(encoder).float(), []
        for module in (*mixed.layers, mixed):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        mixed.layers[1].attn.register_forward_pre_hook(lambda module, args: seen.extend([args[0], args[2].cos]))
        mixed(batch)
        # Angles in bfloat16 would be wrong by up to 0.4 %, and no kernel takes them.
        assert [x.dtype for x in seen] == [torch.bfloat16, torch.float32]
    finally:
        dist.destroy_process_group()


def test_a_resized_table_keeps_its_hooks_and_options() -> None:
    encoder, seen = Encoder(TINY), []
    table = encoder.embeddings.tok_embeddings = nn.Embedding(100, 64, padding_idx=3)
    table.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    encoder.resize_token_embeddings(120)
    assert encoder.embeddings.tok_embeddings is table
    assert (table.padding_idx, table.num_embeddings, table.weight.shape) == (3, 120, (120, 64))
    encoder(torch.tensor([[119, 3]])).last_hidden_state.square().sum().backward()
    assert seen == [2]
    assert table.weight.grad[3].eq(0).all()
    prune.l1_unstructured(table, "weight", 0.5)
    for wrapped in (table, Wrapped(nn.Embedding(120, 64))):
        encoder.embeddings.tok_embeddings = wrapped
        with pytest.raises(ValueError, match="resize it before"):
            encoder.resize_token_embeddings(130)
        assert encoder.config.vocab_size == 120
