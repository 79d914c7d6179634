"""WikiText-2 by words, trained as Spring et al. 2019 did: 40 epochs, BPTT over 35 words.

The rate is divided by 4 when the perplexity of the validation text stops falling. Their rates: 2.5
for momentum with clip_norm 0.25, and 0.001 for Adam with clip_norm 1.
"""

import fiddle as fdl
from torch.optim.lr_scheduler import ReduceLROnPlateau

from configs.schema import Run
from optim import Adam
from workloads.tasks import LanguageModelling
from workloads.text import wikitext


def configure(run: fdl.Config[Run]) -> None:
    run.task = fdl.Partial(LanguageModelling)
    run.dataset = fdl.Partial(wikitext, root="data/wikitext-2", name="wikitext-2", bptt=35)
    run.data.num_workers_per_rank = 0  # the text is in memory

    run.train.num_epochs = 40
    run.train.batch_size_per_rank = 20
    run.train.eval_batch_size_per_rank = 10
    run.train.optimizer = fdl.Partial(Adam, lr=1e-3)
    run.train.clip_norm = 1.0
    run.train.scale_lr_by_workers = False
    run.train.lr_warmup_epochs = 0
    run.train.scheduler = fdl.Partial(ReduceLROnPlateau, factor=0.25, patience=0)
    run.train.best_metric = "perplexity/valid"
