"""Tools from a Python file that the user names. Importing it runs it, with all the rights of the user."""

import importlib.util
import inspect
import logging
import sys
from pathlib import Path

from lfm.agent.tools import Tool, tool
from lfm.errors import UsageError

logger = logging.getLogger(__name__)


def load_tools(path: Path) -> list[Tool]:
    """Make tools of the functions in a file: those that `__all__` names, else its public ones, in their order.

    A `Tool` under such a name counts too. Raises UsageError if the file cannot be imported or holds no function.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file. Name a Python file with functions in it.")
    name = f"lfm_tools_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file. Its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up by name
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # for the modules beside it; at the end, so that none of them hides another
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        logger.debug("importing %s failed", path, exc_info=True)
        raise UsageError(f"{path} cannot be imported ({type(error).__name__}: {error}). Mend it.") from error
    public = getattr(module, "__all__", None)
    if public is None:
        public = [key for key, value in vars(module).items() if not key.startswith("_") and _is_own(value, name)]
    try:
        found = [getattr(module, key) for key in public]
    except AttributeError as error:
        raise UsageError(f"{path} lists a name in __all__ that it does not define ({error}). Mend it.") from error
    tools = [item if isinstance(item, Tool) else tool(item) for item in found]
    if not tools:
        raise UsageError(f"{path} has no functions. Define some; names that begin with _ are left out.")
    return tools


def _is_own(value: object, module_name: str) -> bool:
    """Whether a public name is a tool: what the file imports from elsewhere is not."""
    return isinstance(value, Tool) or (inspect.isfunction(value) and value.__module__ == module_name)
