"""Pretrain an encoder by masked language modelling, in the stages of ModernBERT or of Ettin.

    python -m modernbert.recipes.mlm --texts FOLDER --output FOLDER
    torchrun --nproc-per-node 8 -m modernbert.recipes.mlm --texts FOLDER --output FOLDER --device cuda

The defaults are the run of ModernBERT-base, and `--model` names another row of `train/stages.py`. `--tokens`,
`--batch-tokens` and `--longest` make a run smaller: warm-ups and decays keep their shares. When a run was stopped, the
same command goes on from its last checkpoint, to the same weights. `OUTPUT/model` is the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from modernbert.config import FLAG, POSITIVE, RATE, SIZE, EncoderConfig, Kind
from modernbert.encoder import Attention
from modernbert.heads.masked_lm import MaskedLM
from modernbert.tokenizer import Tokenizer
from modernbert.train.bins import BinSampler, best_fit
from modernbert.train.claim import claim_folder
from modernbert.train.corpus import Shards
from modernbert.train.distributed import Ranks, ranks
from modernbert.train.examples import read_texts
from modernbert.train.flops import flops_per_token
from modernbert.train.groups import parameter_groups
from modernbert.train.initialize import set_context, tile_from
from modernbert.train.loader import MaskedBatches
from modernbert.train.loop import BatchLoss, fit
from modernbert.train.masking import Masked, Masking
from modernbert.train.optim import StableAdamW, load_moments
from modernbert.train.options import AMOUNT, COUNT, check_values, fixed, option, parse, run
from modernbert.train.prepare import prepare
from modernbert.train.reading import files
from modernbert.train.shards import write_shards
from modernbert.train.stages import STAGES, Stage
from modernbert.train.validation import Validation, mean_loss
from modernbert.train.vocabulary import train_cased_tokenizer

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
EVALUATED = 0.15  # share of masked tokens in the held-out loss, whatever that of training
TOKENS = Kind("a whole number, 1 or more", lambda v: type(v) is int and v >= 1, int)


@dataclass(frozen=True)
class Config:
    texts: str = option('file or folder of rows with a "text", see train/reading.py', free=True)
    output: str = option("folder of the run and its result", free=True)
    validation: str = option("file or folder of held-out texts; their loss finds the best checkpoint", "", free=True)
    model: str = option("preset of the shape, and the row of stages", "modernbert-base")
    start: str = option("checkpoint to start from; a smaller one is tiled, as for ModernBERT-large", "")
    tokenizer: str = option("folder or hub id; '' trains one on the texts", "answerdotai/ModernBERT-base")
    vocab_size: int = option("tokens of a tokenizer that is trained", 50_368, kind=SIZE)
    hidden_size: int | None = option("width; left out: the preset's", None, kind=SIZE)
    intermediate_size: int | None = option("width of the MLP; left out: the preset's", None, kind=SIZE)
    num_hidden_layers: int | None = option("layers; left out: the preset's", None, kind=SIZE)
    num_attention_heads: int | None = option("attention heads; left out: the preset's", None, kind=SIZE)
    dropout: float = option("dropout of the output of attention", 0.1, kind=RATE)

    tokens: int | None = option("tokens of all stages together; left out: as published", None, kind=TOKENS)
    batch_tokens: int | None = option(
        "tokens of a step after its warm-up, over all ranks; left out: as published", None, kind=TOKENS
    )
    longest: int | None = option("longest sequence of any stage; left out: as published", None, kind=SIZE)
    learning_rate: float | None = option("highest rate of the first stage; left out: as published", None, kind=POSITIVE)
    rank_tokens: int = option("tokens of a batch of one rank; a step accumulates batches", 98_304, kind=SIZE)
    seed: int = option("seed of the weights, of the masks and of the order of the texts", 17, kind=COUNT)

    device: str = option("where to train, such as cuda", "cpu", free=True)
    autocast: bool = option("compute in bfloat16", True, kind=FLAG)
    threads: int = option("threads of a CPU", 2, kind=SIZE)
    workers: int = option(
        "processes that make batches ahead; 0: the training process makes them", 0, kind=COUNT, free=True
    )
    compile: bool = option("compile the layers with torch.compile", False, kind=FLAG, free=True)
    validate_steps: int = option("steps between two measurements of the held-out loss", 4_000, kind=SIZE, free=True)
    save_minutes: float = option("minutes between two checkpoints", 5.0, kind=AMOUNT, free=True)


def main(config: Config) -> MaskedLM:
    """Run what is left of the recipe and return the model."""
    check_values(config)
    plan = stages(config)
    torch.set_num_threads(config.threads)
    with ranks(config.device) as group:
        for stage in plan:  # raises now, and not after the stages before it
            rows_of_batch(config, stage, group)
        with claim_folder(config.output, "mlm", fixed(config), group) as output:
            group.on_first(lambda: write_inputs(config, output))
            tokenizer = Tokenizer.from_pretrained(output)
            model = build(config, tokenizer).to(group.device)
            prepare(model, group, compile=config.compile)
            moments = None
            for number, stage in enumerate(plan, start=1):
                optimizer = begin(model, stage)
                if moments is not None:
                    load_moments(optimizer, moments)
                train(config, model, optimizer, tokenizer, output / f"stage-{number}", number, stage, group)
                moments = optimizer.state_dict()
            model.eval()
            group.on_first(lambda: save(model, tokenizer, output / "model"))
    return model


def stages(config: Config) -> list[Stage]:
    """The published stages, or the same ones made smaller."""
    if config.model not in STAGES:
        raise ValueError(f"--model is {config.model!r}, but must be one of {', '.join(STAGES)}")
    published = STAGES[config.model]
    total, first = sum(stage.tokens for stage in published), published[0].learning_rate
    made = []
    for stage in published:
        length = min(stage.sequence_length, config.longest or stage.sequence_length)
        batch_tokens = config.batch_tokens or stage.batch_size * stage.sequence_length
        size = {"sequence_length": length, "batch_size": max(1, batch_tokens // length)}
        tokens = stage.tokens * (config.tokens or total) // total
        same = (tokens, *size.values()) == (stage.tokens, stage.sequence_length, stage.batch_size)
        smaller = stage if same else stage.scaled(tokens, **size)
        if config.learning_rate is not None:
            smaller = replace(smaller, learning_rate=stage.learning_rate * config.learning_rate / first)
        made.append(smaller)
    return made


def write_inputs(config: Config, output: Path) -> None:
    """The tokenizer and the token ids of all texts, which the next start finds in `output`."""
    sources = {"validation": config.validation} if config.validation else {}
    sources["shards"] = config.texts
    for source in sources.values():
        files(source)  # raises now, and not after hours
    if not (output / "special_tokens_map.json").exists():  # the last of its files
        if config.tokenizer:
            tokenizer = Tokenizer.from_pretrained(config.tokenizer)
        else:
            tokenizer = train_cased_tokenizer(read_texts(config.texts), vocab_size=config.vocab_size)
        tokenizer.save_pretrained(output)
    tokenizer = Tokenizer.from_pretrained(output)
    for name, source in sources.items():
        write_shards(source, tokenizer, output / name, processes=max(1, config.workers))


def build(config: Config, tokenizer: Tokenizer) -> MaskedLM:
    """The model with which the first stage begins."""
    torch.manual_seed(config.seed)
    shape = {name: value for name in SHAPE if (value := getattr(config, name))}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    model = MaskedLM.from_config(
        replace(EncoderConfig.preset(config.model), vocab_size=tokenizer.vocab_size, **shape, **ids)
    )
    if config.start:
        tile_from(model, MaskedLM.from_pretrained(config.start))
    for module in model.modules():
        if isinstance(module, Attention):
            module.output_dropout_p = config.dropout  # the published models have none of the probabilities
    return model


def begin(model: MaskedLM, stage: Stage) -> StableAdamW:
    """Set the rotary positions of a stage; its optimizer."""
    set_context(
        model,
        length=stage.sequence_length,
        global_rope_theta=stage.global_rope_theta,
        local_rope_theta=stage.local_rope_theta,
    )
    groups = parameter_groups(model, learning_rate=stage.learning_rate, weight_decay=stage.weight_decay)
    return StableAdamW(groups, betas=(0.9, 0.98), eps=1e-6, decouple_lr=True)


def train(
    config: Config,
    model: MaskedLM,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    output: Path,
    number: int,
    stage: Stage,
    group: Ranks,
) -> None:
    """One stage, from its last checkpoint to its last step."""
    output.mkdir(exist_ok=True)
    corpus = Shards(output.parent / "shards", tokenizer)
    packing = best_fit(corpus.pieces(stage.sequence_length).lengths, stage.sequence_length)
    rows = rows_of_batch(config, stage, group)
    sampler = BinSampler(packing, rows, seed=config.seed + number, rank=group.rank, world_size=group.world_size)
    masking = Masking.as_trained(stage.mask_rate, tokenizer)
    batches = MaskedBatches(
        corpus.pieces(stage.sequence_length), sampler, masking, config.seed + number, config.workers
    )
    fit(
        model,
        optimizer,
        batches,
        partial(batch_loss, model, group),
        output=output,
        settings=fixed(config) | {"stage": asdict(stage), "corpus": corpus.about},
        steps=stage.steps,
        schedule=stage.factor,
        accumulate=lambda step: stage.batch_size_at(step) // (rows * group.world_size),
        clip=None,  # StableAdamW bounds the step of each tensor
        autocast=config.autocast,
        validation=held_out(config, model, tokenizer, output, stage, group),
        ranks=group,
        save_minutes=config.save_minutes,
        flops_per_token=flops(model, stage, packing.lengths) if group.device.type == "cuda" else None,
    )


def rows_of_batch(config: Config, stage: Stage, group: Ranks) -> int:
    """Bins of a batch of one rank: at most `--rank-tokens`, and so many that whole batches make a step of any size."""
    sequences, rest = divmod(stage.batch_size_at(0), group.world_size)
    if rest:
        what = f"a step of {stage.batch_size_at(0)} sequences cannot be cut into {group.world_size} ranks"
        raise ValueError(f"{what}: choose another number of ranks, or other --batch-tokens")
    most = max(1, config.rank_tokens // stage.sequence_length)
    return max(n for n in range(1, min(most, sequences) + 1) if sequences % n == 0)


def flops(model: MaskedLM, stage: Stage, lengths: np.ndarray) -> float:
    """Of a token: for the share of the device that a run uses."""
    mean = float((lengths.astype(float) ** 2).sum() / lengths.sum())  # over tokens: long pieces count more
    return flops_per_token(model.base_model.config, length=mean, decoded=stage.mask_rate)


def batch_loss(model: MaskedLM, group: Ranks, batch: Masked) -> BatchLoss:
    """The mean over the masked tokens of a batch. The last layer computes only their rows, and no logits are kept."""
    batch = batch.to(group.device, non_blocking=True)
    loss = model.loss(batch.batch, batch.labels_Q, batch.rows_Q)
    return BatchLoss(loss, batch.batch.num_tokens, {}, count=len(batch.labels_Q))


def held_out(
    config: Config, model: MaskedLM, tokenizer: Tokenizer, output: Path, stage: Stage, group: Ranks
) -> Validation | None:
    """The loss of `--validation`, at the length of the stage and with the same masks each time."""
    if not config.validation:
        return None
    pieces = Shards(output.parent / "validation", tokenizer).pieces(stage.sequence_length)
    packing, masking = best_fit(pieces.lengths, stage.sequence_length), Masking.as_trained(EVALUATED, tokenizer)
    mine = range(group.rank, len(packing), group.world_size)

    def batches() -> Iterator[Masked]:
        return (masking(pieces.packed(packing[number]), (config.seed, number)) for number in mine)

    return Validation(mean_loss(batches, partial(batch_loss, model, group), group), config.validate_steps)


def save(model: MaskedLM, tokenizer: Tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
