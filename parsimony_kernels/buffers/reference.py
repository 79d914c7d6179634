"""The pass over buffers in plain torch: the specification, and the implementation for any device.

Tensors as large as the gradient come and go here. ops.py has checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.buffers.operands import (
    BIN_SHIFT,
    BINS,
    BLOCK,
    LEVELS,
    MIN_SCALE,
    VELOCITY_KEY,
    Blocks,
    Buffer,
    Found,
    Pass,
    Put,
    arithmetic_dtype,
)
from parsimony_kernels.runtime.operands import state_dtype
from parsimony_kernels.step.reference_sketch import mix


def random_bits(indices: Tensor, key: int) -> Tensor:
    """Return 32 random bits for each element, as int64."""
    halves = (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF)
    low, high = (torch.tensor(half, dtype=torch.int64, device="cpu") for half in halves)
    return mix((indices & 0xFFFFFFFF) ^ int(mix(low ^ mix(high))))


def round_bfloat16(values: Tensor, indices: Tensor, key: int) -> Tensor:
    """Round float32 to one of the two bfloat16 neighbours, towards 0 where the other is infinite.

    The lower 16 bits, as a fraction of the step, are the odds of the one away from 0.
    """
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    away = (bits + (random_bits(indices, key) & 0xFFFF)) >> 16
    down = bits >> 16
    chosen = torch.where((away & 0x7F80) == 0x7F80, down, away)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    chosen = torch.where(nan, down | 0x40, chosen)
    return chosen.to(torch.uint16).view(torch.bfloat16)


def round_codes(values: Tensor, scales: Tensor, indices: Tensor, key: int) -> Tensor:
    """Round values / scales to one of the two neighbouring integers, within -127..127.

    A value that is an integer times its scale, to the rounding of float32, becomes that integer
    whatever the key: the odds are drawn from 15 bits, and never as close to 0 or 1 as 2^-16.
    """
    random = (random_bits(indices, key) >> 17).float() * 2.0**-15 + 2.0**-16
    return (values / scales + random).floor().clamp(-LEVELS, LEVELS).to(torch.int8)


def put(puts: Sequence[Put], positions_K: Tensor, values_K: Tensor | None) -> None:
    if values_K is None:
        values_K = torch.zeros_like(positions_K, dtype=torch.float32)
    counts = [each.count for each in puts]
    parts = zip(puts, positions_K.split(counts), values_K.split(counts), strict=True)
    for (buffer, _, first, key), positions, values in parts:
        _put(buffer, positions - first, values, key)


def _put(buffer: Buffer, indices_K: Tensor, values_K: Tensor, key: int) -> None:
    if isinstance(buffer, Blocks):
        scales_K = buffer.scales[indices_K // BLOCK]
        buffer.codes[indices_K] = round_codes(values_K, scales_K, indices_K, key)
    elif buffer.dtype == torch.bfloat16:
        buffer[indices_K] = round_bfloat16(values_K.float(), indices_K, key)
    else:
        buffer[indices_K] = values_K.to(buffer.dtype)


def decode(buffer: Buffer) -> Tensor:
    """Return all values (N,) float32, or float64 as stored; of such a buffer, the buffer itself."""
    if not isinstance(buffer, Blocks):
        return buffer.float() if buffer.dtype == torch.bfloat16 else buffer
    return buffer.codes.float() * _spread(buffer.scales, buffer.codes.numel())


def _spread(scales: Tensor, n: int) -> Tensor:
    return scales.repeat_interleave(BLOCK)[:n]


def _store(values: Tensor, buffer: Buffer, key: int) -> None:
    if isinstance(buffer, Tensor) and buffer.dtype == values.dtype:
        buffer.copy_(values)
        return
    n, values = values.numel(), values.float()
    indices = torch.arange(n, dtype=torch.int64, device=values.device)
    if isinstance(buffer, Blocks):
        padded = values.new_zeros(buffer.scales.numel() * BLOCK)
        padded[:n] = values.abs()
        largest = padded.view(-1, BLOCK).amax(1)
        # On a GPU torch divides by a number as it multiplies by its reciprocal, not so by tensors.
        scales = largest / largest.new_tensor(LEVELS)
        buffer.scales.copy_(scales.clamp_min(MIN_SCALE))
        buffer.codes.copy_(round_codes(values, _spread(buffer.scales, n), indices, key))
    else:
        buffer.copy_(round_bfloat16(values, indices, key))


def accumulate(passes: Sequence[Pass]) -> tuple[list[Found], Tensor]:
    founds = [_accumulate(given) if given.numel else _nothing(given) for given in passes]
    for given, found in zip(passes, founds, strict=True):
        found.indices += given.first
        found.first = given.first
    report = torch.cat([found.report for found in founds])
    reports = report.split([found.report.numel() for found in founds])
    for found, part in zip(founds, reports, strict=True):
        found.report = part
    return founds, report


def _nothing(given: Pass) -> Found:
    size = 2 if given.selection is None else 2 + BINS
    report = torch.zeros(size, dtype=torch.int32, device=given.device)
    indices = torch.zeros(0, dtype=torch.int64, device=given.device)
    values = indices.to(arithmetic_dtype(given))
    return Found(report, indices, values, values if given.lists_velocities else None)


def _accumulate(given: Pass) -> Found:
    residual, velocity = given.residual, given.velocity
    if given.grad_N is None:
        u = None if velocity is None else decode(velocity)
        v = residual + u if given.lags else decode(residual)
        found = _find(_largest(v.new_zeros(1)), v, u, given)
        _mask(found, None if given.lags else residual, velocity)
        return found
    x = given.grad_N.to(state_dtype(given.grad_N.dtype))
    if given.scale is not None:
        x = x * given.scale
    if given.lags:
        return _accumulate_lagging(x, given)
    largest = _largest(x)  # now: the residual may take the gradient's memory
    u_beta, u_gain, v_from_u, v_gain = given.correction.scalars(x.dtype)
    change, u = x * v_gain, None
    if velocity is not None:
        u = _before(given.old_velocity, x) * u_beta + x * u_gain
        change = u * v_from_u + change
        _store(u, velocity, given.key ^ VELOCITY_KEY)
    v = _before(given.old_residual, x) + change
    _store(v, residual, given.key)
    found = _find(largest, v, u, given)
    _mask(found, residual, velocity)
    return found


def _accumulate_lagging(x: Tensor, given: Pass) -> Found:
    old_u = given.old_velocity
    u_beta, u_gain, _, _ = given.correction.scalars(x.dtype)
    u = old_u * u_beta + x * u_gain
    old_v = given.residual + old_u if given.lagged else given.residual
    found = _find(_largest(x), old_v + u, u, given)
    given.residual.copy_(old_v)
    given.velocity.copy_(u)
    given.velocity[found.indices] = 0
    return found


def _before(old: Buffer | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if old is None else decode(old).to(x.dtype)


def _magnitude_bits(x: Tensor) -> Tensor:
    """Return |x|, in float32, as integers, which order as the magnitudes do; infinity and NaN are
    above all."""
    return x.float().contiguous().view(torch.int32) & 0x7FFFFFFF


def _largest(x: Tensor) -> Tensor:
    """Return the bits of the largest magnitude, (1,)."""
    return _magnitude_bits(x).amax().view(1)


def _find(largest: Tensor, v: Tensor, u: Tensor | None, given: Pass) -> Found:
    selection = given.selection
    if selection is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=v.device)
        return Found(torch.cat([largest, largest.new_zeros(1)]), nothing, v.new_zeros(0), None)
    is_above = (v.abs() >= v.new_tensor(selection.limit)) & (v != 0)
    indices = is_above.nonzero().view(-1)
    blocks = torch.arange(v.numel(), dtype=torch.int64, device=v.device) // BLOCK
    sampled = v[blocks % selection.sample_every == selection.sample_first]
    bins = (_magnitude_bits(sampled) >> BIN_SHIFT).bincount(minlength=BINS)
    count = largest.new_tensor([indices.numel()])
    indices = indices[: selection.capacity]
    velocities = u[indices] if given.lists_velocities else None
    return Found(torch.cat([largest, count, bins.int()]), indices, v[indices], velocities)


def _mask(found: Found, residual: Buffer | None, velocity: Buffer | None) -> None:
    """Write zeros where entries were taken out; scales stay, so that these can be put back."""
    for buffer, taken in ((residual, found.values), (velocity, found.velocities)):
        if taken is not None and buffer is not None:
            values = buffer.codes if isinstance(buffer, Blocks) else buffer
            values[found.indices] = 0
