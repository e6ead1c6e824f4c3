"""A vocabulary learnt from texts."""

from __future__ import annotations

from collections.abc import Iterator

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

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
    backend = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text.lower() for text in texts), trainer)
    cls, sep = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return Tokenizer(backend, {"do_lower_case": True})
