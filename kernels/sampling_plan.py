"""What each row of logits keeps: the first two kernels of `sampling.sample_triton`.

A row is cut into chunks of CHUNK tokens, whatever the number of rows: sums are then the same in
every batch, and so is the token. Two terms of all sampling kernels:

    value    a logit, -inf where the grammar mask forbids the token or past the end of the row
    plan     fp32 `[S, 4]`: row's max; mass, the sum of exp((value - max) / temperature) over what
             top-k keeps, 0 if no token is possible; low, which all values that top-k and min-p
             keep reach; start, which the best score is expected to reach
"""

from baton.kernels.jit import gdc_launch_dependents, gdc_wait, jit, tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
# No Gumbel number, thus no best score, is below this.
MIN_NOISE = tl.constexpr(-3.0)
# The best score is log(mass) + a Gumbel number: below log(mass) - 2.5 once in 200,000 draws.
_HEADROOM = tl.constexpr(2.5)
_KEY_OF_MINUS_INF = tl.constexpr(-2139095041)


@jit
def masked_values(row_logits, token, inside, mask, mask_index, MASKED: tl.constexpr):
    """fp32 values of `token`; `mask` points to the row's words, `mask_index` is -1 for none."""
    value = tl.load(row_logits + token, mask=inside, other=-float("inf")).to(tl.float32)
    return _only_allowed(value, token, inside, mask, mask_index, MASKED)


@jit
def _only_allowed(value, token, inside, mask, mask_index, MASKED: tl.constexpr):
    if MASKED:
        word = tl.load(mask + token // 32, mask=inside & (mask_index >= 0), other=-1)
        value = tl.where(((word >> (token % 32)) & 1) != 0, value, -float("inf"))
    return value


@jit
def mask_of_row(mask, mask_row, row, words, MASKED: tl.constexpr):
    index = -1
    if MASKED:
        index = tl.load(mask_row + row)
        mask += tl.maximum(index, 0).to(tl.int64) * words
    return mask, index


@jit
def temperature_of(temperature, row):
    """1 for greedy rows; not so small that its inverse is infinite."""
    value = tl.load(temperature + row)
    return tl.where(value > 0, tl.maximum(value, 1e-30), 1.0)


@jit
def _finite_or_zero(x):
    return tl.where((x > -INF) & (x < INF), x, 0.0)


@jit
def stats_kernel(
    logits, stride, vocab, mask, mask_row, words, temperature, top_k,
    chunk_max, chunk_sum, group_max, raw_max, raw_sum,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr, LOGPROB: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (c, s): max and sum of exp of chunk c of row s; for top-k, the max of each GROUP."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    place = row * tl.num_programs(0) + chunk
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf"))
    value = value.to(tl.float32)
    if LOGPROB:
        best = tl.max(value)
        tl.store(raw_max + place, best)
        total = tl.sum(tl.exp2((value - _finite_or_zero(best)) * LOG2E))
        tl.store(raw_sum + place, total)
    if MASKED:
        mask, mask_index = mask_of_row(mask, mask_row, row, words, MASKED)
        value = _only_allowed(value, token, token < vocab, mask, mask_index, MASKED)
    scale = LOG2E / temperature_of(temperature, row)
    best = tl.max(value)
    tl.store(chunk_max + place, best)
    # A NaN or +inf shows in the sum.
    tl.store(chunk_sum + place, tl.sum(tl.exp2((value - _finite_or_zero(best)) * scale)))
    k = tl.load(top_k + row)
    if (k > 0) & (k < vocab):
        group = tl.arange(0, CHUNK // GROUP)
        highest = tl.max(tl.reshape(value, [CHUNK // GROUP, GROUP]), 1)
        tl.store(group_max + place * (CHUNK // GROUP) + group, highest)


@jit
def _ordered(value):
    """int32 keys in the order of fp32 values; -0 equals 0."""
    value = tl.where(value == 0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _middle(low, high):
    """Their mean, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@jit
def _kth_in_tile(keys, k, low, high):
    """The greatest t in [low, high) with k keys at or above t, if `low` is such."""
    middle = _middle(low, high)
    while middle != low:
        enough = tl.sum((keys >= middle).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        middle = _middle(low, high)
    return low


@jit
def _values_of_groups(
    row_logits, vocab, mask, mask_index, members, start, count,
    GROUP: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Values `[TILE, GROUP]` of the groups listed at `members[start:]`."""
    index = start + tl.arange(0, TILE)
    group = tl.load(members + index, mask=index < count, other=0)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (index < count)[:, None] & (token < vocab)
    return masked_values(row_logits, token, inside, mask, mask_index, MASKED)


@jit
def _top_k_of_row(
    row_logits, vocab, mask, mask_index, group_max, members, groups, k, row_max, scale,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The k-th greatest value and the sum of exp over the values that reach it, exactly.

    At least k tokens reach the k-th greatest of the groups' maxima, so that only the groups whose
    max does can hold the k greatest; they are listed, and searched by bisection.
    """
    index = tl.arange(0, GROUPS)
    key = _ordered(tl.load(group_max + index, mask=index < groups, other=-float("inf")))
    lowest = tl.min(key).to(tl.int32)
    high = _ordered(row_max) + 1
    low = _kth_in_tile(key, k, lowest, high)
    member = (key >= low) & (index < groups)
    place = tl.cumsum(member.to(tl.int32), 0) - 1
    tl.store(members + place, index, mask=member)
    count = tl.sum(member.to(tl.int32))
    tl.debug_barrier()  # the list was written by other threads
    # Fewer than k groups: the k-th value may be lower than every group's max.
    low = tl.where(groups < k, _KEY_OF_MINUS_INF, low)
    middle = _middle(low, high)
    while middle != low:
        found = 0
        start = 0
        while start < count:
            value = _values_of_groups(
                row_logits, vocab, mask, mask_index, members, start, count, GROUP, TILE, MASKED
            )
            found += tl.sum((_ordered(value) >= middle).to(tl.int32))
            start += TILE
        low = tl.where(found >= k, middle, low)
        high = tl.where(found >= k, high, middle)
        middle = _middle(low, high)
    kth = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    total = tl.zeros([TILE, GROUP], tl.float32)
    start = 0
    while start < count:
        value = _values_of_groups(
            row_logits, vocab, mask, mask_index, members, start, count, GROUP, TILE, MASKED
        )
        total += tl.where(value >= kth, tl.exp2((value - row_max) * scale), 0.0)
        start += TILE
    return kth, tl.sum(total)


@jit
def plan_kernel(
    logits, stride, vocab, mask, mask_row, words, temperature, top_k, min_p,
    chunk_max, chunk_sum, group_max, members, groups, chunks, plan,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program s: the plan of row s; CHUNKS and GROUPS are `chunks` and `groups`, rounded up."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    heat = temperature_of(temperature, row)
    scale = LOG2E / heat
    index = tl.arange(0, CHUNKS)
    inside = index < chunks
    best = tl.load(chunk_max + row * chunks + index, mask=inside, other=-float("inf"))
    total = tl.load(chunk_sum + row * chunks + index, mask=inside, other=0.0)
    row_max = tl.max(best)
    mass = tl.sum(total * tl.exp2((best - _finite_or_zero(row_max)) * scale))
    alive = (mass > 0) & (row_max > -INF) & (row_max < INF)
    low = -INF
    start = MIN_NOISE
    if alive:
        k = tl.load(top_k + row)
        greedy = tl.load(temperature + row) <= 0
        if (k > 0) & (k < vocab) & (greedy == 0):
            mask, mask_index = mask_of_row(mask, mask_row, row, words, MASKED)
            low, mass = _top_k_of_row(
                logits + row * stride, vocab, mask, mask_index,
                group_max + row * groups, members + row * groups, groups, k, row_max, scale,
                GROUPS, GROUP, TILE, MASKED,
            )  # fmt: skip
        smallest = tl.load(min_p + row)
        start = tl.maximum(tl.log(mass) - _HEADROOM, MIN_NOISE)
        if smallest > 0:
            # Of the mass that min-p leaves no more is known than that the best is in it.
            start = MIN_NOISE
            low = tl.maximum(low, row_max + tl.minimum(heat * tl.log(smallest), 0.0))
        if greedy:
            start = MIN_NOISE
            low = row_max
    tl.store(plan + row * 4, row_max)
    tl.store(plan + row * 4 + 1, tl.where(alive, mass, 0.0))
    tl.store(plan + row * 4 + 2, low)
    tl.store(plan + row * 4 + 3, start)
