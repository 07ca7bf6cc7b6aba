"""Words of a text in any script, for measures that count them."""

import functools
import unicodedata
from typing import Any


def split_words(text: str) -> list[str]:
    """Words in lower case without punctuation; each character of a script that puts no spaces between words.

    For ASCII text the words are those of rouge-score's own tokenizer with its stemmer.
    """
    words, current = [], ""
    for character in unicodedata.normalize("NFKC", text).lower() + " ":
        if _is_word(character) and not _stands_alone(character):
            current += character
            continue
        if current:
            words.append(_stemmer().stem(current) if len(current) > 3 and current.isascii() else current)
            current = ""
        if _stands_alone(character):
            words.append(character)
    return words


def spaced(text: str) -> str:
    """``text`` with a space around each character of a script that puts none between words; else as it is."""
    text = unicodedata.normalize("NFC", text)
    return "".join(f" {character} " if _stands_alone(character) else character for character in text)


def _is_word(character: str) -> bool:
    # Marks belong to their letter: the vowel signs of Devanagari are no separators.
    return unicodedata.category(character)[0] in "LNM"


def _stands_alone(character: str) -> bool:
    """Whether a character is of a script written without spaces: CJK, kana, Thai, Lao, Khmer, Burmese."""
    code = ord(character)
    if code < 0x0E00:
        return False
    scripts = (
        (0x0E00, 0x0EFF),  # Thai, Lao
        (0x1000, 0x109F),  # Burmese
        (0x1780, 0x17FF),  # Khmer
        (0x3040, 0x30FF),  # kana
        (0x3400, 0x4DBF),  # CJK extension A
        (0x4E00, 0x9FFF),  # CJK
        (0xF900, 0xFAFF),  # CJK compatibility
        (0x20000, 0x323AF),  # CJK extensions
    )
    return any(first <= code <= last for first, last in scripts) and _is_word(character)


@functools.cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
