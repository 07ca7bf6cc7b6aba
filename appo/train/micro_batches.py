"""Responses that one forward and backward computes together.

A group may be split: a micro-batch holds prompts, each with some of its responses. Whatever the cut, gradients are
those of one large batch, since every loss is divided by counts of all of it; a split costs its prompt's forward again.
"""

from collections.abc import Iterator, Sequence

from appo.train.groups import Group, Part


def micro_batches(groups: Sequence[Group], *, groups_at_most: int, tokens: int, shared: bool) -> Iterator[list[Part]]:
    """Parts of ``groups`` in order: at most ``groups_at_most`` prompts and, but for a response that is longer alone,
    ``tokens`` tokens (0: any number) in a micro-batch.

    shared: a prompt is computed once for its responses; otherwise once for each.
    """
    batch: list[Part] = []
    free = tokens
    for group in groups:
        prompt, lengths = len(group.prompt), group.mask.sum(1).tolist()
        costs = [length + (0 if shared or not length else prompt) for length in lengths]  # empty ones join any
        first = prompt if shared else 0
        whole = first + sum(costs)
        if batch and (len(batch) == groups_at_most or (tokens and whole > free)):
            yield batch
            batch, free = [], tokens
        if not tokens or whole <= free:
            batch.append(Part(group, tuple(range(len(lengths)))))
            free -= whole
            continue
        # It does not fit into an empty micro-batch: cut it.
        chosen: list[int] = []
        used = 0
        for index, cost in enumerate(costs):
            if used and first + used + cost > tokens:
                yield [Part(group, tuple(chosen))]
                chosen, used = [], 0
            chosen.append(index)
            used += cost
        batch, free = [Part(group, tuple(chosen))], tokens - first - used
    if batch:
        yield batch
