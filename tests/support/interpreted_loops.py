"""Lets Triton's interpreter (3.6) run loops whose bounds are loaded.

It keeps scalars as arrays of one element and passes those to `int`, which numpy 2.4 refuses.
"""

from typing import Any


def allow_loaded_bounds() -> None:
    """Patch the interpreter of this process."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
