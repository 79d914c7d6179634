"""Run by test_stalls.py: something befalls a rank in the midst of steps.

argv: what, which rank, and whether collectives start under dynamic process sets, 0 or 1. What: the
seconds for which it is stopped (inf: for ever), "starved" (for 10 s it gets a twentieth of a core),
or "clock" (its clock jumps a day ahead, and two days back: needs jumping_clock.c preloaded).
Prints a hash of what was exchanged, which does not depend on any of it.
"""

import ctypes
import hashlib
import math
import os
import signal
import subprocess
import sys
import time

import torch

what, victim, os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = sys.argv[1:]

from dgc.comm.job import job  # noqa: E402


def befall(what: str, step: int) -> None:
    me, program = os.getpid(), None
    print(f"rank {victim}: {what}", flush=True)
    if what == "clock":
        before, seconds = time.time(), 86400 if step == 20 else -2 * 86400
        ctypes.CDLL(None).jump_clock(seconds)
        assert abs(time.time() - before) > 80000, "the clock has not jumped"
    elif what == "starved":
        round_ = f"kill -STOP {me} || exit; sleep 0.19; kill -CONT {me}; sleep 0.01"
        program = f"for i in $(seq 50); do {round_}; done"
    elif float(what) < math.inf:
        program = f"sleep {what}; kill -CONT {me}"
    if program:
        subprocess.Popen(["sh", "-c", program], start_new_session=True)
    if what not in ("clock", "starved"):
        os.kill(me, signal.SIGSTOP)


with job() as comm:
    digest = hashlib.sha256()
    for step in range(40):
        if comm.rank == int(victim) and (step == 20 or (step == 30 and what == "clock")):
            befall(what, step)
        generator = torch.Generator().manual_seed(10 * step + comm.rank)
        mine = torch.randn(1000, generator=generator)
        gathered = comm.all_gather_async(mine, "gathered")
        total = comm.all_reduce_async(mine.clone(), "summed").wait()
        digest.update(total.numpy().tobytes() + gathered.wait().numpy().tobytes())
        time.sleep(0.005)
    print(f"rank {comm.rank} has {digest.hexdigest()}", flush=True)
