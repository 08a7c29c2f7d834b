"""The typed graph of a kernel: the ``npu`` dialect, its text, and the passes over it."""
