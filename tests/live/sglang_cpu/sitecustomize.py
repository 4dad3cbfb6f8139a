"""Python runs this at its start: where SGLang's host buffers would be pinned memory, they become plain memory."""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

_MODULE = "sglang.srt.mem_cache.pool_host.common"


class _Unpinned(importlib.abc.MetaPathFinder):
    """Changes one entry of the module's table as the module is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            module.ALLOC_MEMORY_FUNCS["cpu"] = _allocate

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _allocate(dims: Any, dtype: Any, device: Any, pin_memory: bool, allocator: Any, *args: Any, **options: Any) -> Any:
    return allocator.allocate(dims, dtype=dtype, device=device)


sys.meta_path.insert(0, _Unpinned())
