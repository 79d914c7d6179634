"""How close results must be that are not compared to the bit: one table, by the parameter's dtype.

float32, float64: a few roundings of a few steps, in another order. 16-bit: two units in the last
place.
"""

import torch

CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-9},
    torch.float16: {"rtol": 2**-10, "atol": 2**-12},
}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE[expected.dtype])
