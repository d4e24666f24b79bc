"""One session on a machine with an NVIDIA GPU: build, parity, sanitizers, times, profile."""
