"""Exchange between all ranks alike, whatever node they are on."""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.dgc.two_level = False
