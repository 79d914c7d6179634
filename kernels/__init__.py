"""Operations that dgc and optim share: one schema each, three implementations. See kernels.ops."""
