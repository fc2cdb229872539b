"""A MixT linear, all windows in one kernel: MixTLinear2 … MixTLinear6, padded or not, weights (in, out) or (out, in).

y = Σ_k x (I_a ⊗ w_k ⊗ I_c) (+ bias). A tile is BM tokens by BF neighbouring features. Those are, in window k, BF / c
outputs of one block α beside all c trailing spectators γ; so the window is a product of (token, γ) rows by BF / c
columns, its result is rearranged on the chip and added to one accumulator. 1/N is in the weights.

Up to ``FEW`` tokens tiles are small, so that there are many; for more tokens they are large. One kernel has both,
because an engine picks a tactic for one size and keeps it. The features of a block α of the last window are a segment;
all other windows' blocks hold whole segments. Parameters in the order of TensorRT's ahead-of-time plugins: inputs,
int32 numbers, outputs.
"""

import triton
import triton.language as tl


@triton.jit
def _window(
    x_ptr, w_ptr, tokens, feature, M, IN, LEFT, ROWS, COLUMNS,
    C: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Features ``feature`` … of x (I_left ⊗ w ⊗ I_C) as (BM, BF) float32; w has COLUMNS inputs and ROWS outputs."""
    block = feature // (ROWS * C)
    begin = (feature - block * (ROWS * C)) // C
    if not TRANSPOSED:  # which the compiler cannot know: segments are multiples of ALIGN · C
        begin = tl.multiple_of(begin, ALIGN)
    output = begin + tl.arange(0, BF // C)
    token = tl.arange(0, BM)
    row_mask = (tokens + token < M) & (block < LEFT)
    first = block * (COLUMNS * C)
    x_ptr += tokens.to(tl.int64) * IN + first
    total = tl.zeros((BM * C, BF // C), tl.float32)
    for k0 in range(0, COLUMNS, BK):
        inside = k0 * C + tl.arange(0, BK * C)
        x_mask = row_mask[:, None] & ((inside < COLUMNS * C) & (first + inside < IN))[None, :]
        x = tl.load(x_ptr + (token * IN)[:, None] + inside[None, :], mask=x_mask, other=0.0)
        if C > 1:
            x = tl.reshape(tl.permute(tl.reshape(x, (BM, BK, C)), (0, 2, 1)), (BM * C, BK))
        k = k0 + tl.arange(0, BK)
        offsets = output[None, :] * COLUMNS + k[:, None] if TRANSPOSED else k[:, None] * ROWS + output[None, :]
        w = tl.load(w_ptr + offsets, mask=(k < COLUMNS)[:, None] & (output < ROWS)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    if C > 1:
        total = tl.permute(tl.reshape(total, (BM, C, BF // C)), (0, 2, 1))
    return tl.reshape(total, (BM, BF))


@triton.jit
def _tile(
    x_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr, w6_ptr, bias_ptr, y_ptr,
    tokens, block, start, M, IN, OUT,
    LEFT1, ROWS1, COLUMNS1, LEFT2, ROWS2, COLUMNS2, LEFT3, ROWS3, COLUMNS3,
    LEFT4, ROWS4, COLUMNS4, LEFT5, ROWS5, COLUMNS5, LEFT6, ROWS6, COLUMNS6,
    SEGMENT,
    C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, C4: tl.constexpr, C5: tl.constexpr, C6: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """BM tokens by the BF features from ``block`` of the segment that begins at ``start``."""
    f = start + block
    total = _window(x_ptr, w1_ptr, tokens, f, M, IN, LEFT1, ROWS1, COLUMNS1, C1, BM, BF, BK, TRANSPOSED, ALIGN)
    total += _window(x_ptr, w2_ptr, tokens, f, M, IN, LEFT2, ROWS2, COLUMNS2, C2, BM, BF, BK, TRANSPOSED, ALIGN)
    if w3_ptr is not None:
        total += _window(x_ptr, w3_ptr, tokens, f, M, IN, LEFT3, ROWS3, COLUMNS3, C3, BM, BF, BK, TRANSPOSED, ALIGN)
    if w4_ptr is not None:
        total += _window(x_ptr, w4_ptr, tokens, f, M, IN, LEFT4, ROWS4, COLUMNS4, C4, BM, BF, BK, TRANSPOSED, ALIGN)
    if w5_ptr is not None:
        total += _window(x_ptr, w5_ptr, tokens, f, M, IN, LEFT5, ROWS5, COLUMNS5, C5, BM, BF, BK, TRANSPOSED, ALIGN)
    if w6_ptr is not None:
        total += _window(x_ptr, w6_ptr, tokens, f, M, IN, LEFT6, ROWS6, COLUMNS6, C6, BM, BF, BK, TRANSPOSED, ALIGN)
    token = tl.arange(0, BM)
    inside = block + tl.arange(0, BF)
    features = start + inside
    column_mask = (inside < SEGMENT) & (features < OUT)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + features, mask=column_mask, other=0.0)
        total += bias[None, :].to(tl.float32)
    mask = (tokens + token < M)[:, None] & column_mask[None, :]
    y_ptr += tokens.to(tl.int64) * OUT
    tl.store(y_ptr + (token * OUT)[:, None] + features[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mixt(
    x_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr, w6_ptr, bias_ptr,
    M, IN, OUT,
    LEFT1, ROWS1, COLUMNS1, LEFT2, ROWS2, COLUMNS2, LEFT3, ROWS3, COLUMNS3,
    LEFT4, ROWS4, COLUMNS4, LEFT5, ROWS5, COLUMNS5, LEFT6, ROWS6, COLUMNS6,
    SEGMENT,
    y_ptr,
    C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, C4: tl.constexpr, C5: tl.constexpr, C6: tl.constexpr,
    FEW: tl.constexpr, FF: tl.constexpr, FK: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Windows that a linear does not have are None; grid (tokens / BM, segments · SEGMENT / BF, z), z 1 or BF / FF."""
    tokens = tl.program_id(0) * BM
    blocks = tl.cdiv(SEGMENT, BF)
    start, block = tl.program_id(1) // blocks * SEGMENT, tl.program_id(1) % blocks * BF
    if M <= FEW:
        block += tl.program_id(2) * FF
        if block < SEGMENT:
            _tile(x_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr, w6_ptr, bias_ptr, y_ptr, tokens, block, start,
                  M, IN, OUT, LEFT1, ROWS1, COLUMNS1, LEFT2, ROWS2, COLUMNS2, LEFT3, ROWS3, COLUMNS3,
                  LEFT4, ROWS4, COLUMNS4, LEFT5, ROWS5, COLUMNS5, LEFT6, ROWS6, COLUMNS6, SEGMENT,
                  C1, C2, C3, C4, C5, C6, FEW, FF, FK, TRANSPOSED, ALIGN)  # fmt: skip
    else:
        _tile(x_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr, w6_ptr, bias_ptr, y_ptr, tokens, block, start,
              M, IN, OUT, LEFT1, ROWS1, COLUMNS1, LEFT2, ROWS2, COLUMNS2, LEFT3, ROWS3, COLUMNS3,
              LEFT4, ROWS4, COLUMNS4, LEFT5, ROWS5, COLUMNS5, LEFT6, ROWS6, COLUMNS6, SEGMENT,
              C1, C2, C3, C4, C5, C6, BM, BF, BK, TRANSPOSED, ALIGN)  # fmt: skip
