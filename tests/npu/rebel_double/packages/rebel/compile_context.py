"""Which tensors a graph changes in place."""

from rebel import recorder


class CompileContext:
    """Holds what has been marked."""

    def __init__(self, use_weight_sharing=False):
        self.use_weight_sharing = use_weight_sharing
        self.marked = []

    def mark_static_address(self, tensor, name=None):
        """Say that a tensor stays where it is, and may be changed."""
        recorder.record("mark_static_address", tensor=recorder.described([tensor])[0], sharing=self.use_weight_sharing)
        self.marked.append(tensor.data_ptr())
