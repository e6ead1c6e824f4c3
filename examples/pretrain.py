"""Masked language modelling here and by transformers' Trainer, from the same weights on the same masked texts.

python examples/pretrain.py TEXTS HELD_OUT [STEPS] [SEEDS]

TEXTS and HELD_OUT are files of rows with a "text". For each seed, the tokens per second of the loader alone, and the
held-out loss and tokens per second of both trainers are printed. The model has 6 million parameters. Both train it with
AdamW, one schedule and the same tokens in each step.
"""

import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import transformers

from modernbert import EncoderConfig, MaskedLM, Tokenizer
from modernbert.packing import unpack
from modernbert.train.bins import BinSampler, best_fit
from modernbert.train.corpus import Shards
from modernbert.train.examples import read_texts
from modernbert.train.groups import parameter_groups
from modernbert.train.loader import MaskedBatches
from modernbert.train.loop import BatchLoss, fit
from modernbert.train.masking import Masked, Masking
from modernbert.train.schedules import warmup_stable_decay
from modernbert.train.shards import write_shards
from modernbert.train.vocabulary import train_cased_tokenizer

VOCABULARY, LONGEST, ROWS, RATE, HELD_OUT = 8192, 512, 8, 1e-3, 40  # a batch has 8 rows of 512 tokens


def loss_of(model: MaskedLM, batch: Masked) -> BatchLoss:
    loss = model.loss(batch.batch, batch.labels_Q, batch.rows_Q)
    return BatchLoss(loss, batch.batch.num_tokens, {}, count=len(batch.labels_Q))


def optimizer_of(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, learning_rate=RATE, weight_decay=1e-2), betas=(0.9, 0.98))


def ours(model: MaskedLM, batches: list[Masked], schedule, output: Path) -> None:
    fit(
        model,
        optimizer_of(model),
        lambda first: islice(batches, first, None),
        partial(loss_of, model),
        output=output,
        settings={},
        steps=len(batches),
        schedule=schedule,
    )


def theirs(model: MaskedLM, batches: list[Masked], schedule, output: Path) -> None:
    """The same model in transformers, which reads padded rows. Its weights are written back to `model`."""
    model.save_pretrained(output / "start")
    twin = transformers.ModernBertForMaskedLM.from_pretrained(output / "start")

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return map(padded, batches)

    optimizer = optimizer_of(twin)
    trainer = transformers.Trainer(
        twin,
        transformers.TrainingArguments(
            str(output), max_steps=len(batches), per_device_train_batch_size=1, max_grad_norm=1.0, use_cpu=True,
            save_strategy="no", logging_steps=20, report_to="none", disable_tqdm=True,
        ),
        train_dataset=Rows(),
        data_collator=lambda rows: rows[0],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)),
    )  # fmt: skip
    trainer.train()
    model.load_state_dict(twin.state_dict())


def padded(batch: Masked) -> dict[str, torch.Tensor]:
    labels_T = torch.full_like(batch.batch.input_ids, -100)
    labels_T[batch.rows_Q] = batch.labels_Q
    mask_BS = unpack(torch.ones_like(labels_T), batch.batch)
    labels_BS = unpack(labels_T, batch.batch).masked_fill(mask_BS == 0, -100)
    return {"input_ids": unpack(batch.batch.input_ids, batch.batch), "attention_mask": mask_BS, "labels": labels_BS}


@torch.no_grad()
def held_out(model: MaskedLM, batches: list[Masked]) -> float:
    parts = [loss_of(model.eval(), batch) for batch in batches]
    counts = [int(part.count) for part in parts]
    return sum(part.loss.item() * count for part, count in zip(parts, counts, strict=True)) / sum(counts)


def batches_of(folder: Path, tokenizer: Tokenizer, share: float, seed: int, count: int) -> list[Masked]:
    pieces = Shards(folder, tokenizer).pieces(LONGEST)
    bins = best_fit(pieces.lengths, LONGEST)
    masking = Masking.hugging_face(share, tokenizer)
    return list(islice(MaskedBatches(pieces, BinSampler(bins, ROWS, seed=seed), masking, seed)(0), count))


def main(texts: str, held: str, steps: int = 300, seeds: int = 2) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        tokenizer = train_cased_tokenizer(islice(read_texts(texts), 20_000), vocab_size=VOCABULARY)
        for name, source in (("texts", texts), ("held", held)):
            write_shards(source, tokenizer, output / name)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
        config = replace(EncoderConfig.preset("ettin-17m"), vocab_size=tokenizer.vocab_size, **ids)
        test = batches_of(output / "held", tokenizer, 0.15, 0, HELD_OUT)
        schedule = partial(warmup_stable_decay, total=steps, warmup=steps // 10, decay=steps // 2)
        for seed in range(seeds):
            started = time.perf_counter()
            batches = batches_of(output / "texts", tokenizer, 0.3, seed, steps)
            speed = sum(batch.batch.num_tokens for batch in batches) / (time.perf_counter() - started)
            print(f"seed {seed}  loader alone, one process  {speed:,.0f} tokens/s", flush=True)
            for name, train in (("ours", ours), ("theirs", theirs)):
                torch.manual_seed(seed)
                model = MaskedLM.from_config(config)
                where = output / f"{name}-{seed}"
                where.mkdir()
                started = time.perf_counter()
                train(model, batches, schedule, where)
                speed = sum(batch.batch.num_tokens for batch in batches) / (time.perf_counter() - started)
                print(
                    f"seed {seed}  {name:6}  held-out loss {held_out(model, test):.4f}  {speed:,.0f} tokens/s",
                    flush=True,
                )


if __name__ == "__main__":
    texts, held, *numbers = sys.argv[1:]
    main(texts, held, *map(int, numbers))
