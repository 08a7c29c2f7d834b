"""What runs beside the vendor's compiler: ``python run.py FOLDER``, in a process of its own.

:func:`tilewright.npu.hand_off` copies this file into a folder with the device module and the operator's arguments. It
needs torch and rebel, and nothing of tilewright, so that a folder that was kept runs anywhere.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

_BACKEND = "rbln"


class Model(torch.nn.Module):
    """A model that is one operator."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *tensors: torch.Tensor) -> Any:
        """What the operator gives."""
        return self.operator(*tensors)


def options_of(job: dict[str, Any], folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The options of ``torch.compile``: strict, with a cache of its own, and told what is changed in place."""
    options: dict[str, Any] = {"mode": job["modes"], "cache_dir": str(folder / "cache")}
    if job["mutated"]:
        # The operator is declared to change nothing: what it does change has an address that stays.
        context = importlib.import_module("rebel.compile_context").CompileContext(use_weight_sharing=True)
        for name in job["mutated"]:
            context.mark_static_address(tensors[name])
        options["compile_context"] = context
    return options


def main(folder: Path) -> None:
    """Compile the operator of a folder, run it there, and write what it gives.

    Args:
        folder: has ``job.json``, ``device_module.py`` and ``inputs.pt``; ``results.pt`` is written there.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sys.path.insert(0, str(folder))
    rebel = importlib.import_module("rebel")
    importlib.import_module("device_module")
    if _BACKEND not in torch._dynamo.list_backends(exclude_tags=()):
        importlib.import_module("rebel.core.torch_compile")
    tensors = torch.load(folder / "inputs.pt", weights_only=True)
    model = Model(getattr(getattr(torch.ops, job["namespace"]), job["operator"]))
    options = options_of(job, folder, tensors)
    compiled = torch.compile(model, backend=_BACKEND, dynamic=False, options=options)
    with torch.no_grad():
        results = compiled(*(tensors[name] for name in job["inputs"]))
    outputs = [results] if isinstance(results, torch.Tensor) else list(results)
    written = {
        "outputs": [each.detach().cpu() for each in outputs],
        "mutated": {name: tensors[name].cpu() for name in job["mutated"]},
        "compiler": str(getattr(rebel, "__version__", "")),
    }
    torch.save(written, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
