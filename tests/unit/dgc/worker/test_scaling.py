import math

import pytest
import torch
from torch.amp import GradScaler

from dgc import Compression
from dgc.worker.scaling import Scaling, scaled


@pytest.fixture(params=[torch.float32, torch.float64])
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def make(clip_norm=None, scaler=None):
    return Scaling(Compression(clip_norm=clip_norm), scaler, world_size=4, num_tensors=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_have_the_precision_of_gradients_whatever_the_default(dtype, default_dtype):
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.tensor([3.0, 4.0], dtype=dtype)
    scaler = GradScaler("cpu", init_scale=4.0)
    (unscale,) = factor = make(scaler=scaler).of_tensor(grad, 1)
    assert factor.dtype == wanted and unscale == 0.25
    for factor in (make(0.1).of_tensor(grad, 1), make(0.1).of_all([grad, grad[:0]])):
        assert factor.dtype == wanted
        assert factor.item() == pytest.approx(0.1 / math.sqrt(4) / 5, rel=1e-7)
    mixed = make(0.1).of_all([grad, torch.zeros(1, dtype=torch.float32)])
    assert mixed.dtype == wanted  # float64 if any is
    assert scaled(grad, None).dtype == wanted
    assert make().of_tensor(grad, 1) is None


def test_a_norm_beyond_float32_is_clipped_in_float64():
    grad = torch.tensor([1e100, 0.0], dtype=torch.float64)
    assert (grad * make(1.0).of_tensor(grad, 1)).tolist() == pytest.approx([0.5, 0.0])
