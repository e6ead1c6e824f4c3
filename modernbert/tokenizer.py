"""Text to `Packed`, with the checkpoint's tokenizer.json. Truncation raises a warning."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import tokenizers

from .checkpoint import locate
from .config import FLAG_OR_NULL, NAME, SIDE
from .files import output_folder, replacing
from .json_files import check_size, has_file, read_json
from .packing import Packed, pack
from .texts import Offsets, Text, Words, checked, checked_words, lower_cased, offsets_before_lower
from .truncation import TruncationWarning as TruncationWarning

CHARACTERS = 64
"""Characters of a text for each token that is wanted of it. The rest is not tokenised at first."""

MARGIN = 32
"""Tokens that must follow the wanted ones, so that the end of what was tokenised has no influence on these."""

CONFIG = "tokenizer_config.json"

# Names of the special tokens that are tried if neither tokenizer_config.json nor special_tokens_map.json has them.
USUAL_NAMES = {
    "cls_token": ("[CLS]", "<s>", "<bos>"),
    "sep_token": ("[SEP]", "</s>", "<eos>"),
    "pad_token": ("[PAD]", "<pad>"),
    "mask_token": ("[MASK]", "<mask>"),
    "unk_token": ("[UNK]", "<unk>"),
}

INPUT_NAMES = ("input_ids", "attention_mask")
"""Without them, transformers 4 gives token types too, which its ModernBERT refuses."""

TOKENIZER_BYTES = 48 << 20  # of tokenizer.json; the largest of the family, mmBERT's, has 34 MB
# Of what is put around each text. Without limits, a small file could make long texts of short ones.
TEMPLATE_BYTES, MOST_SPECIALS = 10_000, 100


class Encoding(NamedTuple):
    """One tokenised text or pair; `truncated` counts the tokens that were cut off.

    `offsets[i]` is (start, end) of token i in characters of the caller's text, or for a pair of the text that the token
    comes from. They equal transformers': (0, 0) for an added special token; a word includes the space in front of it;
    for characters that NFC joins into one, only the first is included.
    """

    ids: list[int]
    offsets: Offsets
    truncated: int


class TextWindow(NamedTuple):
    """What a model reads at once of a long text, under the names of transformers' fast tokenizers.

    Attributes:
        ids: with special tokens. offsets: as in `Encoding`; of a text that is split into words, in each word.
        word_ids: per token the index of its word, None for an added special token. Of a text that is not split into
            words, these are the pieces that the tokenizer cuts it into.
        sequence_ids: per token 0 or 1, the text of the pair that it is of; None for an added special token.
        text: the index of the text or pair that this is a window of.
    """

    ids: list[int]
    offsets: Offsets
    word_ids: list[int | None]
    sequence_ids: list[int | None]
    text: int


class Tokenizer:
    """Texts and pairs of texts to token ids.

    Args:
        backend: owned by this object from now on; truncation and padding from its file are switched off.
        config: content of tokenizer_config.json. These keys are used: names of special tokens, `model_max_length`,
            `truncation_side`, and `do_lower_case` (as in PyLate: `str.lower` on the whole text, including special
            tokens that are written out in it).
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._config = backend, dict(config or {})
        self.do_lower_case = bool(FLAG_OR_NULL.check(f"{CONFIG}: do_lower_case", self._config.get("do_lower_case")))
        self._left = SIDE.check(f"{CONFIG}: truncation_side", self._config.get("truncation_side", "right")) == "left"
        limit = self._config.get("model_max_length")
        limit = 1e30 if limit is None else limit  # transformers' value for "no limit"
        if type(limit) not in (int, float) or not limit >= 1:
            raise ValueError(f"{CONFIG}: model_max_length is {limit!r:.80}, but must be 1 or more")
        self.max_length = int(limit) if limit < 1e9 else None
        self._names = {role: self._special_token(role) for role in USUAL_NAMES}
        ids = [None if name is None else backend.token_to_id(name) for name in self._names.values()]
        self.cls_token_id, self.sep_token_id, self.pad_token_id, self.mask_token_id, self.unk_token_id = ids
        # The number of rows that an embedding table needs: one more than the largest id, even if ids have gaps.
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ) -> Tokenizer:
        """Read a checkpoint folder or hub id, without downloading weights; only tokenizer.json is required."""
        optional = ("special_tokens_map.json", "tokenizer_config.json", "sentence_bert_config.json")
        folder = locate(
            folder_or_hub_id,
            only=(*optional, "tokenizer.json"),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        if not (file := folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{file} is missing; transformers' AutoTokenizer saves one")
        check_size(file, TOKENIZER_BYTES)
        with _as_value_error(f"{file} is damaged, or too new for this `tokenizers`"):
            backend = tokenizers.Tokenizer.from_file(str(file))
            _check_template(backend)
            backend.encode_batch(["", ("", "")])  # the backend looks up the special tokens around texts only now
        names, config, sbert = [read_json(folder, x) if has_file(folder / x) else {} for x in optional]
        lower = FLAG_OR_NULL.check(f"{folder / CONFIG}: do_lower_case", config.get("do_lower_case"))
        # A tokenizer.json that lower-cases (BERT's) does so after it has found the special tokens; leave that to it.
        lowers = backend.normalizer is not None and backend.normalizer.normalize_str("A") == "a"
        asked = sbert.get("do_lower_case", lower and not lowers)
        lower = FLAG_OR_NULL.check(f"{folder / optional[2]}: do_lower_case", asked)
        return cls(backend, {**names, **config, "do_lower_case": bool(lower)})

    def __call__(
        self,
        texts: str | Iterable[Text] | Iterable[Words],
        *,
        max_length: int | None = None,
        is_split_into_words: bool = False,
    ) -> Packed:
        """Tokenise a text, or a list of texts and (text, text) pairs, with special tokens.

        A sequence of more than `max_length` tokens loses its end, a pair the end of its longer text. With None, the
        model's maximum is the limit, and one TruncationWarning says what was cut.

        Args:
            is_split_into_words: each text is a list of words, as in data sets of named entities.

        Raises:
            TypeError: anything but `str` and pairs of `str`, or a `max_length` that is not a whole number.
            ValueError: half a surrogate pair in a text, or a `max_length` below the number of special tokens.
        """
        found = self._encode(texts, max_length, spans=False, warn=True, split=is_split_into_words)
        return pack([encoding.ids for encoding in found])

    def encode_batch(
        self,
        texts: str | Iterable[Text] | Iterable[Words],
        *,
        max_length: int | None = None,
        offsets: bool = True,
        warn: bool = True,
        is_split_into_words: bool = False,
    ) -> list[Encoding]:
        """Like `__call__`, but gives one list of ids per text, with offsets and the number of tokens cut off.

        Args:
            offsets: False leaves them empty, which is much faster.
            warn: whether to warn about texts that are longer than the model's maximum.
        """
        return self._encode(texts, max_length, spans=offsets, warn=warn, split=is_split_into_words)

    def encode_windows(
        self,
        texts: str | Iterable[Text] | Iterable[Words],
        *,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
    ) -> list[TextWindow]:
        """All of each text, in windows of at most `max_length` tokens (None: the model's maximum).

        They equal those of transformers' fast tokenizers with `return_overflowing_tokens`. Each window of a pair has
        all of its first text (`truncation="only_second"`), such as a question about a long text.

        Args:
            stride: tokens that two windows share.
            is_split_into_words: each text is a list of words, to which `word_ids` then point.

        Raises:
            TypeError, ValueError: as `__call__`; a `stride` that is not from 0 to less than the tokens of a window.
        """
        if not isinstance(stride, Integral) or isinstance(stride, bool) or stride < 0:
            raise ValueError(f"stride must be a whole number from 0, got {stride!r:.80}")
        batch, wholes = self._tokenized(texts, spans=True, split=is_split_into_words)
        limit, windows = self._limit(max_length), []
        for index, (text, whole) in enumerate(zip(batch, wholes, strict=True)):
            ids, offsets = whole.ids, self._offsets(text, whole)
            words, owners = whole.word_ids, whole.sequence_ids
            for rows in _windows(owners, limit, int(stride), self._left):
                picked = [ids[row] for row in rows], [offsets[row] for row in rows]
                windows.append(TextWindow(*picked, [words[row] for row in rows], [owners[row] for row in rows], index))
        return windows

    def encode_beginnings(self, texts: Sequence[str], *, max_length: int, offsets: bool = True) -> list[Encoding]:
        """Like `encode_batch` without a warning, in a time that does not grow with the text behind the first tokens.

        `truncated` counts only tokens that were found.
        """
        most = CHARACTERS * max_length
        if self._config.get("truncation_side") == "left" or all(len(text) <= most for text in texts):
            return self._encode(texts, max_length, spans=offsets, warn=False)
        batch = self._encode([text[:most] for text in texts], max_length, spans=offsets, warn=False)
        for row, text in enumerate(texts):
            # Few tokens for so many characters, such as white space: the next ones may be anywhere.
            if len(text) > most and batch[row].truncated < MARGIN:
                (batch[row],) = self._encode([text], max_length, spans=offsets, warn=False)
        return batch

    def _tokenized(
        self, texts: str | Iterable[Text] | Iterable[Words], *, spans: bool, split: bool
    ) -> tuple[list[Text] | list[Words], list[tokenizers.Encoding]]:
        """The texts as a list, and all of their tokens."""
        batch = checked_words(texts) if split else checked(texts)
        run = self._backend.encode_batch if spans else self._backend.encode_batch_fast
        with _as_value_error("tokenizer.json contradicts itself, and cannot tokenise these texts"):
            return batch, run(list(map(lower_cased, batch)) if self.do_lower_case else batch, is_pretokenized=split)

    def _limit(self, max_length: int | None) -> int | None:
        if max_length is not None and (not isinstance(max_length, Integral) or isinstance(max_length, bool)):
            raise TypeError(f"max_length must be a whole number or None, got {max_length!r:.80}")
        return self.max_length if max_length is None else max_length

    def _offsets(self, text: Text | Words, whole: tokenizers.Encoding) -> Offsets:
        """The offsets of all tokens in the caller's text."""
        return offsets_before_lower(text, whole) if self.do_lower_case else whole.offsets

    def _encode(
        self,
        texts: str | Iterable[Text] | Iterable[Words],
        max_length: int | None,
        spans: bool,
        warn: bool,
        split: bool = False,
    ) -> list[Encoding]:
        limit = self._limit(max_length)
        found, wholes = self._tokenized(texts, spans=spans, split=split)
        batch = []
        for text, whole in zip(found, wholes, strict=True):
            ids, offsets = whole.ids, self._offsets(text, whole) if spans else []
            if limit is not None and len(ids) > limit:
                kept = _kept(whole.sequence_ids, limit, self._left)
                ids, offsets = [ids[row] for row in kept], [offsets[row] for row in kept if offsets]
            batch.append(Encoding(ids, offsets, truncated=len(whole) - len(ids)))
        # A max_length that the caller has named is what the caller wants.
        if warn and max_length is None and (cut := sum(encoding.truncated > 0 for encoding in batch)):
            longest = max(map(len, wholes))
            what = f"{cut} of {len(batch)} texts were cut to {limit} tokens, the longest of {longest}"
            todo = "read all of them with encode_windows, or pass a max_length, which cuts without this warning"
            warnings.warn(f"{what}: {todo}", TruncationWarning, stacklevel=3)
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids (a list or a `[n]` tensor), with special tokens."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id)

    @property
    def added_tokens(self) -> set[str]:
        """Tokens that are matched before the text is split: special tokens and those of `add_tokens`."""
        return {token.content for token in self._backend.get_added_tokens_decoder().values()}

    def add_tokens(self, tokens: Sequence[str]) -> int:
        """Append tokens. Returns by how many rows the embeddings must grow (`resize_token_embeddings`)."""
        before = self.vocab_size
        self._backend.add_tokens(list(tokens))
        self.vocab_size = max(self._backend.get_vocab().values(), default=-1) + 1
        return self.vocab_size - before

    def files(self) -> dict[str, bytes]:
        """The files of a checkpoint folder, from which transformers' AutoTokenizer gives the same ids."""
        names = {role: name for role, name in self._names.items() if name is not None}
        # PreTrainedTokenizerFast takes the added tokens from tokenizer.json.
        config = {key: value for key, value in self._config.items() if key != "added_tokens_decoder"}
        config |= {**names, "tokenizer_class": "PreTrainedTokenizerFast"}
        config.setdefault("model_input_names", list(INPUT_NAMES))
        with _as_value_error("the tokenizer cannot be saved"):
            content = self._backend.to_str().encode()
        if len(content) > TOKENIZER_BYTES:
            raise ValueError(f"the tokenizer takes {len(content):,} bytes; at most {TOKENIZER_BYTES:,} are read")
        return {
            "tokenizer.json": content,
            CONFIG: json.dumps(config, indent=2, allow_nan=False).encode(),
            "special_tokens_map.json": json.dumps(names, indent=2).encode(),
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `files()` into `folder`, each in one step. Other files of the folder are kept."""
        files, target = self.files(), output_folder(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replacing(target / name) as beside:
                beside.write_bytes(content)

    def _special_token(self, role: str) -> str | None:
        named = self._config.get(role)
        content = named.get("content") if isinstance(named, dict) else named
        name = NAME.check(f"{CONFIG}: {role}", content)
        if name is None:
            return next((usual for usual in USUAL_NAMES[role] if self.token_to_id(usual) is not None), None)
        if self.token_to_id(name) is None:
            raise ValueError(f"{role} is {name!r}, which tokenizer.json lacks: do the files belong together?")
        return name


def _check_template(backend: tokenizers.Tokenizer) -> None:
    """Raise a ValueError if the post-processor makes texts much longer."""
    size = len(backend.post_processor.__getstate__()) if backend.post_processor else 0
    specials = max(backend.num_special_tokens_to_add(is_pair) for is_pair in (False, True))
    if size > TEMPLATE_BYTES or specials > MOST_SPECIALS:
        limits = f"at most {TEMPLATE_BYTES:,} and {MOST_SPECIALS} are read"
        raise ValueError(f"its post_processor has {size:,} bytes and adds {specials:,} special tokens; {limits}")


@contextlib.contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    """Turn the errors of the tokenizers library into ValueErrors."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    # The library raises plain Exceptions. A panic of its Rust code is a BaseException of a class it does not export.
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from error


def _kept(owners: list[int | None], length: int, left: bool) -> list[int]:
    """Rows to keep: all special tokens; in a pair, up to half of the rest for the shorter text ("longest_first")."""
    specials, first, second = ([row for row, o in enumerate(owners) if o == which] for which in (None, 0, 1))
    room = length - len(specials)
    if room < 0:
        raise ValueError(f"max_length {length} is below the {len(specials)} special tokens of every sequence")
    shorter, longer = sorted((first, second), key=len)
    half = min(len(shorter), room // 2)
    parts = ((shorter, half), (longer, room - half))
    kept = [rows[len(rows) - n :] if left else rows[:n] for rows, n in parts]
    return sorted(specials + kept[0] + kept[1])


def _windows(owners: list[int | None], length: int | None, stride: int, left: bool) -> Iterator[list[int]]:
    """The rows of each window of `length` tokens: the last text is cut, and everything else is in all of them."""
    if length is None or len(owners) <= length:
        yield list(range(len(owners)))
        return
    last = max((owner for owner in owners if owner is not None), default=-1)
    long = [row for row, owner in enumerate(owners) if owner == last]
    others = [row for row, owner in enumerate(owners) if owner != last]
    room = length - len(others)
    if room <= stride:
        what = f"max_length {length} leaves room for {max(0, room)} tokens beside the {len(others)} of every window"
        raise ValueError(f"{what}: that must be more than the stride, {stride}")
    step = room - stride
    for start in range(0, len(long) - stride, step):
        stop = len(long) - start
        yield sorted(others + (long[max(0, stop - room) : stop] if left else long[start : start + room]))
