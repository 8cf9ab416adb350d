"""One decoder, one token stream, every modality: a system is tokenizer × order × head.

`import mm` loads nothing heavy; the names below are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` finds at run time, for type checkers and editors
    from mm.pipelines.any_to_any import AnyToAnyPipeline as AnyToAnyPipeline
    from mm.pipelines.image_to_text import ImageToTextPipeline as ImageToTextPipeline
    from mm.pipelines.text_to_image import TextToImagePipeline as TextToImagePipeline

__version__ = "0.1.0"

_LAZY = {
    "AnyToAnyPipeline": "mm.pipelines.any_to_any",
    "ImageToTextPipeline": "mm.pipelines.image_to_text",
    "TextToImagePipeline": "mm.pipelines.text_to_image",
}

__all__ = ["AnyToAnyPipeline", "ImageToTextPipeline", "TextToImagePipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mm' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
