"""The operations that dgc and optim share: each specified in plain torch, and done in C++ and CUDA.

step/ steps a parameter with its compressed state, buffers/ keeps what is not sent yet, packing/
turns entries into messages. In each folder ops.py says what the operations take, reference.py what
they do; host.cpp and device.cu do the same. runtime/ compiles and starts them.
"""

from parsimony_kernels.runtime.choice import implementation, use

__all__ = ["implementation", "use"]
