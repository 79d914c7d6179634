"""Text that is streamed from the files data/text/train/*; list this file after a model's.

Each rank reads its own part of every file. The text of data/text/test/* is held in memory.
"""

import fiddle as fdl

from configs.schema import Run
from workloads.text_stream import text_shards


def configure(run: fdl.Config[Run]) -> None:
    run.dataset = fdl.Partial(text_shards, root="data/text", train="train/*", test="test/*")
    run.train.best_metric = "perplexity/test"
