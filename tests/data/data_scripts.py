"""What the tests of the data scripts share: a script as a module, and git's hash."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def blob(content: bytes) -> str:
    """The id git gives these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def load_script(path: Path) -> ModuleType:
    """A script as a module; its folder is on the path while it loads, as it is when it runs."""
    sys.path.insert(0, str(path.parent))
    try:
        specification = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
