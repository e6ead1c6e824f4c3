"""DDP and FSDP2 over two processes give the loss and the gradients of one, with a tied decoder, and save one folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modernbert import EncoderConfig, MaskedLM, pack

RANKS = 2
SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
TEXTS = [torch.arange(n).mul(7).remainder(100).tolist() for n in (3, 40, 17, 9)]  # rank 0 takes the first two
LABELS = [torch.where(torch.arange(len(text)) % 3 == 0, torch.tensor(text), -100) for text in TEXTS]
COUNT = sum(int((labels >= 0).sum()) for labels in LABELS)
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def make() -> MaskedLM:
    """In float64, so that only the order of sums differs."""
    torch.manual_seed(0)
    model = MaskedLM.from_config(EncoderConfig(**SIZES, num_attention_heads=2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.double()


def step(call: Callable, model: nn.Module, first: int, last: int, parts: int) -> dict[str, Tensor]:
    """The part that these texts have in the loss of all labels, and the gradient of every parameter."""
    model.zero_grad()
    labels = torch.cat(LABELS[first:last])
    loss = call(pack(TEXTS[first:last]), labels=labels, num_items_in_batch=COUNT / parts).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach()} | {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad.clone() for name, grad in grads.items()
    }


def work(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mine = (2 * rank, 2 * rank + 2)
    found, model = {}, make()
    found["ddp"] = step(nn.parallel.DistributedDataParallel(model), model, *mine, RANKS)
    model, mesh = make(), init_device_mesh("cpu", (RANKS,))
    for part in (*model.model.layers, model):  # the table and the tied decoder are in one unit
        fully_shard(part, mesh=mesh)
    found["fsdp"] = step(model, model, *mine, RANKS)
    model.save_pretrained(f"{folder}/model")
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.sweep
def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=RANKS)
    model = make()
    wanted = step(model, model, 0, 4, 1)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for way in ("ddp", "fsdp"):
        loss = torch.stack([found[way]["loss"] for found in ranks]).mean()
        torch.testing.assert_close(loss, wanted["loss"], rtol=1e-12, atol=0)
        for found in ranks:
            assert found[way].keys() == wanted.keys()
            for name in wanted.keys() - {"loss"}:
                torch.testing.assert_close(found[way][name], wanted[name], rtol=1e-9, atol=1e-12)
    loaded = MaskedLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.decoder.weight is loaded.get_input_embeddings().weight
    for got, want in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)
