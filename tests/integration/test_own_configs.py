"""train.py on what people bring: folders of images, and config files that define things."""

import pytest
import torch

pytestmark = pytest.mark.integration

OWN = {
    "__init__.py": "def configure(run): run.train.lr_warmup_epochs = 0\n",
    "common.py": "EPOCHS, SCALE = 1, 2.0\n",
    "data.py": """
import collections
import torch
import torchvision.transforms.v2  # as in any module of a person's own
from torch.utils.data import Dataset
from .common import SCALE

Sample = collections.namedtuple("Sample", "image label")

class Squares(Dataset):
    def __init__(self, num_samples, transform):
        self.num_samples, self.transform = num_samples, transform

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        assert torch.utils.data.get_worker_info() is not None
        image = torchvision.transforms.v2.functional.hflip(torch.full((4,), float(index)))
        return Sample(self.transform(image) * SCALE, index % 2)
""",
    "net-1.0.py": """
import fiddle as fdl
import torchvision.transforms.v2
from torch import nn
from .common import EPOCHS
from .data import Squares

def net():
    return nn.Linear(4, 2)

def splits():
    scale = torchvision.transforms.v2.Lambda(lambda image: image / 100)
    return {"train": Squares(128, scale), "test": Squares(16, scale)}

def configure(run):
    run.model, run.dataset = fdl.Partial(net), fdl.Partial(splits)
    run.train.num_epochs, run.train.top_k = EPOCHS, (1,)
    run.train.batch_size_per_rank, run.train.optimizer.lr = 32, 0.01
""",
}


def test_a_config_folder_is_a_package_in_the_loader_processes_too(runs, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for name, source in OWN.items():
        (folder / name).write_text(source)
    runs.succeed(configs=["--configs", str(folder / "net-1.0.py")], num_ranks=1)
    assert runs.result()["config"]["configs.model"] == "_config_own_net-1.0.net"


@pytest.mark.long
def test_cifar_trains_with_its_defaults_on_a_folder_of_images(runs, tmp_path):
    from PIL import Image

    noise = torch.randint(256, (160, 32, 32, 3), dtype=torch.uint8)
    for index, image in enumerate(noise.numpy()):
        folder = tmp_path / "images" / ("test" if index < 20 else "train") / f"class{index % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    config = ["--configs", "configs/cifar/resnet20.py"]
    settings = {"dataset__root": tmp_path / "images", "train__num_epochs": 1}
    runs.succeed(configs=config, num_ranks=1, **settings)
    assert runs.result()["steps"] == 1
