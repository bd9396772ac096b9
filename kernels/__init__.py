"""Triton kernels, installed as puat_fast.kernels. They import torch and triton and nothing of ours."""
