"""A task of GLUE fine-tuned by the recipe and by transformers' Trainer, from one checkpoint with the same settings.

python examples/glue.py TASK TRAIN DEV MODEL [SEEDS] [EPOCHS]

TRAIN and DEV are the files of the task. For each seed, the best score of an epoch on DEV and the seconds are printed.
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
from modernbert.train.glue import TASKS, read_glue


def ours(config: finetune.Config) -> float:
    return finetune.main(config)["score"]


def theirs(config: finetune.Config) -> float:
    """The same settings, with an evaluation after each epoch. The best one counts, as in the recipe."""
    point, classes = finetune.point_of(config), TASKS[config.task].labels
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    transformers.set_seed(config.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=len(classes) or 1)

    def rows(file: str) -> list[dict[str, object]]:
        found = []
        for text, label in read_glue(file, config.task):
            pair = (text,) if isinstance(text, str) else text
            found.append({**tokenizer(*pair, truncation=True, max_length=config.max_length), "labels": label})
        return found

    def scores(outputs: transformers.EvalPrediction) -> dict[str, float]:
        x_NC, labels_N = np.asarray(outputs.predictions), np.asarray(outputs.label_ids)
        predicted_N = x_NC.argmax(1) if classes else x_NC.reshape(-1)
        found = [getattr(metrics, name)(predicted_N, labels_N) for name in finetune.TASKS[config.task].metrics]
        return {"score": statistics.mean(found)}

    learnt = rows(config.train)
    steps = point.epochs * -(-len(learnt) // point.batch_size)
    decay = point.weight_decay / point.learning_rate  # decoupled from the learning rate, as in the paper
    optimizer = torch.optim.AdamW(model.parameters(), point.learning_rate, (0.9, 0.98), 1e-6, decay)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            config.output, num_train_epochs=point.epochs, per_device_train_batch_size=point.batch_size,
            eval_strategy="epoch", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            max_grad_norm=1.0, bf16=config.autocast, use_cpu=True, seed=config.seed,
        ),
        train_dataset=learnt,  # pyright: ignore[reportArgumentType]
        eval_dataset=rows(config.dev),  # pyright: ignore[reportArgumentType]
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=scores,
        optimizers=(optimizer, transformers.get_linear_schedule_with_warmup(optimizer, int(0.06 * steps), steps)),
    )  # fmt: skip
    trainer.train()
    return max(row["eval_score"] for row in trainer.state.log_history if "eval_score" in row)


def main(task: str, train: str, dev: str, model: str, seeds: int = 3, epochs: int | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[float]] = {"ours": [], "theirs": []}
        for seed in range(seeds):
            for name, run in (("ours", ours), ("theirs", theirs)):
                output = str(Path(folder, f"{name}-{seed}"))
                started = time.perf_counter()
                config = finetune.Config(task, train, dev, model, output, seed=seed, epochs=epochs)
                found[name].append(run(config))
                seconds = time.perf_counter() - started
                print(f"seed {seed}  {name:6}  score {found[name][-1]:.4f}  {seconds:.0f} s", flush=True)
        for name, scores in found.items():
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            print(f"{name:6}  mean {statistics.mean(scores):.4f}  deviation {spread:.4f}")


if __name__ == "__main__":
    name, learnt, dev, start, *numbers = sys.argv[1:]
    main(name, learnt, dev, start, *map(int, numbers))
