from itertools import pairwise

import pytest

from dgc import Compression


def test_exponential_warmup_reaches_the_density_after_its_epochs():
    compression = Compression(density=0.001, density_warmup_epochs=5)
    densities = [compression.density_at(epoch) for epoch in range(7)]
    ratios = [later / earlier for earlier, later in pairwise(densities[:6])]
    assert densities[0] == pytest.approx(0.001 ** (1 / 6))
    assert ratios == pytest.approx([densities[0]] * 5)
    assert densities[5] == pytest.approx(0.001)
    assert densities[6] == 0.001


def test_listed_warmup_is_followed_to_the_letter():
    paper = [0.25, 0.063, 0.016, 0.004, 0.001]
    compression = Compression(density_warmup_epochs=5, density_warmup=paper)
    assert [compression.density_at(epoch) for epoch in range(6)] == [*paper, 0.001]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"density": 0}, "density is 0; allowed: above 0 and at most 1"),
        ({"density": 1.5}, "density is 1.5"),
        ({"density_warmup": [0.1]}, r"density_warmup is \[0.1\]; allowed: None, or 0 densities"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; allowed: None or above 0"),
        ({"value_dtype": "bfloat16"}, "value_dtype is 'bfloat16'; allowed: float32, float16"),
        ({"k_tolerance": (1.1, 1.3)}, "k_tolerance is"),
    ],
)
def test_impossible_values_are_refused_by_name(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Compression(**settings)
