"""A language model of your own text, in the folder data/text.

It has train.txt or train/*.txt, and likewise valid, test or both. Another folder is named with
--configs.dataset.root FOLDER. For text that does not fit into memory add configs/text/shards.py.
"""

import fiddle as fdl
from torch.optim.lr_scheduler import ReduceLROnPlateau

from configs.schema import Run
from optim import Adam
from workloads.tasks import LanguageModelling
from workloads.text import text_folder


def configure(run: fdl.Config[Run]) -> None:
    run.task = fdl.Partial(LanguageModelling)
    run.dataset = fdl.Partial(text_folder, root="data/text", bptt=35, max_words=None)
    run.data.num_workers_per_rank = 0

    run.train.num_epochs = 10
    run.train.batch_size_per_rank = 20
    run.train.eval_batch_size_per_rank = 10
    run.train.optimizer = fdl.Partial(Adam, lr=2e-3)
    run.train.clip_norm = 1.0
    run.train.scale_lr_by_workers = False
    run.train.lr_warmup_epochs = 0
    run.train.scheduler = fdl.Partial(ReduceLROnPlateau, factor=0.25, patience=0)
    run.train.best_metric = "perplexity/valid"
