"""Run by test_stalls.py: rank 1 is stopped in the midst of steps, for some seconds or for ever.

argv: seconds (inf: for ever), and whether collectives start under dynamic process sets, 0 or 1.
Prints a hash of what was exchanged, which does not depend on how long somebody was stopped.
"""

import hashlib
import math
import os
import signal
import subprocess
import sys
import time

import torch

seconds, os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = float(sys.argv[1]), sys.argv[2]

from dgc.comm.job import job  # noqa: E402

with job() as comm:
    digest = hashlib.sha256()
    for step in range(40):
        if comm.rank == 1 and step == 20:
            if seconds < math.inf:
                wake = f"sleep {seconds}; kill -CONT {os.getpid()}"
                subprocess.Popen(["sh", "-c", wake], start_new_session=True)
            print("rank 1 stops", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        generator = torch.Generator().manual_seed(10 * step + comm.rank)
        mine = torch.randn(1000, generator=generator)
        gathered = comm.all_gather_async(mine, "gathered")
        total = comm.all_reduce_async(mine.clone(), "summed").wait()
        digest.update(total.numpy().tobytes() + gathered.wait().numpy().tobytes())
        time.sleep(0.005)
    print(f"rank {comm.rank} has {digest.hexdigest()}", flush=True)
