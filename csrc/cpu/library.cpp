// All of the CPU kernels as one text for the compiler: they share most of it.
#include "aligned_residual_read.cpp"
#include "clip_hash.cpp"
#include "memory_read.cpp"
#include "momentum_scan.cpp"
#include "neural_memory_bwd.cpp"
#include "neural_memory_fwd.cpp"
