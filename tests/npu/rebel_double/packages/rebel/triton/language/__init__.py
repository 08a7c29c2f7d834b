"""``tl``."""

from tilewright.npu import language


def __getattr__(name):
    return getattr(language, name)
