"""Vectors that a model writes: one after the other from the states before them, or all of a span at once."""

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.decode.cache import KVCache
from mmtp.decode.chooser import Chooser, exact_width
from mmtp.decode.rows import Choice, Row
from mmtp.decode.sample import gaussian
from mmtp.stream.vocab import Special


def write_tokens(chooser: Chooser, hidden: Float[Tensor, "b s d"], choices: list[Choice]) -> None:
    """Draws the vectors of new ``<feature>`` tokens from the states before them."""
    model = chooser.model
    norm, width = model.backbone.norm, model.config.feature_width
    guides = [choice.guide or (choice.row.index, choice.column) for choice in choices]
    states = norm(hidden[[choice.row.index for choice in choices], [choice.column for choice in choices]])
    unguided = norm(hidden[[lane for lane, _ in guides], [column for _, column in guides]])
    samplings = [choice.row.sampling.of(chooser.slots[choice.slot].modality) for choice in choices]
    noise = [s.temperature * gaussian(s.seed, choice.place, width) for s, choice in zip(samplings, choices, strict=True)]
    scale = torch.tensor([choice.weight for choice in choices], device=chooser.device, dtype=states.dtype)
    vectors, embedded = model.write(states, torch.stack(noise).to(states), unguided, scale)
    for choice, vector, read in zip(choices, vectors, embedded.split(1), strict=True):
        choice.row.take_vector(vector, read)


def write_blocks(chooser: Chooser, rows: list[Row], cache: KVCache, exact: bool = False) -> None:
    """Draws all vectors of the spans that rows have just entered, each span at once, in as many passes as the flow has steps.

    The passes keep nothing in the cache: what stays are the finished vectors, which the next round reads.

    Args:
        chooser: with the model.
        rows: whose newest token is the first ``<feature>`` of a span.
        cache: of the lanes in focus, those of the rows among them.
        exact: pad passes so that kernels agree.
    """
    model, flow = chooser.model, chooser.model.flow
    firsts = {lane.index: len(lane.tokens) - 1 for row in rows for lane in row.lanes}
    for row in rows:
        before = len(row.tokens)
        while not row.done and chooser.slots[row.state.slot].forced == Special.FEATURE:
            row.push(Special.FEATURE)
        row.forget_drafts()
        row.stats.per_pass += [0] * (flow.config.steps - 1) + [len(row.tokens) - before]
    rows = [row for row in rows if chooser.slots[row.state.slot].forced != Special.FEATURE]  # others ended inside
    if not rows:
        return
    sizes = {row.index: len(row.tokens) - firsts[row.index] for row in rows}
    longest, dim = max(sizes.values()), model.config.feature_width
    noise = torch.zeros(len(rows), longest, dim)
    weights = torch.ones(len(rows), longest, 1)
    for i, row in enumerate(rows):
        places, settings = range(firsts[row.index], len(row.tokens)), row.sampling.of(chooser.slots[row.slots[-1]].modality)
        noise[i, : len(places)] = settings.temperature * torch.stack([gaussian(settings.seed, p, dim) for p in places])
        weights[i, : len(places), 0] = torch.tensor([settings.weight(p) for p in torch.linspace(0, 1, len(places)).tolist()])
    weights = weights.to(chooser.device, chooser.dtype)
    padded = exact_width(longest) if exact else longest
    positions = chooser.tensor([[(0, 0, 0)] * padded] * len(cache.lengths))
    for row in rows:
        for lane in row.lanes:
            positions[lane.index, : sizes[row.index]] = chooser.tensor(lane.positions[firsts[lane.index] :])
    slots = [[rows[0].slots[-1]] * padded] * len(cache.lengths)  # all are of one medium

    def velocity(points: Tensor, time: float) -> Tensor:
        mask = cache.begin(padded)
        embedded = torch.zeros(len(cache.lengths), padded, model.config.backbone.width, device=chooser.device, dtype=chooser.dtype)
        for row, own in zip(rows, points, strict=True):
            size = sizes[row.index]
            for lane in row.lanes:
                first = firsts[lane.index]
                mask[lane.index, :, :size, first : first + size] = True
                embedded[lane.index, :size] = model.embed_points(own[:size], time)
        states = model.backbone.norm(model.extend(embedded, positions, mask, cache.layers, slots))
        found = flow(states)[:, :longest]
        moves = [
            found[row.index] if row.branch is None else torch.lerp(found[row.branch.index], found[row.index], weight)
            for row, weight in zip(rows, weights, strict=True)
        ]
        return torch.stack(moves)

    vectors = flow.euler(noise.to(chooser.device, chooser.dtype), velocity)
    for row, own in zip(rows, vectors, strict=True):
        size = sizes[row.index]
        row.written.extend(own[:size])
        embedded = model.embed_points(flow.to_noise_units(own[:size]), 1.0)
        for lane in row.lanes:
            first = firsts[lane.index]
            lane.vectors[first] = embedded
            lane.inputs.append((first, first + size))
