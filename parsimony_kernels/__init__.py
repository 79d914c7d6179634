"""The operations that dgc and optim share: each specified in plain torch, and done in C++ and CUDA.

step/ steps a parameter with its compressed state, buffers/ keeps what is not sent yet, packing/
turns entries into messages. In each folder ops.py is what others call, reference.py specifies it in
plain torch, host.py with host.cpp does it on CPUs and device.py with device.cu on GPUs; headers
hold what C++ and CUDA share. runtime/ compiles and starts them.
"""

from parsimony_kernels.runtime.choice import implementation, use

__all__ = ["implementation", "use"]
