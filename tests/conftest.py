"""What all tests share. Without a GPU, Triton kernels run on the CPU through the compiled CPU target."""

import pytest
import torch

torch.set_num_threads(1)
pytest.register_assert_rewrite(  # as pytest does for test files
    "bench_helpers", "models_helpers", "operation_helpers", "quant_fp8_helpers", "rms_norm_helpers", "rope_helpers"
)


@pytest.fixture
def scaling_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark knows the family of ``bench_helpers``, and measures little."""
    from bench_helpers import use_scaling

    use_scaling(monkeypatch)
