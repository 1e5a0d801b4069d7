"""The algebra of a softmax computed in pieces (arXiv:1805.02867).

The state of a row is the maximum m of its scores, the sum l of exp2(score - m), and the values
weighted alike; scores count in powers of two. A row that has seen nothing has m = -inf and l = 0,
and no step makes a NaN of it. What leaves a kernel is the natural-log sum of exponentials, lse, and
the attended values o, divided by l.

Prefill updates one state tile by tile. Decode makes a state of each block and folds those: its sums
then have an order, and roundings, that do not depend on which program did which.
"""

from baton.kernels.jit import jit, tl

LOG2_E = 1.4426950408889634


@jit
def update(scores, scale_log2, row_max, row_sum):
    """Fold `scores` `[M, N]`, not yet times `scale_log2` > 0 (it holds log2 e), into the state.

    Returns (weights `[M, N]`, what earlier sums shrink by `[M]`, new maximum, new sum), all fp32.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    shrink = tl.exp2(row_max - shift)
    return weights, shrink, new_max, row_sum * shrink + tl.sum(weights, 1)


@jit
def finish(attended, row_max, row_sum):
    """(o `[M, D]`, natural lse `[M]`) of a state; (0, -inf) of a row that has seen nothing."""
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    lse = (row_max + tl.log2(divisor)) * 0.6931471805599453
    return attended / divisor[:, None], lse


@jit
def begin(scores, scale_log2):
    """The state of one block: (weights `[M, N]`, maximum `[M]`, sum `[M]`) of `scores`, not yet
    times `scale_log2` > 0. Its values are those that the weights make of V."""
    row_max = tl.max(scores, 1) * scale_log2
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.exp2(tl.fma(scores, scale_log2, -shift[:, None]))
    return weights, row_max, tl.sum(weights, 1)


@jit
def nothing(M: tl.constexpr, D: tl.constexpr):
    """The state (values `[M, D]`, maximum, sum) that `fold` keeps the other of, bit for bit, on
    either side: its values are -0, since +0 and -0 make +0."""
    negative_zero = tl.full([M, D], -0x80000000, tl.int32).to(tl.float32, bitcast=True)
    return negative_zero, tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)


@jit
def fold(left, right):
    """One state of two, each (values `[M, D]`, maximum `[M]`, sum `[M]`), all fp32.

    Every rounding is spelt out, so that all kernels make the same bits of the same states.
    """
    left_values, left_max, left_sum = left
    right_values, right_max, right_sum = right
    new_max = tl.maximum(left_max, right_max)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    of_left = tl.exp2(left_max - shift)
    of_right = tl.exp2(right_max - shift)
    values = tl.fma(left_values, of_left[:, None], right_values * of_right[:, None])
    return values, new_max, tl.fma(left_sum, of_left, right_sum * of_right)
