"""One model twice: transformers' ModernBertModel (sdpa) with loud weights, and our Encoder around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertModel
from transformers.initialization import no_init_weights
from transformers.models.modernbert import modeling_modernbert

from modernbert import Encoder, EncoderConfig

SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_activation"
    " norm_eps norm_bias attention_bias mlp_bias local_attention max_position_embeddings"
    " embedding_dropout attention_dropout mlp_dropout"
)
TINY = EncoderConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=2,
    local_attention=16,
)
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True}


def hf_dict(config: EncoderConfig, generation: int) -> dict[str, Any]:
    """config.json as transformers 4 or 5 writes it, by hand: our own writer is not to be trusted here."""
    shared = {name: getattr(config, name) for name in SHARED.split()}
    shared |= {"model_type": "modernbert", "pad_token_id": None, "cls_token_id": None, "sep_token_id": None}
    shared |= {"bos_token_id": None, "eos_token_id": None}
    thetas = config.global_rope_theta, config.local_rope_theta
    if generation == 4:
        every_n = len(config.layer_pattern)
        return shared | {
            "global_attn_every_n_layers": every_n,
            "global_rope_theta": thetas[0],
            "local_rope_theta": thetas[1],
        }
    kinds = ("full_attention", "sliding_attention")
    return shared | {
        "layer_types": config.layer_types,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(kinds, thetas, strict=True)
        },
    }


def twins(config: EncoderConfig, *, generation: int = 5, seed: int = 0) -> tuple[ModernBertModel, Encoder]:
    """Their model and ours in evaluation mode. They share every parameter, so a change of one is of both."""
    torch.manual_seed(seed)
    written = hf_dict(config, generation)
    hf_config = ModernBertConfig.from_dict(written)
    with no_init_weights():  # make_loud sets every parameter, faster
        theirs = ModernBertModel._from_config(hf_config, attn_implementation="sdpa").eval()
    make_loud(theirs)
    with torch.device("meta"):
        ours = Encoder(EncoderConfig.from_hf(written)).eval()
    ours.load_state_dict(theirs.state_dict(keep_vars=True), strict=True, assign=True)
    return theirs, ours


@torch.no_grad()
def make_loud(model: nn.Module) -> None:
    """Weights at which every part matters: attention is peaked, norms are not one, biases are not zero."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(0, 0.2)
            parameter += 0 if name.endswith("bias") else 1
        elif "embeddings" in name:
            parameter.normal_()
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
            if name.endswith("Wqkv.weight"):
                parameter[: 2 * parameter.shape[1]] *= 1.5  # logits with a standard deviation above 2


def exact_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Transformers' rotary without its cast to float32: in its place, a float64 model of theirs is one."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turn = modeling_modernbert.rotate_half
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


def random_ids(lengths: Sequence[int], vocab_size: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def pad(sequences: Sequence[Sequence[int]], side: str = "right", extra: int = 0) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, `[B, S]`, with `extra` columns that are padding in every row."""
    length = max(map(len, sequences)) + extra
    ids, mask = (torch.zeros(len(sequences), length, dtype=torch.int64) for _ in range(2))
    for row, sequence in enumerate(sequences):
        start = 0 if side == "right" else length - len(sequence)
        ids[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, start : start + len(sequence)] = 1
    return ids, mask
