"""Suite `training`: whole steps (forward, backward, clipping, AdamW) next to the trainers that people use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

from benchmarks import harness, inputs, peers
from benchmarks.encoder import models, of_texts
from benchmarks.harness import PEAK, Run, Suite, Table
from benchmarks.late_interaction import MULTI_VECTOR, load_pylate, load_sentence_transformers
from benchmarks.worker import OURS, Build, Job, Peer, Setup, Variant
from modernbert import ColBERT, EncoderConfig, pack

STEPS, RATE, MASKED, LONGEST, TEMPERATURES = 2, 1e-4, 0.3, 512, {"dense": 0.05, "colbert-128": 1.0}
"""Steps of a call, learning rate, share of masked tokens, most tokens of a text, temperatures by the model's folder."""

Step = Sequence[Any]
"""The examples of a step: token ids and labels, or a query and its positive."""


def steps_of(job: Job) -> list[Step]:
    examples: Step = job.options["examples"]
    return [examples[len(examples) * at // STEPS : len(examples) * (at + 1) // STEPS] for at in range(STEPS)]


def from_the_start(settings: str, model: nn.Module, train: Callable[[], Tensor], first: Mapping[str, Any]) -> Variant:
    """A call trains the model further; the answer is the losses from its `first` weights."""

    def answer() -> Tensor:
        model.load_state_dict(first)
        return train().float().cpu()

    return Variant(settings, train, answer)


def packed(model: nn.Module, loss_of: Callable[[Step], Tensor]) -> Build:
    def train(steps: Sequence[Step]) -> Tensor:
        losses, parameters = [], [*model.train().parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
        for step in steps:
            loss = loss_of(step)
            loss.backward()
            losses.append(loss.detach())
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses)

    first = deepcopy(model.state_dict())
    return lambda job: [from_the_start("packed", model, partial(train, steps_of(job)), first)]


def load(setup: Setup, folder: str) -> Any:
    from modernbert import Embedder, MaskedLM

    kind: Any = {"masked-lm": MaskedLM, "dense": Embedder}.get(folder, ColBERT)
    return kind.from_pretrained(f"{setup.folder}/{folder}", dtype=setup.torch_dtype, device=setup.device)


def masked_lm(setup: Setup) -> Build:
    """The loss is computed of the masked tokens alone."""
    model = load(setup, "masked-lm")

    def loss_of(step: Step) -> Tensor:
        ids, labels = zip(*step, strict=True)
        return model.loss(pack(ids).to(setup.device), torch.cat(labels).to(setup.device))

    return packed(model, loss_of)


def pairs(setup: Setup, *, folder: str) -> Build:
    """Every query against every document of its step."""
    from modernbert.train.in_batch import in_batch_info_nce

    model = load(setup, folder)

    def loss_of(step: Step) -> Tensor:
        queries, documents = (model(side.to(setup.device)) for side in sides(model, step))
        return in_batch_info_nce(queries, documents, temperature=TEMPERATURES[folder])

    return packed(model, loss_of)


def sides(model: Any, step: Step) -> list[Any]:
    """Queries and documents, as the model takes them."""
    queries, documents = map(list, zip(*step, strict=True))
    if isinstance(model, ColBERT):
        return [model.tokenize_queries(queries, spans=False), model.tokenize_documents(documents, spans=False)]
    return [model.tokenize(queries), model.tokenize(documents)]


def trained(settings: str, setup: Setup, model: Any, home: Any, name: str, size: int, **options: Any) -> Variant:
    """`train()` of the `{name}Trainer` of a package, with a new optimizer each time; nothing is logged or written.

    `size` examples are in a forward pass. Of the options, `first` are weights, `args` of `{name}TrainingArguments`.
    """
    known = {"output_dir": f"{setup.folder}/trainer", "per_device_train_batch_size": size, "num_train_epochs": 1}
    known |= {"learning_rate": RATE, "weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    known |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    known |= {"use_cpu": not setup.is_gpu, "dataloader_pin_memory": setup.is_gpu}
    options["args"] = getattr(home, f"{name}TrainingArguments")(**known, **options["args"])
    first, losses, trainer = options.pop("first"), [], getattr(home, f"{name}Trainer")(model=model, **options)
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        losses.append(step(*args, **kwargs))
        return losses[-1]

    def train() -> Tensor:
        losses.clear()
        trainer.optimizer = None
        trainer.train()
        return torch.stack(losses).view(STEPS, -1).sum(1)

    trainer.training_step = recorded
    return from_the_start(settings, model, train, first)


def transformers(setup: Setup, *, sparse: bool = False, in_place: bool = False) -> Build:
    """The texts of a step at once as they come, or sorted by length in four forward passes."""
    home, folder = import_module("transformers"), f"{setup.folder}/masked-lm"
    known = {"attn_implementation": "sdpa", "dtype": setup.torch_dtype, "sparse_prediction": sparse}
    stock = home.ModernBertForMaskedLM.from_pretrained(folder, **known).to(setup.device)
    model = peers.packed_in_place(stock, in_place)
    first = deepcopy(model.state_dict())

    def collate(rows: Step) -> dict[str, Tensor]:
        ids, labels = zip(*rows, strict=True)
        labels_BS = nn.utils.rnn.pad_sequence([*labels], batch_first=True, padding_value=-100)
        return inputs.padded(ids, setup.pad, masked=True) | {"labels": labels_BS}

    def variants(job: Job) -> Iterator[Variant]:
        count = len(steps_of(job)[0])
        for size in dict.fromkeys((count, max(1, count // 4))):
            args = {"gradient_accumulation_steps": count // size, "train_sampling_strategy": "sequential"}
            rows = [*chain(*(sorted(step, key=lambda row: size < count and len(row[0])) for step in steps_of(job)))]
            known = {"args": args, "train_dataset": rows, "data_collator": collate, "first": first}
            yield trained(f"{size} texts at once", setup, model, home, "", size, **known)

    return variants


def sentence_transformers(setup: Setup, *, folder: str, in_place: bool = False) -> Build:
    name, loss = "SentenceTransformer", "MultipleNegativesRankingLoss"
    if folder != "dense":
        name, loss = MULTI_VECTOR, f"MultiVector{loss}"
    model = load_sentence_transformers(setup, folder, in_place)
    losses = import_module(f"{type(model).__module__.rpartition('.')[0]}.losses")
    return of_pairs(setup, model, getattr(losses, loss)(model, scale=1 / TEMPERATURES[folder]), name)


def pylate(setup: Setup, *, folder: str, in_place: bool = False) -> Build:
    model = load_pylate(setup, in_place)
    loss = import_module("pylate.losses").Contrastive(model, without_padding, temperature=TEMPERATURES[folder])
    collator = import_module("pylate.utils").ColBERTCollator(model.tokenize)
    return of_pairs(setup, model, loss, "SentenceTransformer", data_collator=collator)


def without_padding(queries: Tensor, documents: Tensor, *, queries_mask: Tensor, documents_mask: Tensor) -> Tensor:
    """PyLate's scores, but for its padding, which has the similarity 0 and so wins over negative ones."""
    similarity = torch.einsum("ash,bnth->abnst", queries, documents)
    best = similarity.masked_fill(~documents_mask[:, :, None], -torch.inf).amax(-1)
    return (best * queries_mask[:, None, None]).sum(-1).flatten(1)


def of_pairs(setup: Setup, model: Any, loss: nn.Module, name: str, **options: Any) -> Build:
    """The trainer of sentence-transformers, on pairs in their order."""
    home, datasets = import_module("sentence_transformers"), import_module("datasets")
    asked, found, first = model.prompts.get("query"), model.prompts.get("document"), deepcopy(model.state_dict())

    def in_order(dataset: Any, *, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    def variants(job: Job) -> Iterator[Variant]:
        queries, documents = map(list, zip(*job.options["examples"], strict=True))
        rows = datasets.Dataset.from_dict({"query": queries, "positive": documents})
        args = {"batch_sampler": in_order, "prompts": {"query": asked, "positive": found}}
        known = options | {"args": args, "train_dataset": rows, "loss": loss, "first": first}
        yield trained(f"version {home.__version__}", setup, model, home, name, len(rows) // STEPS, **known)

    return variants


def on_masked(here: Run, workload: str, found: Mapping[str, Peer] | None = None) -> Iterator[Table]:
    """Next to each other or to `found`, of which the last one is the reference."""
    from modernbert import MaskedLM

    tokenizer, count = inputs.default().tokenizer, STEPS * (256 if here.is_gpu else 2 if here.quick else 8)
    texts = [one["text"] for one in inputs.examples(here.texts, count)]
    examples, draw, trainer = [], torch.Generator().manual_seed(0), "transformers Trainer"
    for one in tokenizer.encode_beginnings(texts, max_length=LONGEST):
        ids = torch.tensor(one.ids)
        hidden = torch.rand(len(ids), generator=draw) < MASKED
        examples.append((ids.masked_fill(hidden, tokenizer.mask_token_id or 0), ids.masked_fill(~hidden, -100)))
    theirs = Peer(transformers, package="accelerate")
    sparse = {f"{trainer}, sparse": theirs._replace(options={"sparse": True})}
    found = found or {OURS: Peer(masked_lm), **sparse, trainer: theirs}
    for model in models(here, "modernbert-base", "ettin-17m"):
        inputs.save_from(here.setup(model, here.dtype).folder, "masked-lm", MaskedLM)
        width, classes = (config := EncoderConfig.preset(model)).hidden_size, config.vocab_size
        # The dense layer and the decoder, of the masked tokens, in both passes.
        flops = 6 * sum(int((labels >= 0).sum()) for _, labels in examples) * width * (width + classes)
        lengths, known = [len(ids) for ids, _ in examples], {"reference": [*found.values()][-1], "head_flops": flops}
        yield from of_steps(here, workload, model, lengths, examples, found, **known)


def on_pairs(here: Run, workload: str, found: Mapping[str, Peer] | None = None, *, folder: str) -> Iterator[Table]:
    save, rivals = inputs.save_embedder, {}
    if folder != "dense":
        save, rivals = inputs.save_colbert, {"PyLate": Peer(pylate, package="pylate")}
    theirs = {"sentence-transformers": Peer(sentence_transformers, package="datasets")}
    known = found or {OURS: Peer(pairs)} | rivals | theirs
    peers_of = {name: peer._replace(options={**peer.options, "folder": folder}) for name, peer in known.items()}
    rows = inputs.examples(here.pairs, STEPS * (512 if here.is_gpu else 2 if here.quick else 16))
    examples = [(one["query"], one["positive"]) for one in rows]
    for model in models(here, "modernbert-base", "ettin-17m"):
        save((setup := replace(here.setup(model, here.dtype), device="cpu")).folder)
        lengths = [length for side in sides(load(setup, folder), examples) for length in side.batch.lengths]
        known = {"reference": [*peers_of.values()][-1], "model_pass": False}
        yield from of_steps(here, workload, model, lengths, examples, peers_of, **known)


def of_steps(
    here: Run, workload: str, model: str, lengths: Sequence[int], examples: Step, found: Mapping[str, Peer], **more: Any
) -> Iterator[Table]:
    """Tokens a second, and peak memory."""
    what = f"{model}, {here.dtype}, {workload}: {STEPS} steps of {len(examples) // STEPS} examples"
    what += f", {sum(lengths):,} tokens in texts of {min(lengths)} to {max(lengths)}"
    shortest = sorted(examples, key=lambda one: sum(map(len, one)))[:STEPS]
    known = {"backward": True, "options": {"examples": examples, "warm": {"examples": shortest}}, "rounds": 3}
    table = of_texts(here, workload, model, what, lengths, found, **known | more)
    yield table
    yield replace(table, **PEAK | {"rounds": 2})


WORKLOADS: dict[str, tuple[Callable[..., Iterator[Table]], str]] = {
    "masked-lm": (on_masked, "steps of masked language modelling, 30 percent of the tokens of real texts"),
    "dense": (partial(on_pairs, folder="dense"), "steps of contrastive learning on real pairs, one vector a text"),
    "late-interaction": (partial(on_pairs, folder="colbert-128"), "the same, one vector a token, scored by MaxSim"),
}

SUITES = {
    "training": Suite(
        "steps of training: tokens a second, peak memory",
        {name: line for name, (_, line) in WORKLOADS.items()},
        "the Trainer of transformers, sentence-transformers, PyLate",
        harness.of_workloads(WORKLOADS),
        weight=12,
    )
}
