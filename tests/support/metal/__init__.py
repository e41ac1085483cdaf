"""Runs the text of Metal and CUDA kernels on a CPU and checks what they do: see emulator.py."""
