"""Helpers for testing operations: where they can run, poisoned memory, and the comparison with the truth."""

from tilewright.testing.checks import check_backward, check_fake, check_forward
from tilewright.testing.targets import Target, poisoned, targets

__all__ = ["Target", "check_backward", "check_fake", "check_forward", "poisoned", "targets"]
