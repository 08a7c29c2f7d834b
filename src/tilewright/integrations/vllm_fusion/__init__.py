"""Graph fusion of vLLM's operators; :mod:`tilewright.integrations.vllm` has its public functions."""
