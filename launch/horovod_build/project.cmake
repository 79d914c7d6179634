# Read by CMake after each project() of Horovod 0.28.1.

# Horovod asks for C++14, torch's headers need C++20: whoever says 14 gets 20.
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION "-std=c++20")

# The wheel is cached and installed into other environments, so it looks for MPI, torch and NCCL
# beside itself (lib/pythonX.Y/site-packages/horovod/torch), never where it was built.
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_INSTALL_RPATH
    "$ORIGIN/../../../.." "$ORIGIN/../../torch/lib" "$ORIGIN/../../nvidia/nccl/lib")
