"""Drawing a token and accepting it: the other kernels of `sampling.sample_triton`.

score    (value - row's max) / temperature, divided with correct rounding, plus Gumbel noise;
         greedy rows have no noise, and the lowest token among the best
draws    per round, row and chunk: the best score fp32, its token int32 (NONE if there is
         none), and the mass strictly above the row's winner fp32; each `[ROUNDS, S, chunks]`
"""

from baton.kernels.jit import gdc_launch_dependents, gdc_wait, jit, tl
from baton.kernels.philox import gumbel_bound, gumbel_of_word, philox_word
from baton.kernels.sampling_plan import (
    INF,
    LOG2E,
    MIN_NOISE,
    mask_of_row,
    masked_values,
    temperature_of,
)

_NONE = tl.constexpr(0x7FFFFFFF)
# Above all Gumbel noise.
_MAX_NOISE = tl.constexpr(16.65)
# Bounds on scores are right within this: their division is approximate.
_SLACK = tl.constexpr(1e-3)


@jit
def _score(row_logits, token, row_max, heat, position, choice, key_low, key_high):
    value = tl.load(row_logits + token).to(tl.float32)
    word = philox_word(token.to(tl.uint32), position, choice, key_low, key_high)
    return tl.div_rn(value - row_max, heat) + gumbel_of_word(word)


@jit
def _draw_chunk(
    row_logits, vocab, mask, mask_index, first, row, row_max, low, floor, start, best, winner,
    temperature, seed, position, choice,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The best score that reaches `start` and `best`, and its token, among the values of a chunk
    that are above `floor` and reach `low`; (`best`, `winner`) if there is none.

    An upper bound on every score, at half the price of a score, leaves few tokens to be scored.
    """
    greedy = tl.load(temperature + row) <= 0
    heat = temperature_of(temperature, row)
    inverse = 1.0 / heat
    key = tl.load(seed + row)
    key_low = key.to(tl.uint32)
    key_high = (key >> 32).to(tl.uint32)
    at = tl.load(position + row).to(tl.uint32)
    which = tl.load(choice + row).to(tl.uint32)
    for offset in range(0, CHUNK, BLOCK):
        token = first + offset + tl.arange(0, BLOCK)
        value = masked_values(row_logits, token, token < vocab, mask, mask_index, MASKED)
        kept = (value >= low) & (value > floor)
        if greedy:
            lowest = tl.min(tl.where(kept, token, _NONE))
            best = tl.where(lowest < winner, 0.0, best)
            winner = tl.minimum(lowest, winner)
        else:
            bound = tl.where(kept, (value - row_max) * inverse, -INF)
            if tl.max(bound) + _MAX_NOISE >= tl.maximum(best, start) - _SLACK:
                bound += gumbel_bound(
                    philox_word(token.to(tl.uint32), at, which, key_low, key_high)
                )
                highest = tl.max(bound)
                while highest >= tl.maximum(best, start) - _SLACK:
                    chosen = tl.min(tl.where(bound == highest, token, _NONE))
                    score = _score(row_logits, chosen, row_max, heat, at, which, key_low, key_high)
                    better = (score > best) | ((score == best) & (chosen < winner))
                    better = better & (score >= start)
                    best = tl.where(better, score, best)
                    winner = tl.where(better, chosen, winner)
                    bound = tl.where(token == chosen, -INF, bound)
                    highest = tl.max(bound)
    return best, winner


@jit
def _may_win(highest, row_max, low, floor, start, heat):
    """Whether a token whose value is `highest` can be drawn at all."""
    reach = (highest - row_max) / heat + _MAX_NOISE
    return (highest >= low) & (highest > floor) & (reach >= start - _SLACK)


@jit
def _mass_of_chunk(
    row_logits, vocab, mask, mask_index, first, row_max, floor, scale,
    CHUNK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sum of exp over the values of a chunk that are above `floor`."""
    token = first + tl.arange(0, CHUNK)
    value = masked_values(row_logits, token, token < vocab, mask, mask_index, MASKED)
    return tl.sum(tl.where(value > floor, tl.exp2((value - row_max) * scale), 0.0))


@jit
def _winner(scores, tokens, chunks, CHUNKS: tl.constexpr):
    """Best score of a row over its chunks, lowest token among equals; NONE if there is none."""
    index = tl.arange(0, CHUNKS)
    score = tl.load(scores + index, mask=index < chunks, other=-float("inf"))
    token = tl.load(tokens + index, mask=index < chunks, other=_NONE)
    return tl.min(tl.where(score == tl.max(score), token, _NONE))


@jit
def _accepts(above, mass, top_p):
    """Whether less than `top_p` of the mass lies strictly above a token; the best always stays."""
    return (above <= 0) | (above < top_p * mass)


@jit
def _value_of(row_logits, token):
    """-inf for NONE: then everything is above."""
    known = token != _NONE
    return tl.load(row_logits + token, mask=known, other=-float("inf")).to(tl.float32)


@jit
def _sum_over_chunks(values, chunks, CHUNKS: tl.constexpr):
    index = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(values + index, mask=index < chunks, other=0.0))


@jit
def draw_kernel(
    logits, stride, vocab, mask, mask_row, words, temperature, top_p, seed, position, choice,
    chunk_max, plan, scores, tokens, above, round_stride,
    ROUND: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (c, s): the best of chunk c of row s, above the last round's winner if that was
    rejected; a winner that was accepted stays."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    row_logits = logits + row * stride
    row_max = tl.load(plan + row * 4)
    mass = tl.load(plan + row * 4 + 1)
    low = tl.load(plan + row * 4 + 2)
    start = tl.load(plan + row * 4 + 3)
    best = -INF
    winner = _NONE
    floor = -INF
    wanted = mass > 0
    if ROUND > 0:
        last = (ROUND - 1) * round_stride + row * chunks
        previous = _winner(scores + last, tokens + last, chunks, CHUNKS)
        covered = _sum_over_chunks(above + last, chunks, CHUNKS)
        floor = _value_of(row_logits, previous)
        start = MIN_NOISE
        if _accepts(covered, mass, tl.load(top_p + row)):
            wanted = False
            best = tl.load(scores + last + chunk)
            winner = tl.load(tokens + last + chunk)
    if wanted:
        highest = tl.load(chunk_max + row * chunks + chunk)
        if _may_win(highest, row_max, low, floor, start, temperature_of(temperature, row)):
            mask, mask_index = mask_of_row(mask, mask_row, row, words, MASKED)
            best, winner = _draw_chunk(
                row_logits, vocab, mask, mask_index, chunk * CHUNK, row, row_max, low, floor,
                start, best, winner, temperature, seed, position, choice, CHUNK, BLOCK, MASKED,
            )  # fmt: skip
    place = ROUND * round_stride + row * chunks + chunk
    tl.store(scores + place, best)
    tl.store(tokens + place, winner)


@jit
def verify_kernel(
    logits, stride, vocab, mask, mask_row, words, temperature, top_p,
    chunk_max, plan, scores, tokens, above, round_stride,
    ROUND: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (c, s): the mass of chunk c of row s strictly above the round's winner; infinite
    where there is no winner, 0 where top-p is off."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    row_logits = logits + row * stride
    row_max = tl.load(plan + row * 4)
    mass = tl.load(plan + row * 4 + 1)
    place = ROUND * round_stride + row * chunks
    covered = 0.0
    if mass > 0:
        winner = _winner(scores + place, tokens + place, chunks, CHUNKS)
        floor = _value_of(row_logits, winner)
        wanted = (tl.load(top_p + row) < 1) & (tl.load(temperature + row) > 0)
        if winner == _NONE:
            wanted = False
            covered = INF
        if ROUND > 0:
            last = place - round_stride
            if winner == _winner(scores + last, tokens + last, chunks, CHUNKS):
                wanted = False
                covered = tl.load(above + last + chunk)
        if wanted & (tl.load(chunk_max + row * chunks + chunk) > floor):
            mask, mask_index = mask_of_row(mask, mask_row, row, words, MASKED)
            covered = _mass_of_chunk(
                row_logits, vocab, mask, mask_index, chunk * CHUNK, row_max, floor,
                LOG2E / temperature_of(temperature, row), CHUNK, MASKED,
            )  # fmt: skip
    tl.store(above + place + chunk, covered)


@jit
def finish_kernel(
    logits, stride, vocab, mask, mask_row, words, temperature, top_p, seed, position, choice,
    chunk_max, plan, scores, tokens, above, raw_max, raw_sum, chunks, out, logprob,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    LOGPROB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program s: the token of row s; draws on, alone, if the winner of the last round, to which
    `scores`, `tokens` and `above` point, was rejected too."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    row_max = tl.load(plan + row * 4)
    mass = tl.load(plan + row * 4 + 1)
    low = tl.load(plan + row * 4 + 2)
    chunk_max += row * chunks
    heat = temperature_of(temperature, row)
    p = tl.load(top_p + row)
    mask, mask_index = mask_of_row(mask, mask_row, row, words, MASKED)
    winner = _winner(scores + row * chunks, tokens + row * chunks, chunks, CHUNKS)
    above += row * chunks
    covered = _sum_over_chunks(above, chunks, CHUNKS)
    rejected = (mass > 0) & (_accepts(covered, mass, p) == 0)
    while rejected:
        floor = _value_of(row_logits, winner)
        best = -INF
        winner = _NONE
        chunk = 0
        while chunk < chunks:
            highest = tl.load(chunk_max + chunk)
            if _may_win(highest, row_max, low, floor, tl.maximum(best, MIN_NOISE), heat):
                best, winner = _draw_chunk(
                    row_logits, vocab, mask, mask_index, chunk * CHUNK, row, row_max, low, floor,
                    MIN_NOISE, best, winner, temperature, seed, position, choice,
                    CHUNK, BLOCK, MASKED,
                )  # fmt: skip
            chunk += 1
        floor = _value_of(row_logits, winner)
        chunk = 0
        while chunk < chunks:
            part = 0.0
            if tl.load(chunk_max + chunk) > floor:
                part = _mass_of_chunk(
                    row_logits, vocab, mask, mask_index, chunk * CHUNK, row_max, floor,
                    LOG2E / heat, CHUNK, MASKED,
                )  # fmt: skip
            tl.store(above + chunk, part)
            chunk += 1
        # Summed as in `verify_kernel`, so that the number of rounds decides nothing.
        tl.debug_barrier()
        covered = _sum_over_chunks(above, chunks, CHUNKS)
        tl.debug_barrier()
        # The best of a row can always be drawn, so that there is a winner.
        rejected = (_accepts(covered, mass, p) == 0) & (winner != _NONE)
    found = winner != _NONE
    tl.store(out + row, tl.where(found, winner, -1))
    if LOGPROB:
        index = tl.arange(0, CHUNKS)
        inside = index < chunks
        best_raw = tl.load(raw_max + row * chunks + index, mask=inside, other=-float("inf"))
        part = tl.load(raw_sum + row * chunks + index, mask=inside, other=0.0)
        result = float("nan")
        if found:
            highest = tl.max(best_raw)
            total = tl.sum(part * tl.exp2((best_raw - highest) * LOG2E))
            result = _value_of(row_logits, winner) - highest - tl.log(total)
        tl.store(logprob + row, result)
