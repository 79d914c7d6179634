import pytest
import torch

from workloads import datasets, models
from workloads.masked_text import masked_text_folder
from workloads.text_stream import text_shards


def test_residual_networks_have_the_papers_sizes():
    for make, num_layers, num_parameters in (
        (models.resnet20, 20, 269_722),
        (models.resnet110, 110, 1_727_962),
    ):
        model = make()
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(convolutions) + 1 == num_layers
        assert sum(p.numel() for p in model.parameters()) == num_parameters
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_shortcut_subsamples_and_pads_with_zeros():
    images = torch.arange(32.0).reshape(1, 2, 4, 4)
    out = models._PaddedShortcut(2)(images)
    assert torch.equal(out[0, 1:3], images[0, :, ::2, ::2])
    assert not out[0, [0, 3]].any()


def test_digits_are_split_alike_each_time_without_overlap():
    first, again = datasets.digits(), datasets.digits()
    assert (len(first["train"]), len(first["test"])) == (1437, 360)
    image, _ = first["test"][0]
    assert image.shape == (1, 8, 8)
    assert torch.equal(image, again["test"][0][0])
    every_class = {int(label) for _, label in first["test"]}
    assert every_class == set(range(10))
    train = {image.numpy().tobytes() for image, _ in first["train"]}
    assert sum(image.numpy().tobytes() in train for image, _ in first["test"]) == 0


@pytest.fixture
def image_tree(tmp_path):
    from PIL import Image

    for split in ("train", "test", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), (name == "cat" and "red") or "blue").save(
                tmp_path / split / name / "0.png"
            )
    return tmp_path


def test_images_are_read_from_folders(image_tree):
    for splits, size in ((datasets.cifar10(str(image_tree)), 32),
                         (datasets.imagenet(str(image_tree), 24), 24)):  # fmt: skip
        image, label = splits["train"][1]
        assert image.shape == (3, size, size)
        assert image.dtype == torch.float32
        assert label == 1


def test_a_missing_folder_is_an_error_that_says_where_and_what(tmp_path):
    with pytest.raises(FileNotFoundError, match="--configs.dataset.root"):
        datasets.imagenet(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="no CIFAR-10 under"):
        datasets.cifar10(str(tmp_path / "none"), download=False)
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    damaged.parent.mkdir()
    damaged.write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match=f"not as published: {damaged}\\)"):
        datasets.cifar10(str(tmp_path), download=False)


def test_the_home_folder_may_be_abbreviated(image_tree, monkeypatch):
    monkeypatch.setenv("HOME", str(image_tree))
    for split in ("train", "valid"):
        (image_tree / f"{split}.txt").write_text("a b c d e f g\n" * 12)
    (image_tree / "words").write_text("a\nb\n<unk>\n<eos>\n")
    assert len(datasets.cifar10("~")["train"]) == len(datasets.imagenet("~")["train"]) == 2
    assert len(masked_text_folder("~", sequence_length=4)["valid"]) == 24
    shards = text_shards(
        "~", "train.txt", None, "valid.txt", bptt=2, vocabulary="~/words", counts="~/counts"
    )
    assert len(shards["train"]) and (image_tree / "counts").is_file()
