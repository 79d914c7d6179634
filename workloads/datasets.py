"""Image datasets: functions that return {"train": ..., "test": ...} of (input, label) samples.

Where a folder is missing, the error says where it was looked for and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

from workloads.digits import load_digits, stratified_split
from workloads.vision import torchvision

transforms = torchvision.transforms.v2
Splits = dict[str, Dataset[Any]]

_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def digits(test_fraction: float = 0.2) -> Splits:
    """Scikit-learn's 1,797 images of handwritten digits, (1, 8, 8), scaled to mean 0 and std 1.

    They come with its wheel. The split is always the same; both parts have the same proportions of
    classes.
    """
    images, labels = load_digits()
    images = images.unsqueeze(1)
    images = (images - images.mean()) / images.std()
    train, test = stratified_split(labels, test_fraction)
    return {
        name: TensorDataset(images[rows], labels[rows])
        for name, rows in (("train", train), ("test", test))
    }


def cifar10(root: str, download: bool = True) -> Splits:
    """CIFAR-10 under `root`, as train/<class>/*.png and test/..., or in torchvision's own layout.

    Training images are padded by 4 pixels, then cropped to 32 x 32 and flipped at random.
    Args: download: if neither layout is there, let torchvision download its own.
    """
    normalize = _to_normalized(_CIFAR10_MEAN, _CIFAR10_STD)
    augment = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), normalize]
    )
    root = os.path.expanduser(root)
    if (Path(root) / "train").is_dir():
        return _image_folders(root, {"train": ("train", augment), "test": ("test", normalize)})
    try:
        return {
            "train": torchvision.datasets.CIFAR10(root, True, augment, download=download),
            "test": torchvision.datasets.CIFAR10(root, False, normalize, download=download),
        }
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"no CIFAR-10 under {Path(root).resolve()} ({error}{_damaged(root)}). Unpack it there "
            f"as train/<class>/* and test/<class>/*, or as cifar-10-batches-py/, or name another "
            f"folder with --configs.dataset.root"
        ) from error


def _damaged(root: str) -> str:
    """Return words for a message: the files of torchvision's layout that are damaged."""
    published = torchvision.datasets.CIFAR10
    files = [*published.train_list, *published.test_list]
    files.append((published.meta["filename"], published.meta["md5"]))
    paths = {Path(root) / published.base_folder / name: md5 for name, md5 in files}
    is_whole = torchvision.datasets.utils.check_integrity
    bad = [str(path) for path, md5 in paths.items() if path.is_file() and not is_whole(path, md5)]
    return f"; not as published: {', '.join(bad)}" if bad else ""


def imagenet(root: str, image_size: int = 224) -> Splits:
    """ImageNet under `root`, as train/<class>/* and val/<class>/*, with the usual crops."""
    normalize = _to_normalized(_IMAGENET_MEAN, _IMAGENET_STD)
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), normalize]
    )
    crop = transforms.Compose(
        [transforms.Resize(image_size * 8 // 7), transforms.CenterCrop(image_size), normalize]
    )
    return _image_folders(root, {"train": ("train", augment), "test": ("val", crop)})


def _to_normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[..., Any]:
    return transforms.Compose(
        [
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(mean, std),
        ]
    )


def _image_folders(root: str, splits: dict[str, tuple[str, Callable[..., Any]]]) -> Splits:
    found = {}
    for split, (folder, transform) in splits.items():
        path = Path(os.path.expanduser(root)) / folder
        if not path.is_dir():
            raise FileNotFoundError(
                f"there is no folder {path.resolve()}, which should hold a folder of images for "
                f"each class; name the data's root with --configs.dataset.root"
            )
        found[split] = torchvision.datasets.ImageFolder(path, transform)
    return found
