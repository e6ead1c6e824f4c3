"""A guess at the encoding of bytes that are not UTF-8: the one in which they are letters of one language.

For each language there are its letters beside those of ASCII, the most frequent ones first. An encoding scores by how
many of the other characters these are, and how frequent they are. Symbols and capital letters within words count
against it: in a wrong encoding there are many.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterator

WESTERN = "cp1252"

_TYPOGRAPHY = frozenset("’“”–—…‘•«»„©°€£§\xa0")  # not letters, but as likely in the encodings of Windows
_RUSSIAN = "оеаинтсрвлкмдпуяызьбгчйхжюшцщэфъё"
_JAPANESE = "のにるはをたがでてとしれさいなもすこまらかりくっあんコンドジトムメタルス、。「」ー"
_CENTRAL = ("ęąłóżśćźń", "áíéěřšůýžčúťďňó", "éáöóőüíúű", "čšžćđ")
_LETTERS = {  # the encodings of Windows first: of two that give the same score, the first is taken
    WESTERN: ("éàèêçôùâîûëïœ", "äüöß", "éóáíñúü", "ãçáéíóõúâêà", "àèéùòì", "äåöé", "éëïóèü", "åøæéôò", "áéíóúðþýæö"),
    "cp1250": (*_CENTRAL, "ăîşţâ"),
    "cp1254": ("ıüşöğçİ",),
    "cp1257": ("ėšųžąįūęč", "āīūšēņļžčģķ", "äõüöšž"),
    "cp1251": (_RUSSIAN, "оаніивертслкдмупязьбгйчхціїжєюшщфґ", "аеоитнрсвлкдпзмубгъячйцжщхшюьф"),
    "koi8-r": (_RUSSIAN,),
    "koi8-u": ("оаніивертслкдмупязьбгйчхціїжєюшщфґ",),
    "cp866": (_RUSSIAN,),
    "iso8859-5": (_RUSSIAN,),
    "cp1253": ("αοιετσνηυρπκμλςόάγήέίδωχθύφβώξζψ",),
    "cp1255": ("יוהלאתמרשבןנםעקחפדכגסזטךץףצ",),
    "cp1256": ("اليمنتروبعدسفهكقحجشصطخضذثزغءظةىأإ",),
    "cp874": ("านรกอเงมยลวดทสต่้ปะบคัิีหแจพขใไชถผโซณฐธภษศฉฝฟญฮ์ุูึื็ำ",),
    "iso8859-2": _CENTRAL,
    "cp932": (_JAPANESE,),
    "euc_jp": (_JAPANESE,),
    "gb18030": ("的一是不了在人有我他这中大来上国个到说们，。、为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后",),
    "big5hkscs": ("的一是不了在人有我他這中大來上國個到說們，。、為子和你地出道也時年得就那要下以生會自著去之過家學對可她裡後",),
    "cp949": ("이다는을에의가를은지고한로도하기사리서어시인대나자아스일정수있그",),
}
_WIDE = frozenset({"cp932", "euc_jp", "gb18030", "big5hkscs", "cp949"})
_HIGH = frozenset({"euc_jp", "gb18030", "cp949"})  # the usual characters of these have no ASCII byte
_UNUSUAL = 0.25
"""What a character counts that is not frequent, where there are thousands of characters."""


def guess_encoding(sample: bytes) -> str:
    """Python's name of the likeliest encoding. The bytes may end within a character."""
    scores = {encoding: score for encoding in _LETTERS for score in _score(sample, encoding)}
    return max(scores, key=lambda encoding: scores[encoding], default=WESTERN)


def _score(sample: bytes, encoding: str) -> Iterator[float]:
    """The best score among the languages of an encoding; none if the bytes are not valid in it."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return
    others = [character for character in text if character > "\x7f"]
    odd = sum(map(_is_odd, text, text[1:], text[2:]))
    known = max(_known(others, letters) for letters in _LETTERS[encoding])
    if encoding in _WIDE:
        pairs = sum(byte > 0x7F for byte in sample) - len(others) if encoding in _HIGH else 0
        known = 2 * max(known, _UNUSUAL * pairs)
    yield (known - odd) / max(1, len(others))


def _known(others: list[str], letters: str) -> float:
    weights = {letter: 1 - 0.5 * rank / len(letters) for rank, letter in enumerate(letters)}
    weights |= dict.fromkeys(_TYPOGRAPHY, 0.5)
    return sum(weights.get(character.lower(), 0.0) for character in others)


def _is_odd(before: str, character: str, after: str) -> bool:
    """Whether a character that is not ASCII is a capital behind a small letter, or a symbol within a word."""
    if character <= "\x7f":
        return False
    if character.isupper():
        return before.islower()
    is_inside = before.isalpha() and after.isalpha()
    return is_inside and unicodedata.category(character)[0] not in "LM" and character not in "’\xad\xa0–—"
