"""A linear of two tensor-train cores in one kernel: TTLinear2.

y[t, j_1, j_2] = Σ_(i_1, i_2, r) x[t, i_1, i_2] G_1[j_1, i_1, r] G_2[r, j_2, i_2] (+ bias), cores as the checkpoint
holds them. What lies between the two products stays on the chip: it is ``rank`` times as large as the activation.

Up to ``FEW`` tokens a program makes FJ1 by FJ2 outputs of one token: BI values of i_1 are the rows of the first
product, so that one token fills a Tensor Core; its result turns through shared memory. For more tokens the tokens are
the rows of both products, one pair for each i_1 and j_2: the first one's result is the second one's left factor, in the
registers that it is in. One kernel has both, because an engine picks a tactic for one size and keeps it.

The rank is padded to a power of two (``RP1``), i_2 to ``BK``; sizes are arguments. Parameters in the order of
TensorRT's ahead-of-time plugins: inputs, int32 numbers, outputs.
"""

import triton
import triton.language as tl


@triton.jit
def _few(
    x_ptr, c1_ptr, c2_ptr, bias_ptr, y_ptr, token, j1, j2, I1, I2, J1, J2, R1,
    RP1: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr, BJ1: tl.constexpr, BJ2: tl.constexpr,
):  # fmt: skip
    """BJ1 by BJ2 outputs of one token."""
    x_ptr += token * (I1 * I2)
    column = tl.arange(0, RP1 * BJ2)
    r, last = column // BJ2, j2 + column % BJ2
    c2_columns, c2_mask = (r * J2 + last) * I2, (r < R1) & (last < J2)
    first = j1 + tl.arange(0, BJ1)
    bond = tl.arange(0, BI * RP1)
    total = tl.zeros((BJ1, BJ2), tl.float32)
    for start in range(0, I1, BI):
        i1 = start + tl.arange(0, BI)
        s = tl.zeros((BI, RP1 * BJ2), tl.float32)
        for inner in tl.range(0, I2, BK, num_stages=2):
            i2 = inner + tl.arange(0, BK)
            x_mask = (i1 < I1)[:, None] & (i2 < I2)[None, :]
            x = tl.load(x_ptr + (i1 * I2)[:, None] + i2[None, :], mask=x_mask, other=0.0)
            mask = c2_mask[None, :] & (i2 < I2)[:, None]
            c2 = tl.load(c2_ptr + c2_columns[None, :] + i2[:, None], mask=mask, other=0.0)
            s = tl.dot(x, c2, s, input_precision="ieee")
        i, rank = start + bond // RP1, bond % RP1
        c1_mask = (first < J1)[:, None] & ((i < I1) & (rank < R1))[None, :]
        c1 = tl.load(c1_ptr + (first * (I1 * R1))[:, None] + (i * R1 + rank)[None, :], mask=c1_mask, other=0.0)
        turned = tl.reshape(s.to(x_ptr.dtype.element_ty), (BI * RP1, BJ2))
        total = tl.dot(c1, turned, total, input_precision="ieee")
    last = j2 + tl.arange(0, BJ2)
    feature = (first * J2)[:, None] + last[None, :]
    mask = (first < J1)[:, None] & (last < J2)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + feature, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * (J1 * J2) + feature, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _many(
    x_ptr, c1_ptr, c2_ptr, bias_ptr, y_ptr, tokens, j1, j2, M, I1, I2, J1, J2, R1,
    RP1: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BJ1: tl.constexpr, BJ2: tl.constexpr,
):  # fmt: skip
    """BJ1 by BJ2 (1, 2 or 4) outputs of BM tokens: one accumulator for each j_2."""
    token = tl.arange(0, BM)
    row_mask = tokens + token < M
    i2 = tl.arange(0, BK)
    r = tl.arange(0, RP1)
    first = j1 + tl.arange(0, BJ1)
    x_rows = x_ptr + tokens.to(tl.int64) * (I1 * I2) + (token * (I1 * I2))[:, None] + i2[None, :]
    x_mask = row_mask[:, None] & (i2 < I2)[None, :]
    c1_rows = c1_ptr + (first * (I1 * R1))[None, :] + r[:, None]
    c1_mask = (first < J1)[None, :] & (r < R1)[:, None]
    total0 = tl.zeros((BM, BJ1), tl.float32)
    if BJ2 > 1:
        total1 = tl.zeros((BM, BJ1), tl.float32)
    if BJ2 > 2:
        total2 = tl.zeros((BM, BJ1), tl.float32)
        total3 = tl.zeros((BM, BJ1), tl.float32)
    for i1 in range(0, I1):
        x = tl.load(x_rows + i1 * I2, mask=x_mask, other=0.0)
        c1 = tl.load(c1_rows + i1 * R1, mask=c1_mask, other=0.0)
        total0 = _chained(x, c2_ptr, c1, total0, j2, I2, J2, R1, RP1, BK)
        if BJ2 > 1:
            total1 = _chained(x, c2_ptr, c1, total1, j2 + 1, I2, J2, R1, RP1, BK)
        if BJ2 > 2:
            total2 = _chained(x, c2_ptr, c1, total2, j2 + 2, I2, J2, R1, RP1, BK)
            total3 = _chained(x, c2_ptr, c1, total3, j2 + 3, I2, J2, R1, RP1, BK)
    if BJ2 == 1:
        total = total0
    if BJ2 == 2:
        total = tl.reshape(tl.join(total0, total1), (BM, BJ1 * BJ2))
    if BJ2 == 4:
        total = tl.reshape(tl.join(tl.join(total0, total2), tl.join(total1, total3)), (BM, BJ1 * BJ2))
    column = tl.arange(0, BJ1 * BJ2)
    first, last = j1 + column // BJ2, j2 + column % BJ2
    feature = first * J2 + last
    mask = row_mask[:, None] & ((first < J1) & (last < J2))[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + feature, mask=(first < J1) & (last < J2), other=0.0)
        total += bias[None, :].to(tl.float32)
    y_ptr += tokens.to(tl.int64) * (J1 * J2)
    tl.store(y_ptr + (token * (J1 * J2))[:, None] + feature[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _chained(x, c2_ptr, c1, total, j2, I2, J2, R1, RP1: tl.constexpr, BK: tl.constexpr):
    """``total`` + (x G_2[:, j_2]) G_1[:, i_1], x (BM, BK) of one i_1 and c1 (RP1, BJ1)."""
    i2, r = tl.arange(0, BK), tl.arange(0, RP1)
    mask = (i2 < I2)[:, None] & ((r < R1) & (j2 < J2))[None, :]
    c2 = tl.load(c2_ptr + ((r * J2 + j2) * I2)[None, :] + i2[:, None], mask=mask, other=0.0)
    s = tl.dot(x, c2, input_precision="ieee").to(c1.dtype)
    return tl.dot(s, c1, total, input_precision="ieee")


@triton.jit
def tt2(
    x_ptr, c1_ptr, c2_ptr, bias_ptr,
    M, I1, I2, J1, J2, R1,
    y_ptr,
    RP1: tl.constexpr, BK: tl.constexpr, FEW: tl.constexpr, BI: tl.constexpr, FJ1: tl.constexpr, FJ2: tl.constexpr,
    BM: tl.constexpr, BJ1: tl.constexpr, BJ2: tl.constexpr,
):  # fmt: skip
    """Grid (tokens / BM, J1 / BJ1 · J2 / BJ2, z), z 1; with few tokens M times the turns that y needs for all tiles."""
    if M <= FEW:
        across = tl.cdiv(J2, FJ2)
        turns = tl.num_programs(2) // M
        block = tl.program_id(2) % turns * tl.num_programs(1) + tl.program_id(1)
        if block < tl.cdiv(J1, FJ1) * across:
            j1, j2 = block // across * FJ1, block % across * FJ2
            _few(x_ptr, c1_ptr, c2_ptr, bias_ptr, y_ptr, tl.program_id(2) // turns, j1, j2, I1, I2, J1, J2, R1,
                 RP1, BK, BI, FJ1, FJ2)  # fmt: skip
    else:
        across = tl.cdiv(J2, BJ2)
        j1, j2 = tl.program_id(1) // across * BJ1, tl.program_id(1) % across * BJ2
        _many(x_ptr, c1_ptr, c2_ptr, bias_ptr, y_ptr, tl.program_id(0) * BM, j1, j2, M, I1, I2, J1, J2, R1,
              RP1, BK, BM, BJ1, BJ2)  # fmt: skip
