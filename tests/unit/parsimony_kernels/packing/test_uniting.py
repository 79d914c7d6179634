"""Joined messages, unpacked and added up together by the emulated GPU, as one by one."""

import itertools

import pytest
import torch

from parsimony_kernels.packing import device as device_packing
from parsimony_kernels.packing import ops as packing
from parsimony_kernels.packing.message import INDEX_CODINGS, VALUE_DTYPES, MessageError
from parsimony_kernels.packing.uniting import start_uniting
from tests.emulation.emulator import BACKWARD, FORWARD
from tests.unit.parsimony_kernels.cases import CPU, Guarded
from tests.unit.parsimony_kernels.packing.test_damaged import damaged
from tests.unit.parsimony_kernels.plain_packing import (
    FLAGS,
    Case,
    bits_of,
    entries,
    plain_message,
    to_tensor,
)

COUNTS = (0, 1, 33, 700, 33, 0)  # of messages that are joined
CODINGS = list(itertools.product(INDEX_CODINGS, VALUE_DTYPES))
OFFSETS = (0, 17, 17, 4000)  # one part is empty


@pytest.fixture
def on_device(emulated, monkeypatch):
    def use(order=FORWARD):
        monkeypatch.setattr(packing, "implementing_module", lambda *_: device_packing)
        return emulated(order)

    return use


def united(case, joined, num_messages, num_groups):
    uniting = start_uniting(
        joined, num_messages, num_groups, offsets=OFFSETS, num_flags=len(FLAGS), **case.format
    )
    return uniting.read(uniting.facts)


def messages_of(index_coding, value_dtype, dim):
    cases = [Case(count, 5000, index_coding, value_dtype, dim) for count in COUNTS]
    flags = [FLAGS[n:] + FLAGS[:n] for n in range(len(cases))]
    return cases, flags, [
        packing.pack(*entries(case, seed), **case.format, flags=of_message)
        for seed, (case, of_message) in enumerate(zip(cases, flags, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, 7])
@pytest.mark.parametrize(("index_coding", "value_dtype"), CODINGS)
def test_joined_messages_are_added_up_as_one_by_one(on_device, index_coding, value_dtype, order):
    dim = 3 if value_dtype == "mxfp8" else 1
    cases, flags, texts = messages_of(index_coding, value_dtype, dim)
    on_device(order)
    for num_groups in (1, 2, 6):
        each = len(texts) // num_groups
        joined = Guarded(CPU).copy(torch.cat(texts))  # at an odd address, too
        groups = united(cases[0], joined, len(texts), num_groups)
        for number, group in enumerate(groups):
            mine = slice(number * each, (number + 1) * each)
            assert group.flags == flags[mine]
            found = [
                packing.unpack(t, num_flags=len(FLAGS), **cases[0].format) for t in texts[mine]
            ]
            positions, sums = packing.merge([f[0] for f in found], [f[1] for f in found], dim)
            offsets = torch.tensor(OFFSETS).repeat_interleave(
                torch.tensor([indices.numel() for indices, _ in group.parts])
            )
            assert torch.equal(torch.cat([p for p, _ in group.parts]) + offsets, positions)
            assert torch.equal(bits_of(torch.cat([v for _, v in group.parts])), bits_of(sums))
            for (indices, _), (begin, end) in zip(
                group.parts, itertools.pairwise((*OFFSETS, 5000)), strict=True
            ):
                assert ((indices >= 0) & (indices < end - begin)).all()


@pytest.mark.parametrize("index_coding", INDEX_CODINGS)
def test_one_damaged_message_is_found_among_others(on_device, index_coding):
    """Whatever it is; and nothing outside of the messages is read, which AddressSanitizer sees."""
    cases, _, texts = messages_of(index_coding, "mxfp8", 1)
    on_device()
    other = plain_message(cases[1], *entries(cases[1]))
    for seed in range(60):
        bad = to_tensor(damaged(bytes(texts[3].tolist()), other, seed))
        place = (0, 3, 6)[seed % 3]
        joined = torch.cat([*texts[:place], bad, *texts[place:]])
        if joined.numel() % 4:
            with pytest.raises(MessageError):
                united(cases[0], joined, 7, 7)
        elif bad.numel() != len(other) or seed % 7 != 5:  # the other is a message, too
            assert united(cases[0], joined, 7, 7) is None
