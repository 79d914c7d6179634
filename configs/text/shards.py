"""Text that is streamed: every file that data/text/train/* names is a shard. List it after a model.

Ranks read each its part of every shard; test/* is held in memory.
"""

import fiddle as fdl

from configs.schema import Run
from workloads.text_stream import text_shards


def configure(run: fdl.Config[Run]) -> None:
    run.dataset = fdl.Partial(text_shards, root="data/text", train="train/*", test="test/*")
    run.train.best_metric = "perplexity/test"
