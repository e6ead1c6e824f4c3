"""The checks of a padded batch: shapes, masks and ids that would be read as something else."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def check_padded(
    ids_BS: Tensor, attention_mask: Tensor | None, query_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    """Raise ValueError or TypeError for shapes, devices and dtypes that do not fit together; looks at no value."""
    if ids_BS.dim() != 2:
        raise ValueError(f"input_ids must be [batch, length], got shape {tuple(ids_BS.shape)}")
    length = ids_BS.shape[1]
    others = {"attention_mask": attention_mask, "query_mask": query_mask, "position_ids": position_ids}
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            continue  # a shape is a tensor there, and `expand_as` refuses what does not fit
        shapes = [ids_BS.shape, (length,), (1, length)] if name == "position_ids" else [ids_BS.shape]
        if tensor.shape not in shapes:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(ids_BS.shape)}: they must be equal "
                "(prepared 3-D or 4-D masks are not supported)"
            )
        if tensor.device != ids_BS.device:
            raise ValueError(f"{name} is on {tensor.device}, input_ids on {ids_BS.device}: move one")
    if position_ids is not None and not is_whole(position_ids):
        raise TypeError(f"position_ids must be integers, got {position_ids.dtype}")


def check_mask(name: str, mask_BS: Tensor) -> None:
    """A mask holds 0 and 1. An additive one, with -inf in padding, would be read as its reverse."""
    wrong_BS = (mask_BS != 0) & (mask_BS != 1)
    if wrong_BS.any():
        row, column = wrong_BS.nonzero()[0].tolist()
        raise ValueError(f"{name} of sequence {row} has {mask_BS[row, column].item()}: pass 1 at tokens, 0 elsewhere")
    if mask_BS.is_floating_point() and mask_BS.numel() and not mask_BS.any():
        raise ValueError(f"{name} is {mask_BS.dtype} and 0 everywhere, as an additive mask: pass 1 at tokens")


def check_runs(keys_BS: Tensor, real_BS: Tensor) -> None:
    """Each row of both masks must be one run of ones, and the runs must start together."""
    starts = [F.pad(mask_BS, (1, 0))[:, :-1] < mask_BS for mask_BS in (keys_BS, real_BS)]
    for name, starts_BS in zip(("attention_mask", "attention_mask | query_mask"), starts, strict=True):
        holed_B = starts_BS.sum(1) > 1
        if holed_B.any():
            raise ValueError(
                f"{name} of sequence {int(holed_B.nonzero()[0])} has holes: real tokens must be adjacent. Distances "
                "and rotary positions would be ambiguous; drop the masked tokens from input_ids instead"
            )
    wrong_B = (starts[0] & ~starts[1]).any(1)
    if wrong_B.any():
        raise ValueError(f"query_mask of sequence {int(wrong_B.nonzero()[0])} marks rows in front of the real tokens")


def check_ids(ids: Tensor, vocab_size: int | None, lengths: Sequence[int]) -> None:
    if not is_whole(ids):
        raise TypeError(f"token ids must be integers, got {ids.dtype}")
    if not ids.is_cpu or ids.numel() == 0:
        return
    low, high = map(int, torch.aminmax(ids.long()))  # not of every unsigned dtype
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        wrong = low if low < 0 else high
        limit = "" if vocab_size is None else f" (vocabulary size {vocab_size})"
        place, ends = int((ids == wrong).nonzero()[0]), list(accumulate(lengths, initial=0))
        index = bisect_right(ends, place) - 1
        raise ValueError(
            f"sequence {index}, token {place - ends[index]}: token id {wrong} is out of range{limit}: does the "
            "tokenizer belong to this checkpoint, or do added tokens need encoder.resize_token_embeddings(len)?"
        )


def is_whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)
