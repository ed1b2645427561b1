"""A bundle as a model of NVIDIA's Triton Inference Server: the folder that it reads, and what answers in it."""
