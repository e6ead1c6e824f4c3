"""A vocabulary learnt from texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ..tokenizer import Tokenizer

SPECIAL_TOKENS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")

# What becomes a token: words with their accents, numbers in groups of at most four digits, and the symbols
# that mean something in code and mathematics. Other punctuation (late interaction would skip it in documents
# anyway), spaces and underscores only separate: "file" is one token in "a file", "(file)" and "read_file".
WORDS = r"[\p{L}\p{M}]+|\p{N}{1,4}|[$+<=>^|~#*%&@]|[^\s\p{L}\p{M}\p{N}\p{P}\p{C}`]"


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer for lower-cased text with ModernBERT's special tokens at ids 0 to 4.

    Every word starts with the byte-level space, whatever precedes it in the text.
    """
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    split = pre_tokenizers.Sequence([words, spaced])
    return Tokenizer(_train((text.lower() for text in texts), vocab_size, split), {"do_lower_case": True})


def train_cased_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A tokenizer of ModernBERT's kind, with a vocabulary of its own: case, punctuation and spaces are kept.

    As there, [MASK] includes the space in front of it.
    """
    mask = AddedToken("[MASK]", lstrip=True, normalized=False)
    return Tokenizer(_train(texts, vocab_size, pre_tokenizers.ByteLevel(add_prefix_space=False), mask))


def _train(
    texts: Iterable[str], vocab_size: int, split: pre_tokenizers.PreTokenizer, mask: str | AddedToken = "[MASK]"
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS[:-1], mask],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    cls, sep = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return backend
