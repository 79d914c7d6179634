"""torch.distributed's side of dgc.comm: gloo's messages met by name, NCCL's in rank 0's order."""
