"""The labels of a classifier in config.json: `id2label`, `label2id`, `num_labels` and `problem_type`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..config import SIZE, EncoderConfig

REGRESSION, SINGLE, MULTI = PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def label_names(config: EncoderConfig) -> tuple[str, ...]:
    """The name of each label, by its id. As in transformers there are two without a name where the config has none.

    Raises:
        ValueError: ids that are not 0, 1, 2, ..., or another number of them than `num_labels`.
    """
    names, count = config.others.get("id2label"), config.others.get("num_labels")
    if names is None:
        count = 2 if count is None else SIZE.check("config: num_labels", count)
        return tuple(f"LABEL_{label}" for label in range(count))
    ids = {str(key) for key in names} if isinstance(names, Mapping) else set()
    if not ids or ids != {str(label) for label in range(len(ids))}:
        raise ValueError(f"config: id2label is {names!r:.80}, but must be an object with the keys 0, 1, 2, ...")
    if count not in (None, len(ids)):
        raise ValueError(f"config: num_labels is {count!r:.80}, but id2label has {len(ids)} labels: remove one of them")
    by_id = {str(key): str(name) for key, name in names.items()}
    return tuple(by_id[str(label)] for label in range(len(ids)))


def problem_type(config: EncoderConfig) -> str | None:
    """What the config says about the labels, or None. ValueError: another word than `PROBLEMS`."""
    found = config.others.get("problem_type")
    if found not in (None, *PROBLEMS):
        raise ValueError(f"config: problem_type is {found!r:.80}, but must be one of {', '.join(PROBLEMS)}, or null")
    return found


def with_labels(config: EncoderConfig, labels: Sequence[str] | int | None, problem: str | None = None) -> EncoderConfig:
    """The config with these labels, or with so many; None: with those that it has.

    Raises:
        TypeError: one str. ValueError: no label, a label twice, or a `problem_type` that is not one.
    """
    changes: dict[str, object] = {} if problem is None else {"problem_type": problem}
    if isinstance(labels, str):
        raise TypeError(f"labels is one str, {labels!r:.60}: put the labels into a list, or pass how many there are")
    if labels is not None:
        count = SIZE.check("labels", labels if isinstance(labels, int) else len(labels))
        names = [f"LABEL_{label}" for label in range(count)] if isinstance(labels, int) else [str(x) for x in labels]
        if len(set(names)) < count:
            raise ValueError(f"labels has {next(name for name in names if names.count(name) > 1)!r:.60} twice")
        changes["id2label"] = {str(label): name for label, name in enumerate(names)}
        changes["label2id"] = {name: label for label, name in enumerate(names)}
        if "num_labels" in config.others:
            changes["num_labels"] = count
    changed = config.changed(changes)
    problem_type(changed)
    return changed
