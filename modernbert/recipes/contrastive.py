"""Train a small ColBERT from nothing: its tokenizer, then contrastive learning on query-passage pairs.

    python -m modernbert.recipes.contrastive --pairs FOLDER --output FOLDER

The defaults are those of the model that ships in `modernbert/assets/default`. When a run was stopped, the same command
goes on from its last checkpoint, to the same weights. `OUTPUT/model` is the result.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from modernbert.config import POSITIVE, SIZE, THETA, EncoderConfig, Kind
from modernbert.encoder import Encoder
from modernbert.files import replacing
from modernbert.heads.colbert import ColBERT, ColBERTConfig
from modernbert.late_interaction import Ragged, maxsim
from modernbert.packing import Tokens
from modernbert.tokenizer import Tokenizer
from modernbert.train import data
from modernbert.train.batching import epochs, topic_vectors
from modernbert.train.checkpoints import check_finite
from modernbert.train.folder import run_folder
from modernbert.train.loop import BatchLoss, fit
from modernbert.train.losses import info_nce, kl_distill
from modernbert.train.optim import adamw, warmup_and_decay
from modernbert.train.options import check_values, fixed, option, parse, run
from modernbert.train.teacher import Teacher, teach_embeddings, token_texts, write_teacher
from modernbert.train.vocabulary import train_tokenizer

COUNT = Kind("a whole number, 0 or more", lambda v: type(v) is int and 0 <= v < 2**63, int)
PAIRS = Kind("a whole number, 2 or more: the others are the negatives", lambda v: type(v) is int and v >= 2, int)
AMOUNT = Kind("a finite number, 0 or more", lambda v: type(v) in (int, float) and 0 <= v < math.inf, float)
SHARE = Kind("a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1, float)


@dataclass(frozen=True)
class Config:
    pairs: str = option("folder of *.jsonl files, also .gz or .zst: one pair a line, see train/data.py", free=True)
    output: str = option("folder of the run and its result", free=True)
    exclude_sources: tuple[str, ...] = option("sources of pairs that are left out", ())
    decontaminate_against: tuple[str, ...] = option("BEIR folders; pairs sharing 8 words in a row are left out", ())
    teacher: str = option("folder of a teacher's vectors, see train/teacher.py", "", free=True)
    teacher_model: str = option("sentence-transformers model that fills this folder if it is new", "", free=True)
    teacher_pairs: int = option(
        "pairs of each source that it embeds, besides the tokens of the vocabulary", 0, kind=COUNT
    )

    vocab_size: int = option("tokens of the vocabulary", 8192, kind=SIZE)
    hidden_size: int = option("width of the encoder", 256, kind=SIZE)
    intermediate_size: int = option("width of its MLP", 256, kind=SIZE)
    num_hidden_layers: int = option("layers", 3, kind=SIZE)
    num_attention_heads: int = option("attention heads of a layer", 4, kind=SIZE)
    rope_theta: float = option("base of the rotary positions of all layers", 10_000.0, kind=THETA)
    dim: int = option("width of the vector of a token", 64, kind=SIZE)
    query_length: int = option("longest query of the finished model, in tokens", 48, kind=SIZE, free=True)
    document_length: int = option("longest document of the finished model, in tokens", 224, kind=SIZE, free=True)
    train_query_length: int = option("longest query in training; shorter is faster", 32, kind=SIZE)
    train_document_length: int = option("longest document in training", 96, kind=SIZE)

    steps: int = option("steps of the optimizer", 1500, kind=COUNT, free=True)
    batch_pairs: int = option("most pairs of a batch", 256, kind=PAIRS)
    batch_tokens: int = option("most tokens of a batch", 24_000, kind=SIZE)
    accumulate: int = option("batches of a step; each scores its own pairs only", 1, kind=SIZE)
    learning_rate: float = option("highest learning rate", 2e-3, kind=POSITIVE)
    embedding_learning_rate: float = option("highest learning rate of the token embeddings", 5e-4, kind=AMOUNT)
    temperature: float = option("temperature of the score, a sum over query tokens", 0.5, kind=POSITIVE)
    warmup: float = option("share of the steps in which the learning rate rises", 0.03, kind=SHARE)
    decay: float = option("share of the steps, the last ones, in which it falls to nothing", 0.4, kind=SHARE, free=True)
    teacher_weight: float = option(
        "weight of KL(teacher || student) in batches that the teacher has embedded", 0.5, kind=SHARE
    )
    teacher_temperature: float = option("temperature of the teacher's cosines", 0.05, kind=POSITIVE)
    seed: int = option("seed of the weights and of the order of the pairs", 0, kind=COUNT)
    device: str = option("where to train, such as cuda", "cpu", free=True)
    threads: int = option("threads of a CPU", 2, kind=SIZE)
    save_minutes: float = option("minutes between two checkpoints", 5.0, kind=AMOUNT, free=True)


def main(config: Config) -> ColBERT:
    """Run what is left of the recipe and return the model."""
    check_values(config)
    if not config.teacher and (config.teacher_model or config.teacher_pairs):
        raise ValueError("--teacher-model and --teacher-pairs are about the folder --teacher, which is not given")
    torch.set_num_threads(config.threads)
    output = run_folder(config.output)
    model, pairs, teacher = prepare(config, output)
    table = model.encoder.embeddings.tok_embeddings.weight
    batches = epochs(
        pairs.lengths,
        # Pairs with and without a teacher's vectors never share a batch.
        strata=pairs.sources * 2 + (pairs.teacher_index >= 0).all(1),
        topics=topic_vectors(pairs.positives, table.detach().float().cpu().numpy()),
        max_pairs=config.batch_pairs,
        max_tokens=config.batch_tokens,
        seed=config.seed,
    )
    fit(
        model,
        adamw(model, table, learning_rate=config.learning_rate, table_rate=config.embedding_learning_rate),
        lambda first: islice(batches, first, None),
        partial(batch_loss, config, model, pairs, teacher),
        output=output,
        settings=fixed(config) | inputs(config),
        steps=config.steps,
        schedule=partial(warmup_and_decay, steps=config.steps, warmup=config.warmup, decay=config.decay),
        accumulate=config.accumulate,
        save_minutes=config.save_minutes,
    )
    model.eval()
    model.config = replace(model.config, query_length=config.query_length, document_length=config.document_length)
    half = copy.deepcopy(model).half()
    check_finite(half, "the result in float16")
    half.save_pretrained(output / "model")
    return model


def prepare(config: Config, output: Path) -> tuple[ColBERT, data.TokenizedPairs, Teacher | None]:
    """The untrained model, the pairs as its token ids, and the teacher; `output` keeps them for the next start."""
    file = output / "tokens.npz"
    if file.exists():
        tokens = data.TokenizedPairs.load(file, inputs(config))
        # A run may have been killed before it wrote them.
        for name, content in data.tokenizer_files(file).items():
            with replacing(output / name) as beside:
                beside.write_bytes(content)
        teacher = Teacher(config.teacher) if config.teacher else None
        return build(config, Tokenizer.from_pretrained(output), teacher), tokens, teacher
    choice = {"exclude_sources": config.exclude_sources, "decontaminate_against": config.decontaminate_against}
    read = data.versions(config.pairs)
    pairs = data.choose_pairs(config.pairs, **choice)
    if len(pairs) < 2:
        raise ValueError(f"{config.pairs} has one pair; the negatives of a query are the positives of other pairs")
    texts = (text for pair in pairs for text in (pair.query, pair.positive[:1000]))
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    if config.teacher and config.teacher_model and not Path(config.teacher, "keys.npy").exists():
        chosen = data.first_per_source(pairs, config.teacher_pairs)
        texts = token_texts(tokenizer) + [text for pair in chosen for text in (pair.query, pair.positive)]
        write_teacher(texts, config.teacher_model, config.teacher)
    teacher = Teacher(config.teacher) if config.teacher else None
    model = build(config, tokenizer, teacher)
    tokens = data.TokenizedPairs.from_pairs(pairs, model, teacher)
    made_of = inputs(config)
    if data.versions(config.pairs) != read:
        raise ValueError(f"the files of {config.pairs} changed while they were read; start again")
    tokens.save(file, made_of, tokenizer.files())  # the first file of a run: `run_folder` knows its folder by it
    tokenizer.save_pretrained(output)
    return model, tokens, teacher


def inputs(config: Config) -> dict[str, object]:
    """What the token ids depend on, and the teacher. Folders may move; a hash knows the files in them."""
    names = ("exclude_sources", "decontaminate_against", "vocab_size", "train_query_length", "train_document_length")
    teacher = [Path(config.teacher, name) for name in ("keys.npy", "vectors.npy")] if config.teacher else []
    found: dict[str, object] = {name: getattr(config, name) for name in names}
    found["hash of pairs and teacher"] = data.digest([*data.pair_files(config.pairs), *teacher])
    if config.decontaminate_against:
        found["hash of corpora"] = data.digest(map(data.corpus_file, config.decontaminate_against))
    return found


def build(config: Config, tokenizer: Tokenizer, teacher: Teacher | None) -> ColBERT:
    """The untrained model, with the lengths of training; a teacher that knows the tokens gives their embeddings."""
    torch.manual_seed(config.seed)
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
        table = encoder.embeddings.tok_embeddings.weight
        teach_embeddings(table, tokenizer, teacher, deviation=encoder.config.initializer_range)
    # Built with the lengths of the result, so that wrong ones are refused before the training and not after it.
    lengths = ColBERTConfig(query_length=config.query_length, document_length=config.document_length)
    model = ColBERT.from_encoder(encoder, tokenizer, dim=config.dim, config=lengths).to(config.device)
    model.config = replace(
        lengths, query_length=config.train_query_length, document_length=config.train_document_length
    )
    return model


def batch_loss(
    config: Config, model: ColBERT, pairs: data.TokenizedPairs, teacher: Teacher | None, batch: np.ndarray
) -> BatchLoss:
    """The loss of one batch of pairs, and how often the positive came first."""
    queries = model.query_tokens(pairs.queries.select(batch))
    documents = model.document_tokens(pairs.positives.select(batch))
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        scores_BB = maxsim(vectors(model, queries), vectors(model, documents))
    loss = info_nce(scores_BB / config.temperature, torch.as_tensor(pairs.positive_groups[batch], device=device))
    index_B2 = pairs.teacher_index[batch]
    if teacher is not None and index_B2.min() >= 0:
        teacher_BB = (teacher[index_B2[:, 0]] @ teacher[index_B2[:, 1]].T).to(device)
        kl = kl_distill(scores_BB / config.temperature, teacher_BB / config.teacher_temperature)
        loss = (1 - config.teacher_weight) * loss + config.teacher_weight * kl
    first_B = scores_BB.argmax(1) == torch.arange(len(batch), device=device)
    size = queries.batch.num_tokens + documents.batch.num_tokens
    return BatchLoss(loss, size, {"in_batch_accuracy": first_B.float().mean()})


def vectors(model: ColBERT, tokens: Tokens) -> Ragged:
    """The scored rows of texts, with their graph."""
    device, rows = next(model.parameters()).device, tokens.rows
    x_QE = model(tokens.batch.to(device), rows=None if rows is None else rows.to(device))
    return Ragged(x_QE, tokens.offsets)


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
