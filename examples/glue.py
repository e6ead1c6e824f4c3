"""A task of GLUE, or tagged words, fine-tuned by the recipe and by transformers' Trainer, from one checkpoint.

python examples/glue.py TASK TRAIN DEV MODEL [SEEDS] [EPOCHS] [RATE]

TASK is CoLA, MRPC, RTE, SST-2, STS-B or words; TRAIN and DEV are its files. Both sides have the settings of the recipe,
in float32; a small model needs a higher learning rate, such as 1e-3. For each seed, the best score of an epoch on DEV
and the seconds are printed.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from modernbert.recipes import finetune
from modernbert.train import metrics
from modernbert.train.examples import read_conll
from modernbert.train.glue import TASKS, read_glue

OPTIONS = {"epochs": int, "learning_rate": float}


def ours(config: finetune.Config) -> float:
    return finetune.main(config)["score"]


def theirs(config: finetune.Config) -> float:
    """The same settings, with an evaluation after each epoch. The best one counts, as in the recipe."""
    point, tokenizer = finetune.point_of(config), transformers.AutoTokenizer.from_pretrained(config.model)
    read = tagged if config.task == finetune.WORDS else labelled
    learnt, dev = (read(config, file, tokenizer) for file in (config.train, config.dev))
    names = tags_of(config) if config.task == finetune.WORDS else TASKS[config.task].labels
    transformers.set_seed(config.seed)
    if config.task == finetune.WORDS:
        kind, collate = transformers.AutoModelForTokenClassification, transformers.DataCollatorForTokenClassification
    else:
        kind, collate = transformers.AutoModelForSequenceClassification, transformers.DataCollatorWithPadding
    model = kind.from_pretrained(config.model, num_labels=len(names) or 1)

    def scores(outputs: transformers.EvalPrediction) -> dict[str, float]:
        x_NC, labels_N = np.asarray(outputs.predictions), np.asarray(outputs.label_ids)
        if config.task == finetune.WORDS:
            asked = [labels >= 0 for labels in labels_N]
            sides = [
                [[names[tag] for tag in tags[rows]] for tags, rows in zip(side, asked, strict=True)]
                for side in (x_NC.argmax(-1), labels_N)
            ]
            return {"score": metrics.entity_f1(*sides)}
        predicted_N = x_NC.argmax(1) if names else x_NC.reshape(-1)
        return {"score": statistics.mean(getattr(metrics, name)(predicted_N, labels_N) for name in point.metrics)}

    steps = point.epochs * -(-len(learnt) // point.batch_size)
    decay = point.weight_decay / point.learning_rate  # decoupled from the learning rate, as in the paper
    optimizer = torch.optim.AdamW(model.parameters(), point.learning_rate, (0.9, 0.98), 1e-6, decay)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            config.output, num_train_epochs=point.epochs, per_device_train_batch_size=point.batch_size,
            eval_strategy="epoch", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            max_grad_norm=1.0, use_cpu=True, seed=config.seed,
        ),
        train_dataset=learnt,  # pyright: ignore[reportArgumentType]
        eval_dataset=dev,  # pyright: ignore[reportArgumentType]
        data_collator=collate(tokenizer),
        compute_metrics=scores,
        optimizers=(optimizer, transformers.get_linear_schedule_with_warmup(optimizer, int(0.06 * steps), steps)),
    )  # fmt: skip
    trainer.train()
    return max(row["eval_score"] for row in trainer.state.log_history if "eval_score" in row)


def labelled(config: finetune.Config, file: str, tokenizer) -> list[dict[str, object]]:
    """Texts, or pairs of texts, with a label each."""
    found = []
    for text, label in read_glue(file, config.task):
        pair = (text,) if isinstance(text, str) else text
        found.append({**tokenizer(*pair, truncation=True, max_length=config.max_length), "labels": label})
    return found


def tags_of(config: finetune.Config) -> tuple[str, ...]:
    found = {tag for row in read_conll(config.train) for tag in row.tags}
    return tuple(sorted(found, key=lambda tag: (tag != "O", tag)))


def tagged(config: finetune.Config, file: str, tokenizer) -> list[dict[str, object]]:
    """Words with a tag each, which is that of the first token of the word."""
    number = {tag: index for index, tag in enumerate(tags_of(config))}
    found = []
    for row in read_conll(file):
        one = tokenizer(list(row.words), is_split_into_words=True, truncation=True, max_length=config.max_length)
        words = one.word_ids()
        new = [word is not None and word != before for word, before in zip(words, [None, *words[:-1]], strict=True)]
        labels = [number[row.tags[word]] if first else -100 for word, first in zip(words, new, strict=True)]
        found.append({**one, "labels": labels})
    return found


def main(task: str, train: str, dev: str, model: str, seeds: str = "3", *options: str) -> None:
    changes = {name: kind(word) for (name, kind), word in zip(OPTIONS.items(), options, strict=False)}
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[float]] = {"ours": [], "theirs": []}
        for seed in range(int(seeds)):
            for name, run in (("ours", ours), ("theirs", theirs)):
                output = str(Path(folder, f"{name}-{seed}"))
                started = time.perf_counter()
                same = {"seed": seed, "autocast": False, "threads": torch.get_num_threads()}
                config = finetune.Config(task, train, dev, model, output, **same, **changes)
                found[name].append(run(config))
                seconds = time.perf_counter() - started
                print(f"seed {seed}  {name:6}  score {found[name][-1]:.4f}  {seconds:.0f} s", flush=True)
        for name, scores in found.items():
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            print(f"{name:6}  mean {statistics.mean(scores):.4f}  deviation {spread:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
