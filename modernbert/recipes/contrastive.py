"""Train a small ColBERT: its tokenizer, then contrastive learning on query-passage pairs, from nothing or `--start`.

    python -m modernbert.recipes.contrastive --pairs FOLDER --output FOLDER
    torchrun --nproc-per-node 8 -m modernbert.recipes.contrastive --pairs FOLDER --output FOLDER --device cuda

The defaults are those of the model that ships in `modernbert/assets/default`. When a run was stopped, the same command
goes on from its last checkpoint, to the same weights. `OUTPUT/model` is the result. With `--chunk-tokens` a batch of
any size fits in memory (GradCache).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modernbert.checkpoint import locate
from modernbert.config import FLAG, POSITIVE, SIZE, THETA, EncoderConfig, Kind
from modernbert.encoder import Encoder
from modernbert.files import replacing
from modernbert.heads.colbert import ColBERT, ColBERTConfig
from modernbert.heads.folders import class_of
from modernbert.late_interaction import Ragged, maxsim
from modernbert.packing import Tokens
from modernbert.tokenizer import Tokenizer
from modernbert.train import data
from modernbert.train.batching import epochs, topic_vectors
from modernbert.train.beir import beir
from modernbert.train.checkpoints import check_finite
from modernbert.train.claim import claim_folder
from modernbert.train.distributed import Ranks, gather_rows, ranks
from modernbert.train.examples import Pair, read_pairs, read_triples
from modernbert.train.grad_cache import grad_cache, token_chunks
from modernbert.train.in_batch import in_batch_info_nce
from modernbert.train.loop import BatchLoss, fit
from modernbert.train.losses import kl_distill, softmax_loss
from modernbert.train.optim import adamw
from modernbert.train.options import AMOUNT, COUNT, SHARE, check_values, fixed, option, parse, run
from modernbert.train.prepare import prepare as share
from modernbert.train.schedules import warmup_stable_decay
from modernbert.train.start import KEEP, hash_of, start_colbert
from modernbert.train.teacher import Teacher, teach_embeddings, token_texts, write_teacher
from modernbert.train.teacher_folder import files as teacher_files
from modernbert.train.validation import Validation
from modernbert.train.vocabulary import train_tokenizer

PAIRS = Kind("a whole number, 2 or more: the others are the negatives", lambda v: type(v) is int and v >= 2, int)


@dataclass(frozen=True)
class Config:
    pairs: str = option("folder of *.jsonl files, also .gz or .zst: one pair a line, see train/data.py", free=True)
    output: str = option("folder of the run and its result", free=True)
    exclude_sources: tuple[str, ...] = option("sources of pairs that are left out", ())
    decontaminate_against: tuple[str, ...] = option("BEIR folders; pairs sharing 8 words in a row are left out", ())
    hard_negatives: int = option('mined negatives of each pair, from its "negatives"; 0: pairs without', 0, kind=COUNT)
    teacher: str = option("folder of a teacher's vectors, see train/teacher.py", "", free=True)
    teacher_model: str = option("sentence-transformers model that fills this folder if it is new", "", free=True)
    teacher_pairs: int = option(
        "pairs of each source that it embeds, besides the tokens of the vocabulary", 0, kind=COUNT
    )

    start: str = option(
        "checkpoint to start from, with its tokenizer; '': from nothing, in the shape below", "", free=True
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
    chunk_tokens: int = option("tokens encoded at a time, by GradCache; 0: a whole batch", 0, kind=COUNT)
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
    autocast: bool = option("compute in bfloat16", True, kind=FLAG)
    threads: int = option("threads of a CPU", 2, kind=SIZE)
    validation: str = option("BEIR folder, whose nDCG@10 finds the best checkpoint", "", free=True)
    validate_steps: int = option("steps between two measurements of it", 250, kind=SIZE, free=True)
    save_minutes: float = option("minutes between two checkpoints", 5.0, kind=AMOUNT, free=True)


def main(config: Config) -> ColBERT:
    """Run what is left of the recipe and return the model."""
    check_values(config)
    if not config.teacher and (config.teacher_model or config.teacher_pairs):
        raise ValueError("--teacher-model and --teacher-pairs are about the folder --teacher, which is not given")
    torch.set_num_threads(config.threads)
    with (
        ranks(config.device) as group,
        claim_folder(config.output, "contrastive", fixed(config), group) as output,
    ):
        if not group.is_alone:
            group.on_first(lambda: write_inputs(config, output))
        model = train(config, output, group)
        model.eval()
        model.config = replace(model.config, query_length=config.query_length, document_length=config.document_length)
        half = copy.deepcopy(model).half()
        check_finite(half, "the result in float16")
        group.on_first(lambda: half.save_pretrained(output / "model"))
    return model


def train(config: Config, output: Path, group: Ranks) -> ColBERT:
    """From the last checkpoint to the last step."""
    model, pairs, teacher = prepare(config, output)
    share(model, group)
    table = model.encoder.embeddings.tok_embeddings.weight
    strata = pairs.sources * 2 + (taught := (pairs.teacher_index >= 0).all(1))
    whole = group.is_alone and not config.chunk_tokens
    if taught.any() and not whole:
        raise ValueError(
            f"{taught.sum():,} pairs have a teacher's vectors, and its loss needs all scores of a batch: leave out "
            "--chunk-tokens and train on one rank, or leave out --teacher-pairs"
        )
    topics = topic_vectors(pairs.positives, table.detach().float().cpu().numpy())

    def batches(first: int) -> Iterator[np.ndarray]:
        limits = {"max_pairs": config.batch_pairs, "max_tokens": config.batch_tokens}
        shares = {"first": first, "rank": group.rank, "world_size": group.world_size}
        # Pairs with and without a teacher's vectors never share a batch.
        return epochs(pairs.lengths, strata, topics, seed=config.seed, **limits, **shares)

    fit(
        model,
        adamw(model, table, learning_rate=config.learning_rate, table_rate=config.embedding_learning_rate),
        batches,
        partial(batch_loss, config, model, pairs, teacher)
        if whole
        else partial(large_loss, config, model, pairs, group),
        output=output,
        settings=fixed(config) | inputs(config),
        steps=config.steps,
        schedule=partial(
            warmup_stable_decay,
            total=config.steps,
            warmup=config.warmup * config.steps,
            decay=config.decay * config.steps,
        ),
        accumulate=config.accumulate,
        validation=validation(config, model),
        ranks=group,
        save_minutes=config.save_minutes,
    )
    return model


def validation(config: Config, model: ColBERT) -> Validation | None:
    """nDCG@10 on a BEIR folder, with the lengths of the finished model."""
    if not config.validation:
        return None
    finished = {"query_length": config.query_length, "document_length": config.document_length}
    scores = beir(config.validation, model)

    def measure() -> dict[str, float]:
        trained, model.config = model.config, replace(model.config, **finished)
        try:
            return scores()
        finally:
            model.config = trained

    return Validation(measure, config.validate_steps, best="nDCG@10", highest=True)


def write_inputs(config: Config, output: Path) -> None:
    """What the other ranks then read."""
    prepare(config, output)


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
    pairs = data.choose_pairs(config.pairs, **choice, read=partial(read_chosen, config.hard_negatives))
    if len(pairs) < 2:
        raise ValueError(f"{config.pairs} has one pair; the negatives of a query are the positives of other pairs")
    texts = (text for pair in pairs for text in (pair.query, pair.positive[:1000]))
    tokenizer = (
        Tokenizer.from_pretrained(config.start)
        if config.start
        else train_tokenizer(texts, vocab_size=config.vocab_size)
    )
    if config.teacher and config.teacher_model:
        chosen = data.first_per_source(pairs, config.teacher_pairs)
        texts = token_texts(tokenizer) + [text for pair in chosen for text in (pair.query, pair.positive)]
        write_teacher(texts, config.teacher_model, config.teacher, device=config.device)
    teacher = Teacher(config.teacher) if config.teacher else None
    model = build(config, tokenizer, teacher)
    tokens = data.TokenizedPairs.from_pairs(pairs, model, teacher)
    made_of = inputs(config)
    if data.versions(config.pairs) != read:
        raise ValueError(f"the files of {config.pairs} changed while they were read; start again")
    tokens.save(file, made_of, tokenizer.files())
    tokenizer.save_pretrained(output)
    return model, tokens, teacher


def read_chosen(negatives: int, folder: str, *, exclude_sources: tuple[str, ...], skip_empty: bool) -> Iterator[Pair]:
    """The pairs of a folder, each with at most so many of its negatives."""
    read = read_triples if negatives else read_pairs
    return data.at_most(read(folder, exclude_sources=exclude_sources, skip_empty=skip_empty), negatives)


def inputs(config: Config) -> dict[str, object]:
    """What the token ids depend on, and the teacher. Folders may move; a hash knows the files in them."""
    names = ("exclude_sources", "decontaminate_against", "vocab_size", "train_query_length", "train_document_length")
    teacher = teacher_files(config.teacher) if config.teacher else []
    found: dict[str, object] = {name: getattr(config, name) for name in names}
    found["hash of pairs and teacher"] = data.digest([*data.pair_files(config.pairs), *teacher])
    if config.start:
        found["hash of start"] = hash_of(config.start)
    if config.hard_negatives:
        found["hard_negatives"] = config.hard_negatives
    if config.decontaminate_against:
        found["hash of corpora"] = data.digest(map(data.corpus_file, config.decontaminate_against))
    return found


def build(config: Config, tokenizer: Tokenizer, teacher: Teacher | None) -> ColBERT:
    """The model to train, with the lengths of training; a teacher that knows the tokens gives their embeddings to a new
    one.
    """
    torch.manual_seed(config.seed)
    # Built with the lengths of the result, so that wrong ones are refused before the training and not after it.
    lengths = ColBERTConfig(query_length=config.query_length, document_length=config.document_length)
    if config.start:
        is_colbert = class_of(locate(config.start)) == "ColBERT"
        model = start_colbert(config.start, head=KEEP if is_colbert else "linear", dim=config.dim, config=lengths)
        return for_training(config, model)
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
    return for_training(config, ColBERT.from_encoder(encoder, tokenizer, dim=config.dim, config=lengths))


def for_training(config: Config, model: ColBERT) -> ColBERT:
    """The model on its device, with the lengths of training."""
    lengths = {"query_length": config.train_query_length, "document_length": config.train_document_length}
    model.config = replace(model.config, **lengths)
    return model.to(config.device).train()


def batch_loss(
    config: Config, model: ColBERT, pairs: data.TokenizedPairs, teacher: Teacher | None, batch: np.ndarray
) -> BatchLoss:
    """The loss of one batch of pairs, and how often the positive came first."""
    queries, documents, groups_N = tokens_of(model, pairs, batch)
    device, count = next(model.parameters()).device, len(batch)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
        scores_BN = maxsim(vectors(model, queries), vectors(model, documents))
    scores_BB = scores_BN[:, :count]
    groups_N, places_B = groups_N.to(device), torch.arange(count, device=device)
    same_BN = groups_N[:count, None] == groups_N
    loss = softmax_loss(scores_BN, places_B, same_BN, temperature=config.temperature)
    index_B2 = pairs.teacher_index[batch]
    if teacher is not None and index_B2.min() >= 0:
        teacher_BB = (teacher[index_B2[:, 0]] @ teacher[index_B2[:, 1]].T).to(device)
        kl = kl_distill(scores_BB / config.temperature, teacher_BB / config.teacher_temperature)
        loss = (1 - config.teacher_weight) * loss + config.teacher_weight * kl
    first_B = scores_BN.argmax(1) == places_B
    size = queries.batch.num_tokens + documents.batch.num_tokens
    return BatchLoss(loss, size, {"in_batch_accuracy": first_B.float().mean()}, count=count)


def large_loss(
    config: Config, model: ColBERT, pairs: data.TokenizedPairs, group: Ranks, batch: np.ndarray
) -> BatchLoss:
    """The same loss in chunks, and with the documents of all ranks as negatives. No matrix of scores is kept."""
    queries, documents, groups_N = tokens_of(model, pairs, batch)
    device, size = next(model.parameters()).device, queries.batch.num_tokens + documents.batch.num_tokens
    chunks = [token_chunks(each, config.chunk_tokens or size) for each in (queries, documents)]

    def score(queries: Ragged, documents: Ragged) -> Tensor:
        gather = None if group.is_alone else partial(gather_rows, ranks=group)
        options = {"temperature": config.temperature, "gather": gather, "rank": group.rank}
        return in_batch_info_nce(queries, documents, groups_N.to(device), **options)

    with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
        loss = grad_cache(partial(vectors, model), chunks, score)
    return BatchLoss(loss, size, {}, count=len(batch))


def tokens_of(model: ColBERT, pairs: data.TokenizedPairs, batch: np.ndarray) -> tuple[Tokens, Tokens, Tensor]:
    """The queries, their positives followed by the negatives of all of them, and the group of each document."""
    documents, groups = pairs.positives.select(batch), pairs.groups(batch)
    if pairs.negatives is not None and pairs.negative_offsets is not None:
        negatives = [n for i in batch for n in range(*pairs.negative_offsets[i : i + 2])]
        documents += pairs.negatives.select(negatives)
    queries = model.query_tokens(pairs.queries.select(batch))
    return queries, model.document_tokens(documents), torch.as_tensor(groups, device="cpu")


def vectors(model: ColBERT, tokens: Tokens) -> Ragged:
    """The scored rows of texts, with their graph."""
    return model(tokens.to(model.device))


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
