"""A fast op and its reference are called the same way."""

import importlib
import inspect
import pkgutil

import lfm.kernels


def test_every_op_has_the_signature_of_its_reference() -> None:
    pairs = 0
    for module_info in pkgutil.iter_modules(lfm.kernels.__path__, "lfm.kernels."):
        module = importlib.import_module(module_info.name)
        for name, reference in inspect.getmembers(module, inspect.isfunction):
            fast = getattr(module, name.removesuffix("_ref"), None)
            if name.endswith("_ref") and fast is not None:
                pairs += 1
                assert inspect.signature(fast) == inspect.signature(reference), f"{module_info.name}: {name}"
    assert pairs >= 1
