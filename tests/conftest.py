"""Without a GPU, Triton kernels are tested in Triton's interpreter, which must be on before Triton loads."""

import os

import pytest
import torch

if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)
pytest.register_assert_rewrite("bench_helpers", "rope_helpers")  # as pytest does for test files


@pytest.fixture
def scaling_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark knows the family of ``bench_helpers``, and measures little."""
    from bench_helpers import use_scaling

    use_scaling(monkeypatch)
