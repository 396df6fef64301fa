"""Run LFM2-24B-A2B on your own hardware: an engine, a service and a command line.

Importing this package does nothing: no torch import, CUDA probe, logging set-up or environment read.
`LLM` (the in-process engine) is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from lfm.llm import LLM

        return LLM
    raise AttributeError(f"module 'lfm' has no attribute {name!r}")
