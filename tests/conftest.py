"""On a machine without a GPU, Triton kernels are tested in Triton's interpreter, which must be on before Triton loads."""

import os

import torch

if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
