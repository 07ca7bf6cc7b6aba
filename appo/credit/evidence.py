"""Evidence tokens, those of a response that tell what was seen: from places in its text to masks of its tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appo.data.records import DataError, Record
from appo.train.groups import Group

# Places of a response's evidence, by what it is: (start, end) in characters of its text; None: it tells nothing.
# "sentence", if there, is what these words stand in; "when", the moment. Neither is evidence itself.
Spans = Mapping[str, tuple[int, int]]
FindSpans = Callable[[str, Record], Spans | None]
SENTENCE = "sentence"
NOT_EVIDENCE = (SENTENCE, "when")


@dataclass(frozen=True)
class Evidence:
    """The evidence tokens of a group.

    present: (G,) bool, the responses in which something was found. Masks (G, N) bool: tokens, the evidence; sentence,
    evidence and all around it; places, one for each kind of place.
    """

    present: Tensor
    tokens: Tensor
    sentence: Tensor
    places: dict[str, Tensor] = field(default_factory=dict)


def find_evidence(group: Group, tokenizer: Any, find: FindSpans) -> Evidence:
    """The tokens of a group's responses that overlap the places that ``find`` names.

    Raises DataError for a place outside the text, naming the record.
    """
    shape = group.mask.shape
    places: dict[str, Tensor] = {}
    present = torch.zeros(shape[0], dtype=torch.bool)
    for row, (text, ids, valid) in enumerate(zip(group.texts, group.completion_ids, group.mask, strict=True)):
        spans = find(text, group.prompt.record)
        if spans is None:
            continue
        present[row] = True
        starts, ends = token_places(ids[valid].tolist(), tokenizer)
        for name, (start, end) in spans.items():
            if not 0 <= start < end <= len(text):
                raise DataError(
                    f"{group.prompt.record.place}: `{name}`: expected a place within the {len(text)} characters of a "
                    f"response, got {(start, end)}. Mend the function that finds what responses tell."
                )
            mask = places.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            mask[row, valid.nonzero().flatten()[(starts < end) & (ends > start)]] = True
    blank = torch.zeros(shape, dtype=torch.bool)
    tokens = sum((mask for name, mask in places.items() if name not in NOT_EVIDENCE), blank)
    sentence = sum(places.values(), blank)
    return Evidence(present, tokens.bool(), sentence.bool(), places)


def token_places(ids: list[int], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(start, end) of each token in the characters of the decoded response, its leading space left out; int64 each."""
    text, starts, ends = "", [], []
    for count in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:count], skip_special_tokens=True)
        piece = longer[len(text) :]
        starts.append(len(longer) - len(piece.lstrip()))
        ends.append(len(longer))
        text = longer
    return torch.tensor(starts, dtype=torch.int64), torch.tensor(ends, dtype=torch.int64)
