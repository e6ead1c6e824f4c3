"""Train a small ColBERT from nothing: its tokenizer, then contrastive learning on query-passage pairs.

    python -m modernbert.recipes.contrastive --pairs FOLDER --output FOLDER

The defaults are those of the model that ships in `modernbert/assets/default`. A run that was stopped goes
on from its last checkpoint, to the same weights, when the same command is given again. `OUTPUT/model` is the
result.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

import modernbert_kernels as ops
from modernbert.config import EncoderConfig
from modernbert.encoder import Encoder
from modernbert.heads.colbert import ColBERT, ColBERTConfig
from modernbert.packing import Packed, pack
from modernbert.tokenizer import Tokenizer
from modernbert.train import data
from modernbert.train.losses import info_nce, kl_distill
from modernbert.train.teacher import Teacher, write_teacher


@dataclass(frozen=True)
class Config:
    pairs: str  # a folder of *.jsonl or *.jsonl.zst, see train/data.py
    output: str
    drop: tuple[str, ...] = ("nl2bash",)  # sources left out (this one is GPL)
    held_out: tuple[str, ...] = ()  # BEIR folders; pairs that overlap with their texts are left out
    teacher: str = ""  # a folder of vectors, see train/teacher.py
    label_with: str = ""  # a sentence-transformers model that writes `teacher` if it is not there
    label_pairs: int = 0  # pairs of each source that it embeds, besides the tokens of the vocabulary

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    rope_theta: float = 10_000.0
    dim: int = 64
    query_length: int = 48
    document_length: int = 224
    train_query_length: int = 32  # texts are cut shorter in training, for speed
    train_document_length: int = 96

    steps: int = 1500
    batch_pairs: int = 256
    batch_tokens: int = 24_000
    learning_rate: float = 2e-3
    embedding_learning_rate: float = 5e-4
    temperature: float = 0.5  # of the sum over query tokens
    warmup: float = 0.03  # of the steps, linear from nothing
    decay: float = 0.4  # of the steps, linear to nothing at the end
    teacher_weight: float = 0.5  # of KL(teacher || student) in batches that the teacher has labelled
    teacher_temperature: float = 0.05
    seed: int = 0
    threads: int = 2
    save_minutes: float = 5.0


@dataclass(frozen=True)
class Tokens:
    """The pairs as token ids, and what a batch needs to know of them; `*_rows`: of the teacher, or -1."""

    queries: data.Rows
    positives: data.Rows
    sources: np.ndarray
    groups: np.ndarray
    query_rows: np.ndarray
    positive_rows: np.ndarray

    def save(self, file: Path) -> None:
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        for side, rows in (("q", self.queries), ("p", self.positives)):
            arrays |= {f"{side}_{name}": value for name, value in vars(rows).items()}
        with file.with_suffix(".tmp").open("wb") as part:
            np.savez(part, allow_pickle=False, **arrays)
        os.replace(file.with_suffix(".tmp"), file)

    @classmethod
    def load(cls, file: Path) -> Tokens:
        with np.load(file) as arrays:
            queries, positives = (data.Rows(arrays[f"{side}_values"], arrays[f"{side}_offsets"]) for side in "qp")
            rest = {name: arrays[name] for name in arrays.files if name[:2] not in ("q_", "p_")}
            return cls(queries, positives, **rest)


def main(config: Config) -> ColBERT:
    """Run what is left of the recipe and return the model."""
    torch.set_num_threads(config.threads)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    backend, tokens, teacher = prepare(config, output)
    model = build(config, backend, teacher)
    fit(config, model, tokens, teacher, output)
    model.eval()
    copy.deepcopy(model).half().save_pretrained(output / "model")
    return model


def prepare(config: Config, output: Path) -> tuple[tokenizers.Tokenizer, Tokens, Teacher | None]:
    """Pairs to a tokenizer, token ids and a teacher; the output folder keeps them for the next start."""
    if (output / "tokens.npz").exists():
        backend = tokenizers.Tokenizer.from_file(str(output / "tokenizer.json"))
        teacher = Teacher(config.teacher) if config.teacher else None
        return backend, Tokens.load(output / "tokens.npz"), teacher
    pairs = data.read_pairs(config.pairs, drop=config.drop)
    if config.held_out:
        held_out = (text for folder in config.held_out for text in data.read_corpus(folder))
        pairs = data.without_overlap(pairs, held_out)
    pairs = [pair for pair in pairs if pair.query.strip() and pair.positive.strip()]
    print(f"{len(pairs):,} pairs", flush=True)

    texts = (text for pair in pairs for text in (pair.query, pair.positive[:1000]))
    backend = data.train_tokenizer(texts, vocab_size=config.vocab_size)
    backend.save(str(output / "tokenizer.json"), pretty=False)

    teacher = None
    if config.teacher:
        if config.label_with and not Path(config.teacher, "keys.npy").exists():
            chosen = data.first_per_source(pairs, config.label_pairs)
            texts = token_texts(backend) + [text for pair in chosen for text in (pair.query, pair.positive)]
            write_teacher(texts, config.label_with, config.teacher)
        teacher = Teacher(config.teacher)

    queries, positives = [pair.query for pair in pairs], [pair.positive for pair in pairs]
    sources: dict[str, int] = {}
    groups: dict[tuple[str, str], int] = {}
    unlabelled = np.full(len(pairs), -1)
    tokens = Tokens(
        queries=data.Rows.from_texts(queries, backend, config.train_query_length - 3),
        positives=data.Rows.from_texts(positives, backend, config.train_document_length - 3),
        sources=np.array([sources.setdefault(pair.source, len(sources)) for pair in pairs]),
        groups=np.array([groups.setdefault((pair.source, pair.group), len(groups)) for pair in pairs]),
        query_rows=teacher.rows(queries) if teacher else unlabelled,
        positive_rows=teacher.rows(positives) if teacher else unlabelled,
    )
    tokens.save(output / "tokens.npz")
    return backend, tokens, teacher


def token_texts(backend: tokenizers.Tokenizer) -> list[str]:
    """Each token of the vocabulary as a text that a teacher can embed."""
    ids = range(backend.get_vocab_size())
    return [backend.decode([i]).strip() or str(backend.id_to_token(i)) for i in ids]


def build(config: Config, backend: tokenizers.Tokenizer, teacher: Teacher | None) -> ColBERT:
    """The untrained model; a teacher that knows the tokens gives their embeddings."""
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(backend, {"do_lower_case": True})
    encoder = Encoder(
        EncoderConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=1024,
            global_rope_theta=config.rope_theta,
            local_rope_theta=config.rope_theta,
            pad_token_id=tokenizer.pad_token_id,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
        )
    )
    if teacher is not None:
        rows = teacher.rows(token_texts(backend))
        if (rows >= 0).all():
            vectors = teacher[rows] - teacher[rows].mean(0)
            _, _, axes = torch.linalg.svd(vectors, full_matrices=False)
            vectors = F.normalize(vectors @ axes[: config.hidden_size].T, dim=-1)
            # A unit vector's elements deviate by hidden_size ** -0.5, the table's by initializer_range.
            scale = encoder.config.initializer_range * config.hidden_size**0.5
            with torch.no_grad():
                encoder.embeddings.tok_embeddings.weight[:, : vectors.shape[1]] = vectors * scale
    settings = ColBERTConfig(query_length=config.query_length, document_length=config.document_length)
    return ColBERT.from_encoder(encoder, tokenizer, dim=config.dim, config=settings)


def fit(config: Config, model: ColBERT, tokens: Tokens, teacher: Teacher | None, output: Path) -> None:
    """Train from the checkpoint in `output`, if there is one, to the last step."""
    table = model.encoder.embeddings.tok_embeddings.weight
    others = [parameter for parameter in model.parameters() if parameter is not table]
    rates = (config.embedding_learning_rate, config.learning_rate)
    optimizer = torch.optim.AdamW([{"params": [table]}, {"params": others}], betas=(0.9, 0.98), weight_decay=0.01)
    plan = Plan(config, tokens, table.detach().numpy())
    first = load_checkpoint(output, config, model, optimizer)
    model.train()
    saved = logged = time.perf_counter()
    seen, history = 0, []
    for step in range(first, config.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, config)
        loss, accuracy, size = train_step(config, model, tokens, teacher, plan[step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += size
        history.append((loss.item(), accuracy))
        now = time.perf_counter()
        if (step + 1) % 20 == 0 or step + 1 == config.steps:
            mean_loss, mean_accuracy = np.mean(history, axis=0)
            line = {
                "step": step + 1,
                "loss": round(mean_loss, 4),
                "in_batch_accuracy": round(mean_accuracy, 4),
            }
            line |= {"tokens_per_s": round(seen / (now - logged)), "cpu_s": round(time.process_time())}
            print(json.dumps(line), flush=True)
            seen, history, logged = 0, [], now
        if now - saved > 60 * config.save_minutes or step + 1 == config.steps:
            save_checkpoint(output, config, model, optimizer, step + 1)
            saved = now


def schedule(step: int, config: Config) -> float:
    """Warm-up, a plateau, and a linear decay to nothing: until it begins, more steps can be asked for."""
    rise = (step + 1) / max(1, config.warmup * config.steps)
    fall = (config.steps - step) / max(1, config.decay * config.steps)
    return min(1.0, rise, fall)


class Plan:
    """The batch of every step, epoch after epoch: a function of the config and the pairs."""

    def __init__(self, config: Config, tokens: Tokens, table: np.ndarray) -> None:
        self.config, self.batches, self.epoch_ends = config, [], [0]
        self.lengths = tokens.queries.lengths + tokens.positives.lengths + 6
        # Pairs with and without a teacher's vectors never share a batch.
        self.strata = tokens.sources * 2 + ((tokens.query_rows >= 0) & (tokens.positive_rows >= 0))
        self.topics = data.topic_vectors(tokens.positives, table)

    def __getitem__(self, step: int) -> np.ndarray:
        while step >= len(self.batches):
            seed = self.config.seed + len(self.epoch_ends)
            limits = {"max_pairs": self.config.batch_pairs, "max_tokens": self.config.batch_tokens}
            self.batches += data.plan_batches(self.lengths, self.strata, self.topics, **limits, seed=seed)
            self.epoch_ends.append(len(self.batches))
            print(f"epoch {len(self.epoch_ends) - 1} ends with step {len(self.batches):,}", flush=True)
        return self.batches[step]


def train_step(
    config: Config, model: ColBERT, tokens: Tokens, teacher: Teacher | None, batch: np.ndarray
) -> tuple[Tensor, float, int]:
    """The loss of one batch of pairs, how often the positive came first, and the number of tokens."""
    queries = with_specials(model, tokens.queries, batch, model.config.query_prefix)
    positives = with_specials(model, tokens.positives, batch, model.config.document_prefix)
    with torch.autocast("cpu", torch.bfloat16):
        scores_BB = ops.maxsim(model(queries), queries.cu_seqlens, model(positives), positives.cu_seqlens)
    loss = info_nce(scores_BB / config.temperature, torch.from_numpy(tokens.groups[batch]))
    query_rows, positive_rows = tokens.query_rows[batch], tokens.positive_rows[batch]
    if teacher is not None and min(query_rows.min(), positive_rows.min()) >= 0:
        teacher_BB = teacher[query_rows] @ teacher[positive_rows].T
        kl = kl_distill(scores_BB / config.temperature, teacher_BB / config.teacher_temperature)
        loss = (1 - config.teacher_weight) * loss + config.teacher_weight * kl
    accuracy = (scores_BB.argmax(1) == torch.arange(len(batch))).float().mean().item()
    return loss, accuracy, queries.num_tokens + positives.num_tokens


def with_specials(model: ColBERT, rows: data.Rows, batch: np.ndarray, prefix: str) -> Packed:
    """[CLS] prefix text [SEP], as `ColBERT.tokenize_queries` and `tokenize_documents` build it."""
    tokenizer = model.tokenizer
    head, tail = [tokenizer.cls_token_id, tokenizer.token_to_id(prefix)], [tokenizer.sep_token_id]
    return pack([[*head, *rows[i].tolist(), *tail] for i in batch])  # pyright: ignore[reportArgumentType]


def save_checkpoint(output: Path, config: Config, model: ColBERT, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Atomic: a run killed here goes on from the checkpoint before."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"config": asdict(config), "step": step, **state}, output / "checkpoint.tmp")
    os.replace(output / "checkpoint.tmp", output / "checkpoint.pt")


def load_checkpoint(output: Path, config: Config, model: ColBERT, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from: 0 without a checkpoint.

    Its config must be ours, but for what does not change the past: before the decay has begun, another number
    of steps may be asked for.
    """
    file = output / "checkpoint.pt"
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    free = {"pairs", "output", "teacher", "label_with", "steps", "decay", "save_minutes"}
    free |= {"query_length", "document_length"}
    ours = asdict(config)
    differs = {k: (v, ours[k]) for k, v in state["config"].items() if k not in free and v != ours[k]}
    if differs:
        raise ValueError(f"{file} is of another run: {differs} (checkpoint, asked for). Choose another --output")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"resumed at step {state['step']:,}", flush=True)
    return state["step"]


def parse(arguments: list[str] | None = None) -> Config:
    """A command line to a `Config`: one option for each field."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    for field in fields(Config):
        option: dict[str, Any] = {"required": True}
        if field.default is not MISSING:
            option = {"default": field.default, "help": f"default: {field.default!r}"}
            option |= {"nargs": "*"} if isinstance(field.default, tuple) else {"type": type(field.default)}
        parser.add_argument("--" + field.name.replace("_", "-"), **option)
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Config(**values)


if __name__ == "__main__":
    main(parse())
