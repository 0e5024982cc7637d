"""Kernels in C for CPUs, and how many threads compute."""
