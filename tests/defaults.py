"""What a program may have set for all of torch: no result of ours depends on it."""

import contextlib

import torch

DEFAULTS = ("float64", "float16", "meta")


@contextlib.contextmanager
def torch_defaults(name):
    """Let torch's default dtype, or device, be another within the block."""
    before = torch.get_default_dtype()
    try:
        if name == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def assert_same(mine, theirs):
    """Equal to the bit, nested in lists and dictionaries, with equal dtypes and devices."""
    assert type(mine) is type(theirs)
    if isinstance(mine, torch.Tensor):
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    elif isinstance(mine, dict):
        assert_same([*mine.items()], [*theirs.items()])
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(theirs)
        for pair in zip(mine, theirs, strict=True):
            assert_same(*pair)
    else:
        assert mine == theirs
