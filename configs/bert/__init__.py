"""A masked language model on WikiText-103 by words, the 30,522 most frequent.

BERT's network and its rule for masks (Devlin et al. 2019), without its word pieces, its corpus and
its second task: it shows what such a network costs, but not the published scores.
"""

import fiddle as fdl

from configs.schema import Run
from optim import Adam, QuadraticWarmupLinearCooldown
from workloads.masked_text import masked_wikitext
from workloads.tasks import MaskedLanguageModelling


def configure(run: fdl.Config[Run]) -> None:
    run.task = fdl.Partial(MaskedLanguageModelling)
    run.dataset = fdl.Partial(
        masked_wikitext, root="data/wikitext-103", name="wikitext-103", sequence_length=128
    )
    run.train.num_epochs = 40
    run.train.batch_size_per_rank = 32
    run.train.eval_batch_size_per_rank = 32
    run.train.optimizer = fdl.Partial(Adam, lr=1e-4, weight_decay=0.01, decoupled_weight_decay=True)
    run.train.clip_norm = 1.0
    run.train.scale_lr_by_workers = False
    run.train.lr_warmup_epochs = 0
    run.train.scheduler = fdl.Partial(QuadraticWarmupLinearCooldown)
    run.train.schedule_lr_per = "step"
    run.train.weight_decay_on_batch_norm = False
    run.train.best_metric = "perplexity/valid"
