// All of the CPU kernels as one text for the compiler: forward and backward share most of it.
#include "neural_memory_bwd.cpp"
#include "neural_memory_fwd.cpp"
