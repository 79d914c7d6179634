"""Short for warmup_5_epochs.py."""

from configs.dgc.warmup_5_epochs import configure

__all__ = ["configure"]
