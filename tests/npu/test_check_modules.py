"""The rules that can be seen by reading a file: each with modules that break it, and with ones that nearly do."""

import pytest
from check_helpers import BARE, IMPORTS, KERNEL, MODULE, changed, checked, place, places

from tilewright.npu.check.modules import check_kernel_names
from tilewright.npu.diagnostics import Diagnostics
from tilewright.npu.module import KernelModule
from tilewright.npu.profiles import profile
from tilewright.npu.source import SourceFile

GUARD = 'if __name__ == "__main__" and os.environ.get("RBLN_WRITE_RTOSA") != "1":'
WRAPPER = "def add_wrapper(x: torch.Tensor, y: torch.Tensor)"
HELPER = "def warmup(kernel, *args):\n"
MAIN = "def main():\n"
LISTED = "params = [x, y.contiguous(), output, x.shape[0], x.shape[1]]"
COLLECTED = f"{LISTED}\n    warmup(add, *params)"
EARLY = "    output = torch.empty_like(x)\n"
ALIGNED = "    x, y = map(rblib.align_tensor_last_dim_to_64, (x, y))\n"

BROKEN = {
    "wrapper with a name of its own": (
        "WRAPPER_NAME",
        [("def add_wrapper(", "def add_op(")],
        "def «add_op»(",
    ),
    "wrapper without a name": (
        "WRAPPER_NAME",
        [("def add_wrapper(", "def _(")],
        'add", mutates_args=())\ndef «_»(',
    ),
    "another namespace": (
        "NAMESPACE",
        [('@triton_op("rbln_triton_ops::add"', '@triton_op("my_ops::add"')],
        '@triton_op(«"my_ops::add"»',
    ),
    "name of no kernel": (
        "NAMESPACE",
        [('@triton_op("rbln_triton_ops::add"', '@triton_op("rbln_triton_ops::plus"')],
        '@triton_op(«"rbln_triton_ops::plus"»',
    ),
    "name that is a constant": (
        "NAMESPACE",
        [('@triton_op("rbln_triton_ops::add"', 'NAME = "my_ops::add"\n\n\n@triton_op(NAME')],
        "@triton_op(«NAME»",
    ),
    "operator's tensors exchanged": (
        "ARG_ORDER",
        [(WRAPPER, "def add_wrapper(y: torch.Tensor, x: torch.Tensor)")],
        "add_wrapper(«y: torch.Tensor», ",
    ),
    "kernel's tensors exchanged": (
        "ARG_ORDER",
        [("[x, y.contiguous(), output", "[y.contiguous(), x, output")],
        "add_wrapper(«x: torch.Tensor», ",
    ),
    "tensor that the kernel does not take": (
        "ARG_ORDER",
        [(WRAPPER, "def add_wrapper(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor)")],
        "y: torch.Tensor, «z: torch.Tensor»)",
    ),
    "tensor that the operator does not have": (
        "ARG_ORDER",
        [
            ("def add(x_ptr, y_ptr, out_ptr", "def add(x_ptr, y_ptr, z_ptr, out_ptr"),
            ("[x, y.contiguous(), output", "[x, y.contiguous(), y, output"),
        ],
        "def «add_wrapper»(",
    ),
    "order through a function of the module": (
        "ARG_ORDER",
        [
            (WRAPPER, "def add_wrapper(y: torch.Tensor, x: torch.Tensor)"),
            (
                f"{EARLY}{ALIGNED}    {COLLECTED}\n    return output\n",
                "    return compiled_add(add, x, y)\n\n\ndef compiled_add(kernel, x, y):\n"
                f"{EARLY}{ALIGNED}    {COLLECTED.replace('add', 'kernel')}\n    return output\n",
            ),
        ],
        "add_wrapper(«y: torch.Tensor», ",
    ),
    "order of an operator beside its wrapper": (
        "ARG_ORDER",
        [
            (
                f'@triton_op("rbln_triton_ops::add", mutates_args=())\n{WRAPPER}',
                '@triton_op("rbln_triton_ops::add", mutates_args=())\n'
                "def add_op(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:\n    return torch.empty_like(x)\n\n\n"
                f"{WRAPPER}",
            )
        ],
        "add_op(«y: torch.Tensor», ",
    ),
    "relative import": (
        "SELF_CONTAINED",
        [("import torch\n", "import torch\nfrom .common import SIZE\n")],
        "«from .common import SIZE»",
    ),
    "relative import in a wrapper": (
        "SELF_CONTAINED",
        [(EARLY, f"    from ..common import prepared\n{EARLY}")],
        "«from ..common import prepared»",
    ),
    "name that is not there": (
        "SELF_CONTAINED",
        [("output = torch.empty_like(x)\n    x, y", "output = allocated(x)\n    x, y")],
        "output = «allocated»(x)",
    ),
    "name that is not there in a function of a wrapper": (
        "SELF_CONTAINED",
        [("    return compiled\n", "    return finished(compiled)\n")],
        "return «finished»(",
    ),
    "main without the environment": ("MAIN_GUARD", [(GUARD, 'if __name__ == "__main__":')], 'if «__name__ == "__main'),
    "main with the environment turned round": (
        "MAIN_GUARD",
        [(GUARD, GUARD.replace("!=", "=="))],
        f"if «{GUARD.replace('!=', '==')[3:]}",
    ),
    "no guard": ("MAIN_GUARD", [(f"{GUARD}\n    main()", "main()")], "\n\n\n«main()»\n"),
    "a result at the top": (
        "MAIN_GUARD",
        [
            (GUARD, f"RESULT = torch.ops.rbln_triton_ops.add(ONE, ONE)\n\n{GUARD}"),
            (MAIN, f"ONE = 1\n\n\n{MAIN}"),
        ],
        "«RESULT = torch.ops",
    ),
    "a result at the top by a function": ("MAIN_GUARD", [(GUARD, f"RESULT = main()\n\n{GUARD}")], "«RESULT = main()»"),
    "a loop at the top": (
        "MAIN_GUARD",
        [(GUARD, f"for _ in range(3):\n    print(torch.ones(1))\n\n{GUARD}")],
        "    «print(torch.ones(1))»",
    ),
    "output like an aligned tensor": (
        "OUT_ALIGN",
        [(EARLY + ALIGNED, ALIGNED + EARLY)],
        "output = «torch.empty_like(x)»\n    params",
    ),
    "output of an aligned size": (
        "OUT_ALIGN",
        [
            (
                EARLY + ALIGNED,
                f"{ALIGNED}    rows, size = x.shape[0], x.shape[-1]\n    output = x.new_zeros((rows, size))\n",
            )
        ],
        "output = «x.new_zeros((rows, size))»",
    ),
    "output of an aligned shape": (
        "OUT_ALIGN",
        [(EARLY + ALIGNED, f"{ALIGNED}    output = torch.zeros(size=x.shape)\n")],
        "output = «torch.zeros(size=x.shape)»",
    ),
    "two kernels of one name": (
        "SAME_KERNEL_NAME",
        [(HELPER, f"{KERNEL.replace('x + y', 'x - y')}\n\n{HELPER}")],
        "x + y)\n\n\n@triton.jit\ndef «add»(",
    ),
    "several programs": ("GRID", [("grid=(1,)", "grid=(2, 1)")], "grid=«(2, 1)»"),
    "several programs by a constant": (
        "GRID",
        [("grid=(1,)", "grid=GRID"), ("\n\ndef warmup", "\nGRID = [8]\n\n\ndef warmup")],
        "grid=«GRID»",
    ),
    "several programs by a function": ("GRID", [("grid=(1,)", "grid=lambda meta: (4,)")], "grid=«lambda meta"),
    "a launch": ("GRID", [("warmup(add, *params)", "add[(1,)](*params)")], "    «add[(1,)]»(*params)"),
}

NEAR = {
    "nothing changed": [],
    "wrapper beside its operator": [
        (
            f'@triton_op("rbln_triton_ops::add", mutates_args=())\n{WRAPPER}',
            '@triton_op("rbln_triton_ops::add", mutates_args=())\n'
            "def _(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:\n    return torch.empty_like(x)\n\n\n"
            f"{WRAPPER}",
        )
    ],
    "operator of no kernel": [
        (
            MAIN,
            '@triton_op("my_ops::plus", mutates_args=())\ndef plus(x: torch.Tensor) -> torch.Tensor:\n'
            f"    return x\n\n\n{MAIN}",
        )
    ],
    "name that is put together": [
        ('@triton_op("rbln_triton_ops::add"', 'SPACE = "rbln_triton_ops"\n\n\n@triton_op(f"{SPACE}::" + "add"')
    ],
    "dummy": [
        (WRAPPER, "def add_wrapper(x: torch.Tensor, y: torch.Tensor, dummy: torch.Tensor)"),
        ("def add(x_ptr, y_ptr, out_ptr", "def add(x_ptr, y_ptr, out_ptr, dummy"),
        ("output, x.shape[0]", "output, x, x.shape[0]"),
    ],
    "parameters without annotations": [(WRAPPER, "def add_wrapper(x, y, size=1)")],
    "number beside the tensors": [(WRAPPER, "def add_wrapper(size: int, x: torch.Tensor, y: torch.Tensor)")],
    "tensor that cannot be followed": [
        (WRAPPER, "def add_wrapper(y: torch.Tensor, x: torch.Tensor)"),
        ("y.contiguous()", "y * 2"),
    ],
    "order that depends on a condition": [
        (EARLY, f"    if x.dim() == 3:\n        x, y = y, x\n{EARLY}"),
    ],
    "one of two kernels": [
        (
            f"    {COLLECTED}\n",
            f"    {COLLECTED}\n".replace("warmup(add", "warmup(add if x.dim() == 2 else add"),
        )
    ],
    "arguments in calls of a list": [
        (
            "params = [x, y.contiguous(), output, x.shape[0], x.shape[1]]",
            "params = []\n    params.append(x)\n    params += [y]\n    params.extend((output, x.shape[0], x.shape[1]))",
        )
    ],
    "the language's own form": [("    warmup(add, *params)", '    rblib.warmup(add, {"host_layout": [1]}, *params)')],
    "arguments by name": [
        ("    warmup(add, *params)", "    add.warmup(x, y, out_ptr=output, ROWS=2, COLS=64, grid=(1,))")
    ],
    "relative import with another way": [
        ("import torch\n", "import torch\n\ntry:\n    from .common import SIZE\nexcept ImportError:\n    SIZE = 1\n")
    ],
    "relative import for types": [
        (
            "import torch\n",
            "import torch\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from .common import Size\n",
        )
    ],
    "relative import in a function of no wrapper": [
        ("def main():\n", "def main():\n    from . import common\n\n    common.start()\n")
    ],
    "name out of a star": [
        ("output = torch.empty_like(x)\n    x, y", "output = allocated(x)\n    x, y"),
        ("import torch\n", "import torch\nfrom somewhere import *\n"),
    ],
    "names of many kinds": [
        (
            EARLY,
            "    with torch.no_grad() as mode:\n        sizes = {i: s for i, s in enumerate(x.shape)}\n"
            "    try:\n        import math as m\n"
            "    except ImportError as error:\n        print(error, mode, m, sizes)\n"
            "    pick = lambda a, *b, c=0: (a, b, c, __file__)\n"
            f"    if (n := pick(x)) is None:\n        raise ValueError(n)\n{EARLY}",
        )
    ],
    "guard around a guard": [(GUARD, 'if __name__ == "__main__":\n  if os.environ.get("RBLN_WRITE_RTOSA") != "1":')],
    "guard in other words": [(GUARD, 'if __name__ == "__main__" and not os.environ.get("RBLN_WRITE_RTOSA"):')],
    "guard by a name": [
        (
            GUARD,
            'WRITING = os.environ.get("RBLN_WRITE_RTOSA", "0") == "1"\n\nif __name__ == "__main__" and not WRITING:',
        )
    ],
    "guard by the other branch": [(GUARD, 'if os.environ.get("RBLN_WRITE_RTOSA") == "1":\n    pass\nelse:')],
    "guard that asks in a way of its own": [
        (GUARD, 'if __name__ == "__main__" and os.environ.get("RBLN_WRITE_RTOSA", "").lower() not in ("1", "true"):')
    ],
    "nothing runs": [(f"{GUARD}\n    main()", 'if __name__ == "__main__":\n    torch.manual_seed(0)')],
    "settings": [
        (
            GUARD,
            'os.environ["RBLN_USE_CUSTOM_KERNEL"] = "1"\nos.environ.setdefault("A", "b")\n'
            "torch.set_grad_enabled(False)\nwarnings.warn('slow')\ntorch.manual_seed(0)\n"
            "__files__ = rblib.collect_triton_op_files()\n"
            f"MODEL = torch.compile(main)\nregister_fake('my_ops::plus')(main)\n\n{GUARD}",
        )
    ],
    "a function that registers": [
        (GUARD, f"def prepare():\n    torch.library.register_fake('my_ops::plus', main)\n\n\nprepare()\n{GUARD}")
    ],
    "output of a size that is not the last": [
        (EARLY + ALIGNED, f"    size = x.shape[-1]\n{ALIGNED}    output = torch.empty((x.shape[0], size))\n")
    ],
    "something else like an aligned tensor": [
        (ALIGNED, f"{ALIGNED}    print(torch.empty_like(x))\n"),
    ],
    "helper of kernels in two kernels": [
        ("@triton.jit\n", "@triton.jit\ndef plus(x, y):\n    return x + y\n\n\n@triton.jit\n"),
        ("x + y)\n\n\ndef", "plus(x, y))\n\n\ndef"),
    ],
    "one program in three dimensions": [("grid=(1,)", "grid=(1, 1, 1)")],
    "a grid that is not written out": [("grid=(1,)", "grid=(kernel.programs,)")],
    "a table of kernels": [("warmup(add, *params)", "warmup({2: add}[2], *params)")],
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case):
    code, replacements, marked = BROKEN[case]
    text = changed(*replacements)
    assert places(text) == [(code, *place(text, marked))]


@pytest.mark.parametrize("case", NEAR)
def test_near(case):
    assert places(changed(*NEAR[case])) == []


FOLLOWED = {
    "list": "params = [y, x, output, x.shape[0], x.shape[1]]",
    "list that grows": "params = []\n    params.append(y)\n    params += [x]\n    params.extend((output, 2, 64))",
    "parts of tuples": "both = (x, y)\n    first, *_ = (1, 2)\n    params = (both[1], both[-2], output, first, first)",
    "branches that agree": "if x.dim() == 2:\n        params = [y, x, output, 2, 64]\n"
    "    else:\n        params = [y, x, output, 2, x.shape[1]]",
    "condition in a line": "params = (y.view(2, 64) if x.dim() == 2 else y, x, output, 2, 64)",
    "nested function": "def form(a, *rest):\n        return (*rest, a)\n\n    params = form(x, y) + (output, 2, 64)",
    "lambda": "params = [*map(lambda each: each.float(), [y, x]), output, 2, 64]",
    "assignment in an expression": "params = [(z := y), x, output, 2, 64]\n    print(z)",
    "attempt": "try:\n        params = [y, x, output, 2, 64]\n    except ValueError:\n        raise",
    "block": "with torch.no_grad():\n        params = [y[..., :64], x.T, output, 2, 64]",
    "padding by hand": "params = [torch.nn.functional.pad(y, (0, 0)), x, output, 2, 64]",
}
"""Ways to collect the kernel's arguments in the wrong order."""


@pytest.mark.parametrize("way", FOLLOWED)
def test_what_a_wrapper_does_is_followed(way):
    text = changed((LISTED, FOLLOWED[way]))
    assert places(text) == [("ARG_ORDER", *place(text, "add_wrapper(«x: torch.Tensor», "))]


NOT_FOLLOWED = {
    "loop": "params = []\n    for each in (y, x, output, 2, 64):\n        params.append(each)",
    "loop that binds": "params = [y, x, output, 2, 64]\n    while len(params) > 5:\n        params = params[1:]",
    "branches that do not agree": "if x.dim() == 2:\n        params = [y, x, output, 2, 64]\n"
    "    else:\n        params = [x, y, output, 2, 64]",
    "an item that is changed": "params = [y, x, output, 2, 64]\n    params[0], params[1] = x, y",
    "order turned round": "params = [64, 2, output, y, x]\n    params.reverse()",
    "arithmetic": "params = [y + 0, x, output, 2, 64]",
    "function of another module": "params = torch.broadcast_tensors(y, x) + (output, 2, 64)",
    "name that is gone": "params = [y, x, output, 2, 64]\n    del params",
    "too many": "params = [y, x, output, 2, 64, 1]",
}


@pytest.mark.parametrize("way", NOT_FOLLOWED)
def test_what_cannot_be_followed_is_not_reported(way):
    assert places(changed((LISTED, NOT_FOLLOWED[way]))) == []


def test_messages_and_hints():
    found = checked(changed((WRAPPER, "def add_wrapper(y: torch.Tensor, x: torch.Tensor)"))).all[0]
    assert "takes (x, y), but 'add_wrapper' has (y, x)" in found.message
    assert found.hint == "order the tensors: x, y"
    found = checked(changed(('@triton_op("rbln_triton_ops::add"', '@triton_op("rbln_triton_ops::plus"'))).all[0]
    assert found.hint == '"rbln_triton_ops::add"'


def test_hint_has_the_dummies_where_the_kernel_takes_them():
    text = changed(
        (WRAPPER, "def add_wrapper(dummy: torch.Tensor, x: torch.Tensor, y: torch.Tensor)"),
        ("def add(x_ptr, y_ptr, out_ptr", "def add(x_ptr, y_ptr, out_ptr, dummy"),
        ("output, x.shape[0]", "output, x, x.shape[0]"),
    )
    assert [each.hint for each in checked(text).all] == ["order the tensors: x, y, dummy"]


def test_the_kernel_that_is_named_is_compiled():
    other = KERNEL.replace("def add", "def plus").replace("x + y", "y + x")
    text = changed((HELPER, f"{other}\n\n{HELPER}"), ("warmup(add", "warmup(plus"))
    assert places(text) == [("NAMESPACE", *place(text, '@triton_op(«"rbln_triton_ops::add"»'))]


def test_everything_at_once():
    text = changed(
        ("def add_wrapper(x: torch.Tensor, y", "def add_op(y: torch.Tensor, x"),
        ("grid=(1,)", "grid=(8,)"),
        (f"{GUARD}\n    main()", "main()"),
    )
    assert [code for code, _, _ in places(text)] == ["GRID", "WRAPPER_NAME", "ARG_ORDER", "MAIN_GUARD"]


def test_without_an_operator_nothing_has_to_be_registered():
    assert places(f"{BARE}\n\nprint(add)\n") == []
    assert places(f"{BARE}\n\nadd.warmup(1, 2, 3, grid=(2,))\n") == [("GRID", 12, 26)]


def test_without_a_kernel_there_is_no_rule():
    assert places("from . import common\n\ncommon.run()\n") == []


def test_functions_that_make_kernels_and_operators():
    inside = "\n\n".join((KERNEL, MODULE.partition(KERNEL)[2].partition(MAIN)[0]))
    lines = [f"    {line}" if line else "" for line in inside.splitlines()]
    assert places("\n".join((IMPORTS, "", "def made(scale):", *lines, "    return scale")) + "\n") == []


def test_profile_decides():
    text = changed(
        ("def add_wrapper(", "def add_op("), (GUARD, 'if __name__ == "__main__":'), ("grid=(1,)", "grid=(2,)")
    )
    assert [code for code, _, _ in places(text)] == ["GRID", "WRAPPER_NAME", "MAIN_GUARD"]
    assert [code for code, _, _ in places(text, "tile")] == ["GRID"]


@pytest.mark.parametrize(
    ("comment", "ignored"),
    [
        ("# npu: ignore", 1),
        ("# npu: ignore[GRID]", 1),
        ("# npu: ignore[NPU-GRID, KEEP_DIMS]", 1),
        ("# one is enough; npu: ignore[GRID]", 1),
        ("# npu: ignore[MAIN_GUARD]", 0),
        ("# no remark", 0),
    ],
)
def test_a_comment_ignores(comment, ignored):
    text = changed(('grid=(1,), host_layout="1:2")', f'grid=(2,), host_layout="1:2")  {comment}'))
    diagnostics = checked(text)
    assert [each.code for each in diagnostics.all] == ["GRID"] * (1 - ignored)
    assert diagnostics.ignored == ignored


def test_one_name_in_two_files():
    diagnostics = Diagnostics(profile())
    sources = [SourceFile("first.py", MODULE), SourceFile("second.py", BARE)]
    check_kernel_names([KernelModule(each, each.parse()) for each in sources], diagnostics)
    (found,) = diagnostics.all
    assert (found.code, found.severity, str(found.span)) == ("SAME_KERNEL_NAME", "warning", "second.py:6:5")
    assert "the kernel at first.py:11" in found.message


def test_what_is_ignored_is_counted_once():
    again = KERNEL.replace("triton.jit", "jit").replace("COLS: tl.constexpr):", "COLS: tl.constexpr):  # npu: ignore")
    twice = f"{BARE}\n\n{again}"
    diagnostics = checked(twice)
    source = SourceFile("kernels.py", twice)
    check_kernel_names([KernelModule(source, source.parse())], diagnostics)
    assert (diagnostics.all, diagnostics.ignored) == ((), 1)
