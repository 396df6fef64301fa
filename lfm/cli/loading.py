"""Loading a model into this process, with its progress on stderr."""

from lfm.cli.terminal import PhaseLine
from lfm.config import EngineConfig
from lfm.llm import LLM


def load_llm(config: EngineConfig) -> LLM:
    """Load a model. Raises LfmError for a model or a machine that cannot do it."""
    phases = PhaseLine()
    try:
        llm = LLM(config, on_phase=phases)
    except BaseException:
        phases.close()
        raise
    info = llm.engine.info
    phases.finish(f"{llm.source.name} is loaded on {info.device} in {info.dtype}")
    return llm
