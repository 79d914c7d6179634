"""The digits are scikit-learn's, and so is their split, without importing it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn import datasets, model_selection

from workloads.digits import load_digits, stratified_split


def test_images_and_labels_are_those_of_scikit_learn():
    images, labels = load_digits()
    bunch = datasets.load_digits()
    assert torch.equal(images, torch.tensor(bunch.images, dtype=torch.float32))
    assert torch.equal(labels, torch.tensor(bunch.target))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.2, 0.37, 0.5, 0.9])
def test_the_split_is_that_of_scikit_learn(fraction):
    _, labels = load_digits()
    expected = model_selection.train_test_split(
        torch.arange(len(labels)), test_size=fraction, stratify=labels, random_state=0
    )
    got = stratified_split(labels, fraction)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def test_a_rank_that_trains_on_them_does_not_import_scikit_learn():
    code = (
        "import sys; from workloads.datasets import digits\n"
        "assert len(digits()['train']) == 1437\n"
        "assert not {'sklearn', 'scipy'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
