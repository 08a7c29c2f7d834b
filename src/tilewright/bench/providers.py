"""Who is measured, and what makes the measurement honest.

A :class:`Provider` turns tasks into calls; a :class:`Formulation` is what its results are judged against; a
:class:`Suite` holds what the benchmark of one operation family needs beyond the family's own spec. Nothing here knows
an operation: a family's module in this package builds its suite.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tilewright.bench.environment import explain_failure
from tilewright.errors import TilewrightError, UnknownNameError
from tilewright.settings import triton_interpret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tilewright.ops.contract import Arguments, Direction, Family, Workload

    Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Task:
    """One call to measure, forward or backward, on tensors of its own.

    Attributes:
        function: the public function's name.
        direction: what is measured.
        args: its positional arguments; those with gradients are leaves that require them, if gradients are wanted.
        kwargs: its options.
        wrt: places in ``args`` of the tensors that have gradients.
        grads: a gradient for each output, differentiable or not; empty where ``direction`` is forward.
        dtype: the workload's dtype.
        bytes_moved: compulsory traffic of one call.
    """

    function: str
    direction: Direction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wrt: tuple[int, ...]
    grads: tuple[torch.Tensor, ...]
    dtype: torch.dtype
    bytes_moved: int

    def twin(self) -> Task:
        """The same task on equal tensors elsewhere in memory, with the same strides."""
        copied = twins((*self.args, *self.grads))
        return replace(self, args=copied[: len(self.args)], grads=copied[len(self.args) :])

    def in_double(self) -> Task:
        """The same task in float64."""
        return self.with_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Task:
        """The same task on changed tensors; those that are leaves with gradients stay such."""

        def changed(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return change(value.detach()).detach().requires_grad_(value.requires_grad)

        return replace(
            self, args=tuple(changed(value) for value in self.args), grads=tuple(changed(grad) for grad in self.grads)
        )


@dataclass(frozen=True)
class Formulation:
    """One way to state the mathematics, which decides what a result is judged against.

    The truth is the formulation in float64, and its error in the task's own dtype is what is allowed. A provider whose
    conventions round more is held against a formulation with the same roundings, and the record names it.

    Attributes:
        name: such as ``"fp32 tables"``.
        evaluate: results of a task in the task's dtypes.
        truth: results in float64; None to evaluate the task in float64.
        less_precise: why this is a less precise job than the family's own; empty if it is the same job.
        judges: how results are judged if not by the policy of :mod:`tilewright.numerics` for tensors: a function of the
            task, the results, the formulation's results in the same dtypes, and the truth, that returns why the results
            are wrong; empty if they are right.
        numbers: what of a task's results is compared with the truth, tensor by tensor, where results are codes.
    """

    name: str
    evaluate: Callable[[Task], Tensors]
    truth: Callable[[Task], Tensors] | None = None
    less_precise: str = ""
    judges: Callable[[Task, Tensors, Tensors, Tensors], str] | None = None
    numbers: Callable[[Task, Tensors], Tensors] = field(default=lambda task, results: results)

    def exact(self, task: Task) -> Tensors:
        """The truth of a task."""
        return self.truth(task) if self.truth is not None else self.evaluate(task.in_double())


@dataclass(frozen=True)
class Prepared:
    """Calls that are ready to be timed.

    Attributes:
        calls: one for each task, on that task's tensors.
        results: puts what a call returned into the order and layout of the public function's results.
        outputs: tensors that the first call writes into, to be filled with NaN before it is judged.
        formulation: what the results are judged against; None for the family's own.
        expected: exact results, for a provider that computes nothing; replaces ``formulation``.
    """

    calls: tuple[Callable[[], Any], ...]
    results: Callable[[Any], Tensors]
    outputs: Tensors = ()
    formulation: Formulation | None = None
    expected: Tensors | None = None


class Provider(Protocol):
    """Someone who computes the operation."""

    @property
    def name(self) -> str:
        """Short and unique, such as ``"eager"``."""

    @property
    def description(self) -> str:
        """One line."""

    @property
    def eager(self) -> bool:
        """Whether a call runs Python, so that its time on the host is worth measuring."""

    def available(self, device: torch.device) -> str | None:
        """Why the provider cannot be had on this device; None if it can."""

    def accepts(self, task: Task) -> str | None:
        """Why the provider cannot do this task; None if it can."""

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """Calls for tasks that differ in nothing but their memory."""


def tensors_in(returned: Any) -> Tensors:
    """The tensors of a result, flat."""
    return tuple(_flatten(returned))


def _flatten(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flatten(item)


def bind(function: Callable[..., Any], task: Task) -> Callable[[], Any]:
    """A call of ``function`` on the task's tensors.

    A backward is the gradient computation alone, over a graph that is built here once and kept: the forward is no part
    of the call.
    """
    if task.direction == "forward":
        return lambda: function(*task.args, **task.kwargs)
    results = tensors_in(function(*task.args, **task.kwargs))
    outputs, grads = zip(
        *((result, grad) for result, grad in zip(results, task.grads, strict=True) if result.requires_grad),
        strict=True,
    )
    inputs = tuple(task.args[place] for place in task.wrt)
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def evaluate(function: Callable[..., Any], task: Task) -> Tensors:
    """Results of a task: the function's outputs, or its gradients."""
    return tuple(tensor.detach() for tensor in tensors_in(bind(function, task)()))


def records_gradients(task: Task) -> bool:
    """Whether a task is a backward or a forward that one may follow."""
    tensors = (value for value in task.args if isinstance(value, torch.Tensor))
    return task.direction == "backward" or any(tensor.requires_grad for tensor in tensors)


def public_function(implementation: str, task: Task) -> Callable[..., Any]:
    """The task's public function, served by one of its implementations."""
    import tilewright

    return partial(getattr(tilewright, task.function), impl=implementation)


def by_reference(task: Task) -> Tensors:
    """Results of a task by the family's definition."""
    return evaluate(public_function("reference", task), task)


def no_kernels(device: torch.device) -> str | None:
    """Why the time of our Triton kernels would say nothing; None if it says something."""
    if triton_interpret():
        return "Triton's interpreter runs the kernels (TRITON_INTERPRET=1): its time says nothing"
    return None


def not_chosen(implementation: str, task: Task) -> str | None:
    """Why dispatch would not let this implementation serve the task; None if it would."""
    import tilewright

    try:
        explanation = tilewright.explain(task.function, *task.args, impl=implementation, **task.kwargs)
    except TilewrightError as error:
        return str(error)
    return None if explanation.chosen == implementation else explanation.reason


def peer_missing(module: str, attribute: str) -> Callable[[torch.device], str | None]:
    """Why another library's kernels cannot be had on a device, as a function of the device."""

    def reason(device: torch.device) -> str | None:
        if device.type == "cpu":
            return "runs on accelerators only"
        return _import_failure(module, attribute)

    return reason


@lru_cache(maxsize=16)
def _import_failure(module: str, attribute: str) -> str | None:
    try:
        getattr(import_module(module), attribute)
    except Exception as error:  # a broken package may raise anything
        return explain_failure(error)
    return None


def twins(values: Sequence[Any]) -> tuple[Any, ...]:
    """Copies of the tensors in ``values`` elsewhere in memory. Strides are kept, and what shares memory shares it."""
    storages: dict[int, Any] = {}

    def twin(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            memory = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            storages[storage.data_ptr()] = memory.clone().untyped_storage()
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        copied = empty.set_(storages[storage.data_ptr()], value.storage_offset(), value.size(), value.stride())
        return copied.requires_grad_(value.requires_grad)

    return tuple(twin(value) for value in values)


@dataclass(frozen=True)
class FunctionProvider:
    """A provider that calls a function, the usual kind.

    Attributes:
        name: short and unique.
        description: one line.
        function: what to call for a task; imports whatever it needs.
        translate: turns a task into one whose arguments the function takes, outside of the timing.
        results: puts the function's results into the public function's order and layout.
        formulation: what the results are judged against, chosen for a translated task; None for the family's own.
        compiled: whether the function goes through ``torch.compile``.
        missing: why the provider cannot be had on a device.
        refuses: why it cannot do a task.
    """

    name: str
    description: str
    function: Callable[[Task], Callable[..., Any]]
    translate: Callable[[Task], Task] = field(default=lambda task: task)
    results: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)
    formulation: Callable[[Task], Formulation | None] = field(default=lambda task: None)
    compiled: bool = False
    missing: Callable[[torch.device], str | None] = field(default=lambda device: None)
    refuses: Callable[[Task], str | None] = field(default=lambda task: None)

    @property
    def eager(self) -> bool:
        """Whether a call runs Python."""
        return not self.compiled

    def available(self, device: torch.device) -> str | None:
        """Why the provider cannot be had on this device."""
        return self.missing(device)

    def accepts(self, task: Task) -> str | None:
        """Why the provider cannot do this task."""
        return self.refuses(task)

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """Calls for tasks that differ in nothing but their memory."""
        translated = [self.translate(task) for task in tasks]
        function = self.function(translated[0])
        return Prepared(
            calls=_compile(function, translated) if self.compiled else tuple(bind(function, t) for t in translated),
            results=lambda returned: self.results(tensors_in(returned)),
            formulation=self.formulation(translated[0]),
        )


def _compile(function: Callable[..., Any], tasks: Sequence[Task]) -> tuple[Callable[[], Any], ...]:
    """Compile for the shape of these tasks alone. Whatever was compiled before is forgotten, or Dynamo would reach its
    limit of recompilations and run the later shapes eagerly.
    """
    from torch._functorch import config

    torch.compiler.reset()
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    # A compiled backward that may overwrite what was saved for it cannot run twice over one graph.
    with config.patch(donated_buffer=False):
        return tuple(bind(compiled, task) for task in tasks)


@dataclass(frozen=True)
class CopyProvider:
    """The device's own ``copy_`` of as many bytes as the task has to move: what the memory gives for this size."""

    name: str = "copy"
    description: str = "the device's own copy_ of as many bytes as the operation has to move"
    eager: bool = False

    def available(self, device: torch.device) -> str | None:
        """None: every device can copy."""
        return None

    def accepts(self, task: Task) -> str | None:
        """Why there is nothing to copy."""
        return None if task.bytes_moved >= 2 * task.dtype.itemsize else "the workload moves no bytes"

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """Copies between buffers of half the task's bytes."""
        device = next(value.device for value in tasks[0].args if isinstance(value, torch.Tensor))
        size = tasks[0].bytes_moved // (2 * tasks[0].dtype.itemsize)
        first = torch.randn(size, device=device).to(tasks[0].dtype)
        sources = [first, *(first.clone() for _ in tasks[1:])]
        targets = [torch.empty_like(first) for _ in tasks]

        def call(source: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
            return lambda: target.copy_(source)

        return Prepared(
            calls=tuple(call(source, target) for source, target in zip(sources, targets, strict=True)),
            results=tensors_in,
            outputs=(targets[0],),
            expected=(first,),
        )


@dataclass(frozen=True)
class ForwardOnly:
    """A provider of an operation without gradients.

    Attributes:
        provider: who computes the forward.
        reason: why there is no backward.
    """

    provider: Provider
    reason: str

    @property
    def name(self) -> str:
        """The provider's."""
        return self.provider.name

    @property
    def description(self) -> str:
        """The provider's."""
        return self.provider.description

    @property
    def eager(self) -> bool:
        """Whether a call runs Python."""
        return self.provider.eager

    def available(self, device: torch.device) -> str | None:
        """Why the provider cannot be had on this device."""
        return self.provider.available(device)

    def accepts(self, task: Task) -> str | None:
        """Why the provider cannot do this task."""
        return self.reason if records_gradients(task) else self.provider.accepts(task)

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """Calls for tasks that differ in nothing but their memory."""
        return self.provider.prepare(tasks)


@dataclass(frozen=True)
class Suite:
    """What the benchmark of one operation family needs beyond the family's spec.

    Attributes:
        family: the spec.
        formulation: the family's own statement of the mathematics.
        wrt: places, among a workload's arguments, of the tensors that have gradients.
        providers: everyone who can be asked for, in the order of tables.
        on_request: names of providers that are measured only when asked for.
        reduced: how many rows each result of a task sums over; by default 1.
        no_gradients: why the family has no backward; empty if it has one. Its providers then refuse every backward and
            every forward that records one.
    """

    family: Family
    formulation: Formulation
    wrt: Callable[[Workload, Arguments], tuple[int, ...]]
    providers: tuple[Provider, ...]
    on_request: frozenset[str] = frozenset()
    reduced: Callable[[Task], tuple[int, ...]] | None = None
    no_gradients: str = ""

    def chosen(self, names: Sequence[str] | None) -> tuple[Provider, ...]:
        """The providers of these names, or those that are measured unasked.

        Raises:
            UnknownNameError: no provider has such a name.
        """
        by_name: Mapping[str, Provider] = {provider.name: provider for provider in self.providers}
        if self.no_gradients:
            by_name = {name: ForwardOnly(provider, self.no_gradients) for name, provider in by_name.items()}
        if names is None:
            return tuple(provider for name, provider in by_name.items() if name not in self.on_request)
        for name in names:
            if name not in by_name:
                raise UnknownNameError(
                    f"bench {self.family.name}: no provider is called '{name}'; there are: {', '.join(by_name)}"
                )
        return tuple(provider for name, provider in by_name.items() if name in names)


SUITES = ("rope", "rms_norm", "qk_norm_rope", "quant_fp8", "mhc")
"""The families that can be measured: each has a module of its name in this package with a function ``suite``."""

_REGISTERED: dict[str, Callable[[], Suite]] = {}


def register(name: str, make: Callable[[], Suite]) -> None:
    """Make a family known to the benchmark that has no module in this package."""
    _REGISTERED[name] = make


def suite(name: str) -> Suite:
    """The suite of a family.

    Raises:
        UnknownNameError: there is none.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]()
    if name not in SUITES:
        known = ", ".join(sorted({*SUITES, *_REGISTERED}))
        raise UnknownNameError(f"bench: no operation family is called '{name}'; there are: {known}")
    made: Suite = import_module(f"tilewright.bench.{name}").suite()
    return made
