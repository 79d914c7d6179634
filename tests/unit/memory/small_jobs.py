"""Small jobs of several kinds, and how real steps of them are measured."""

import torch
import torch.nn.functional as F
from torch import nn

from memory import Job, held_by, measure
from memory.job import this_run
from memory.rehearsal import Rehearsal
from memory.tracker import Tracker

NUM_WORDS = 1500


def adam(groups):
    return torch.optim.Adam(groups, lr=1e-3)


def classify(model, batch, carried):
    return F.cross_entropy(model(batch[0]), batch[1]), torch.zeros(1, dtype=torch.float64), None


def predict_words(model, batch, carried):
    """Words (T, B) and targets; what is carried on is a recurrent network's state."""
    loss, carried = model(*batch, carried)
    return loss, torch.zeros(1, dtype=torch.float64), carried


def perceptron():
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
                         nn.Linear(512, 10))  # fmt: skip


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, NUM_WORDS)

    def forward(self, words, targets, carried):
        logits = self.head(self.layers(self.embedding(words)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), None


class Recurrent(nn.Module):
    """Rows of an embedding, an LSTM, and a softmax whose shapes depend on the targets."""

    def __init__(self, sparse=True):
        super().__init__()
        self.embedding = nn.Embedding(4 * NUM_WORDS, 64, sparse=sparse)
        self.lstm = nn.LSTM(64, 128)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(128, NUM_WORDS, [200, 600])

    def forward(self, words, targets, carried):
        outputs, carried = self.lstm(self.embedding(words), carried)
        loss = self.softmax(outputs.flatten(0, 1), targets.flatten()).loss
        return loss, tuple(part.detach() for part in carried)


def vectors(num):
    return torch.randn(num, 64), torch.arange(num) % 10


def images(num):
    return torch.randn(num, 3, 32, 32), torch.arange(num) % 10


def texts(num):
    generator = torch.Generator().manual_seed(num)
    words = torch.rand(20, num, generator=generator).pow(3).mul(NUM_WORDS).long()
    return words, words.flip(0)


MODELS = {
    "perceptron": (perceptron, classify, vectors),
    "convolutional": (convolutional, classify, images),
    "transformer": (Transformer, predict_words, texts),
    "recurrent": (Recurrent, predict_words, texts),
}


def job_of(name, batch_size=16, **settings):
    make_model, task, make_batch = MODELS[name]
    settings = {"optimizer": adam, **settings}
    return Job(make_model=make_model, task=task, make_batch=make_batch, batch_size=batch_size,
               **settings)  # fmt: skip


class Silent(Tracker):
    """Follows nothing, so that real steps run as they would without one."""

    def label(self, kind, tensors):
        pass

    def mark(self):
        pass

    def label_new(self, kind):
        pass


def measured_peak(job, contender=None):
    """What torch's allocator gave out in real steps, once thresholds have settled."""
    torch.manual_seed(0)
    run = Rehearsal(job, contender or this_run(job), Silent())
    makers = [lambda: job.make_batch(job.batch_size)] * job.micro_batches
    for _ in range(3):
        run.step(makers)
    return measure(
        lambda: run.step(makers),
        device=job.device,
        held=lambda: held_by(run.model, run.optimizer, run._averaged),
    ).peak_bytes
