"""The ops' own tests on Triton kernels: in Triton's interpreter, compiled ahead of time, in the GPU emulator."""
