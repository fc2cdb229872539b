"""Linears in tensor-train form, one kernel for a whole linear: TTLinear2, TTLinear3 and TTLinear4.

y[t, j_1 … j_n] = Σ x[t, i_1 … i_n] Π_k G_k[r_(k-1), j_k, i_k, r_k] (+ bias), r_0 = r_n = 1, cores as the checkpoint
holds them. The chain runs from the last core to the first, as in graphs/ops/TTLinear*.onnxtxt, and what lies between
two products stays on the chip: it is ``rank`` times as large as the activation itself.

A program makes ``BM`` tokens by ``BJ_1`` by … by ``BJ_n`` outputs. It walks the input modes from i_1 inwards; the two
innermost make a product of (tokens · i_(n-1)) by i_n rows and columns, so that one token is enough to fill a Tensor
Core. Ranks are padded to powers of two (``RP_k``), sizes are arguments: one compiled kernel serves every shape.

Parameters in the order of TensorRT's ahead-of-time plugins: inputs, int32 numbers, outputs.
"""

import triton
import triton.language as tl


@triton.jit
def _innermost(
    x_ptr, c_ptr, tokens, M, IN, lead, start, I_prev, I_last, J_last, R, j,
    BM: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Σ_(i_n) x[t, lead, i_(n-1), i_n] G_n[r, j_n, i_n] as (BI · RP, BM · BJ), for BI values of i_(n-1)."""
    row = tl.arange(0, BM * BI)
    i_prev = start + row % BI
    token = tokens + row // BI
    x_rows = token.to(tl.int64) * IN + (lead * I_prev + i_prev) * I_last
    row_mask = (token < M) & (i_prev < I_prev)
    column = tl.arange(0, RP * BJ)
    r = column // BJ
    j_last = j + column % BJ
    c_columns = (r * J_last + j_last) * I_last
    column_mask = (r < R) & (j_last < J_last)
    total = tl.zeros((BM * BI, RP * BJ), tl.float32)
    for k0 in range(0, I_last, BK):
        k = k0 + tl.arange(0, BK)
        inside = k < I_last
        x = tl.load(x_ptr + x_rows[:, None] + k[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        c = tl.load(c_ptr + c_columns[None, :] + k[:, None], mask=column_mask[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x, c, total, input_precision="ieee")
    split = tl.reshape(total.to(x_ptr.dtype.element_ty), (BM, BI, RP, BJ))
    return tl.reshape(tl.permute(split, (1, 2, 0, 3)), (BI * RP, BM * BJ))


@triton.jit
def _core(
    c_ptr, i, I_k, R, J, R_before, j,
    BI: tl.constexpr, RP: tl.constexpr, BJ: tl.constexpr, RP_BEFORE: tl.constexpr,
):  # fmt: skip
    """G[r_(k-1), j_k, i_k, r_k] as the left factor (RP_BEFORE · BJ, BI · RP), for BI values of i_k from ``i``."""
    row = tl.arange(0, RP_BEFORE * BJ)
    r_before = row // BJ
    j_k = j + row % BJ
    column = tl.arange(0, BI * RP)
    i_k = i + column // RP
    r = column % RP
    mask = ((r_before < R_before) & (j_k < J))[:, None] & ((i_k < I_k) & (r < R))[None, :]
    offsets = ((r_before * J + j_k) * (I_k * R))[:, None] + (i_k * R + r)[None, :]
    return tl.load(c_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _finish(y_ptr, bias_ptr, total, rows, row_mask, columns, features, column_mask):
    """Add the bias, round, store."""
    mask = row_mask[:, None] & column_mask[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows[:, None] + features[None, :], mask=mask, other=0.0)
        total += bias.to(tl.float32)
    tl.store(y_ptr + columns[None, :] + rows[:, None], total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tt2(
    x_ptr, c1_ptr, c2_ptr, bias_ptr,
    M, I1, I2, J1, J2, R1,
    y_ptr,
    BM: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, BJ1: tl.constexpr, BJ2: tl.constexpr, RP1: tl.constexpr,
):  # fmt: skip
    """Two cores; grid (tokens / BM, J1 / BJ1, J2 / BJ2)."""
    tokens = tl.program_id(0) * BM
    j1 = tl.program_id(1) * BJ1
    j2 = tl.program_id(2) * BJ2
    total = tl.zeros((BJ1, BM * BJ2), tl.float32)
    for i1 in range(0, I1, BI):
        s = _innermost(x_ptr, c2_ptr, tokens, M, I1 * I2, 0, i1, I1, I2, J2, R1, j2, BM, BI, BK, BJ2, RP1)
        c = _core(c1_ptr, i1, I1, R1, J1, 1, j1, BI, RP1, BJ1, 1)
        total = tl.dot(c, s, total, input_precision="ieee")
    row = j1 + tl.arange(0, BJ1)
    column = tl.arange(0, BM * BJ2)
    token = tokens + column // BJ2
    last = j2 + column % BJ2
    target = token.to(tl.int64) * (J1 * J2) + last
    _finish(y_ptr, bias_ptr, total, row * J2, row < J1, target, last, (token < M) & (last < J2))


@triton.jit
def tt3(
    x_ptr, c1_ptr, c2_ptr, c3_ptr, bias_ptr,
    M, I1, I2, I3, J1, J2, J3, R1, R2,
    y_ptr,
    BM: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
    BJ1: tl.constexpr, BJ2: tl.constexpr, BJ3: tl.constexpr, RP1: tl.constexpr, RP2: tl.constexpr,
):  # fmt: skip
    """Three cores; grid (tokens / BM, J1 / BJ1, (J2 / BJ2) · (J3 / BJ3))."""
    tokens = tl.program_id(0) * BM
    j1 = tl.program_id(1) * BJ1
    blocks = tl.cdiv(J3, BJ3)
    j2 = tl.program_id(2) // blocks * BJ2
    j3 = tl.program_id(2) % blocks * BJ3
    features = I1 * I2 * I3
    total = tl.zeros((BJ1, BJ2 * BM * BJ3), tl.float32)
    for i1 in range(0, I1):
        s2 = tl.zeros((RP1 * BJ2, BM * BJ3), tl.float32)
        for i2 in range(0, I2, BI):
            s = _innermost(x_ptr, c3_ptr, tokens, M, features, i1, i2, I2, I3, J3, R2, j3, BM, BI, BK, BJ3, RP2)
            c2 = _core(c2_ptr, i2, I2, R2, J2, R1, j2, BI, RP2, BJ2, RP1)
            s2 = tl.dot(c2, s, s2, input_precision="ieee")
        c1 = _core(c1_ptr, i1, I1, R1, J1, 1, j1, 1, RP1, BJ1, 1)
        flat = tl.reshape(s2.to(x_ptr.dtype.element_ty), (RP1, BJ2 * BM * BJ3))
        total = tl.dot(c1, flat, total, input_precision="ieee")
    row = j1 + tl.arange(0, BJ1)
    column = tl.arange(0, BJ2 * BM * BJ3)
    token = tokens + column // BJ3 % BM
    middle = j2 + column // (BM * BJ3)
    last = j3 + column % BJ3
    feature = middle * J3 + last
    target = token.to(tl.int64) * (J1 * J2 * J3) + feature
    mask = (token < M) & (middle < J2) & (last < J3)
    _finish(y_ptr, bias_ptr, total, row * (J2 * J3), row < J1, target, feature, mask)


@triton.jit
def tt4(
    x_ptr, c1_ptr, c2_ptr, c3_ptr, c4_ptr, bias_ptr,
    M, I1, I2, I3, I4, J1, J2, J3, J4, R1, R2, R3,
    y_ptr,
    BM: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
    BJ1: tl.constexpr, BJ2: tl.constexpr, BJ3: tl.constexpr, BJ4: tl.constexpr,
    RP1: tl.constexpr, RP2: tl.constexpr, RP3: tl.constexpr,
):  # fmt: skip
    """Four cores; grid (tokens / BM, J1 / BJ1, (J2 / BJ2) · (J3 / BJ3) · (J4 / BJ4))."""
    tokens = tl.program_id(0) * BM
    j1 = tl.program_id(1) * BJ1
    blocks4 = tl.cdiv(J4, BJ4)
    blocks3 = tl.cdiv(J3, BJ3)
    j2 = tl.program_id(2) // (blocks3 * blocks4) * BJ2
    j3 = tl.program_id(2) // blocks4 % blocks3 * BJ3
    j4 = tl.program_id(2) % blocks4 * BJ4
    features = I1 * I2 * I3 * I4
    total = tl.zeros((BJ1, BJ2 * BJ3 * BM * BJ4), tl.float32)
    for i1 in range(0, I1):
        s2 = tl.zeros((RP1 * BJ2, BJ3 * BM * BJ4), tl.float32)
        for i2 in range(0, I2):
            s3 = tl.zeros((RP2 * BJ3, BM * BJ4), tl.float32)
            lead = i1 * I2 + i2
            for i3 in range(0, I3, BI):
                s = _innermost(x_ptr, c4_ptr, tokens, M, features, lead, i3, I3, I4, J4, R3, j4, BM, BI, BK, BJ4, RP3)
                c3 = _core(c3_ptr, i3, I3, R3, J3, R2, j3, BI, RP3, BJ3, RP2)
                s3 = tl.dot(c3, s, s3, input_precision="ieee")
            c2 = _core(c2_ptr, i2, I2, R2, J2, R1, j2, 1, RP2, BJ2, RP1)
            flat3 = tl.reshape(s3.to(x_ptr.dtype.element_ty), (RP2, BJ3 * BM * BJ4))
            s2 = tl.dot(c2, flat3, s2, input_precision="ieee")
        c1 = _core(c1_ptr, i1, I1, R1, J1, 1, j1, 1, RP1, BJ1, 1)
        flat2 = tl.reshape(s2.to(x_ptr.dtype.element_ty), (RP1, BJ2 * BJ3 * BM * BJ4))
        total = tl.dot(c1, flat2, total, input_precision="ieee")
    row = j1 + tl.arange(0, BJ1)
    column = tl.arange(0, BJ2 * BJ3 * BM * BJ4)
    token = tokens + column // BJ4 % BM
    second = j2 + column // (BJ3 * BM * BJ4)
    third = j3 + column // (BM * BJ4) % BJ3
    last = j4 + column % BJ4
    feature = (second * J3 + third) * J4 + last
    target = token.to(tl.int64) * (J1 * J2 * J3 * J4) + feature
    mask = (token < M) & (second < J2) & (third < J3) & (last < J4)
    _finish(y_ptr, bias_ptr, total, row * (J2 * J3 * J4), row < J1, target, feature, mask)
