"""The language, compiled by the front end that is here in the place of the real one."""

from rebel import recorder
from tilewright.npu.compile import compile_kernel
from tilewright.npu.kernel import JitFunction

from . import language as language

__version__ = "3.2.0"


class Kernel(JitFunction):
    """A function under ``@triton.jit``."""

    def warmup(self, *args, grid, host_layout=None):
        """Compile for arguments; a call with anything else than these is an error."""
        options = {"grid": list(grid)} | ({} if host_layout is None else {"host_layout": host_layout})
        recorder.record("warmup", kernel=self.name, options=options, arguments=recorder.described(args))
        return compile_kernel(self, self.bind(*args), grid=grid, host_layout=host_layout)


def jit(fn):
    """Make a function a kernel."""
    return Kernel(fn)
