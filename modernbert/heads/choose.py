"""The best of several continuations or answers."""

from __future__ import annotations

from collections.abc import Sequence

from ..inference.encode import Modules, encode_tokens, list_of_texts
from ..tokenizer import Tokenizer
from ..truncation import warn_if_cut
from .multiple_choice import MultipleChoice
from .pairs import Ranked, longest, ranked, tokenize_pairs


def choose(
    model: MultipleChoice,
    tokenizer: Tokenizer,
    prompt: str,
    choices: Sequence[str],
    *,
    batch_tokens: int | None = None,
) -> list[Ranked]:
    """The choices with their probabilities, best first; the model reads each as a pair with the prompt.

    A pair that is longer than the model reads is cut, with a TruncationWarning.

    Raises:
        TypeError: a prompt that is not a str; choices as `list_of_texts`. ValueError: half a surrogate pair.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a str, got {type(prompt).__name__} {prompt!r:.60}")
    config = model.base_model.config
    pairs = [(prompt, choice) for choice in list_of_texts(choices)]
    max_length = longest(tokenizer, config)
    texts = tokenize_pairs(tokenizer, pairs, max_length=max_length, vocab_size=config.vocab_size)
    warn_if_cut(texts, lambda index: f"choices[{index}] with its prompt")
    logits_N1 = encode_tokens(Modules(model), texts, batch_tokens=batch_tokens).values
    return ranked(logits_N1.flatten().softmax(0))
