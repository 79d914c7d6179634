"""Scikit-learn's handwritten digits without importing scikit-learn, which takes a rank seconds.

The file is in its wheel. The split is to the sample that of its
`train_test_split(..., stratify=labels, random_state=0)`.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the images, (1797, 8, 8) of 0 to 16, and their labels."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed; run launch/setup.sh"
        )
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(path, delimiter=",")
    images = torch.from_numpy(rows[:, :-1].reshape(-1, 8, 8)).float()
    return images, torch.from_numpy(rows[:, -1].astype(np.int64))


def stratified_split(labels: Tensor, test_fraction: float) -> tuple[Tensor, Tensor]:
    """Return the samples for training and those for testing, of each class as large a share."""
    classes, num_test = labels.numpy(), math.ceil(len(labels) * test_fraction)
    random = np.random.RandomState(0)
    sizes = np.bincount(classes)
    train_sizes = _in_proportion(sizes, len(classes) - num_test, random)
    test_sizes = _in_proportion(sizes - train_sizes, num_test, random)
    members = np.split(np.argsort(classes, kind="stable"), np.cumsum(sizes)[:-1])
    train, test = [], []
    for samples, for_train, for_test in zip(members, train_sizes, test_sizes, strict=True):
        shuffled = samples[random.permutation(len(samples))]
        train.extend(shuffled[:for_train])
        test.extend(shuffled[for_train : for_train + for_test])
    return torch.from_numpy(random.permutation(train)), torch.from_numpy(random.permutation(test))


def _in_proportion(sizes: np.ndarray, num: int, random: np.random.RandomState) -> np.ndarray:
    """Divide `num` among classes of these sizes; what is over goes to the largest fractions."""
    exact = sizes / sizes.sum() * num
    given = np.floor(exact)
    over, fractions = int(num - given.sum()), exact - given
    for fraction in np.unique(fractions)[::-1]:
        if over == 0:
            break
        alike = np.flatnonzero(fractions == fraction)
        chosen = min(len(alike), over)
        given[random.choice(alike, size=chosen, replace=False)] += 1
        over -= chosen
    return given.astype(int)
