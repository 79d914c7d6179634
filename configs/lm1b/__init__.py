"""The One Billion Word benchmark, streamed from its published folder of shards.

An epoch takes hours, so checkpoints are written within epochs too.
"""

import fiddle as fdl

from configs.schema import Run
from optim import Adam
from workloads.tasks import LanguageModelling
from workloads.text_stream import lm1b


def configure(run: fdl.Config[Run]) -> None:
    run.task = fdl.Partial(LanguageModelling)
    run.dataset = fdl.Partial(lm1b, root="data/lm1b", bptt=20)
    run.data.num_workers_per_rank = 0  # words are read as they are needed

    run.train.num_epochs = 5
    run.train.batch_size_per_rank = 128
    run.train.eval_batch_size_per_rank = 32
    run.train.optimizer = fdl.Partial(Adam, lr=1e-3, betas=(0.0, 0.999))
    run.train.clip_norm = 1.0
    run.train.scale_lr_by_workers = False
    run.train.lr_warmup_epochs = 0
    run.train.best_metric = "perplexity/test"
    run.checkpoint.every_steps = 2000
