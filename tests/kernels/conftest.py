"""Lets Triton's interpreter (3.6) run loops whose bounds are loaded.

It keeps scalars as arrays of one element and passes those to `int`, which numpy 2.4 refuses.
"""

from typing import Any

from support.kernel_checks import HAS_GPU

from baton.kernels.jit import HAS_TRITON

if HAS_TRITON and not HAS_GPU:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index
