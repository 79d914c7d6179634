"""Short for warmup_none.py."""

from configs.dgc.warmup_none import configure

__all__ = ["configure"]
