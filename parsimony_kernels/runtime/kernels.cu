// All CUDA sources, so that they are compiled together. launch.py compiles this for the GPU that is there.
#include "buffers/device.cu"
#include "packing/device.cu"
#include "step/device.cu"
