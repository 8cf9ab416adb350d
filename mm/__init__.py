"""One decoder, one token stream, every modality: a system is tokenizer × order × head.

`import mm` loads nothing heavy; the names below are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` finds at run time, for type checkers and editors
    from mm.audio import Audio as Audio
    from mm.audio import load_audio as load_audio
    from mm.pipelines.any_to_any import AnyToAnyPipeline as AnyToAnyPipeline
    from mm.pipelines.image_to_3d import ImageTo3DPipeline as ImageTo3DPipeline
    from mm.pipelines.image_to_text import ImageToTextPipeline as ImageToTextPipeline
    from mm.pipelines.shape_to_text import ShapeToTextPipeline as ShapeToTextPipeline
    from mm.pipelines.speech_to_text import SpeechToTextPipeline as SpeechToTextPipeline
    from mm.pipelines.text_to_3d import TextTo3DPipeline as TextTo3DPipeline
    from mm.pipelines.text_to_image import TextToImagePipeline as TextToImagePipeline
    from mm.pipelines.text_to_speech import Edit as Edit
    from mm.pipelines.text_to_speech import TextToSpeechPipeline as TextToSpeechPipeline
    from mm.pipelines.text_to_video import TextToVideoPipeline as TextToVideoPipeline
    from mm.video import Video as Video
    from mm.video import load_video as load_video

__version__ = "0.1.0"

_LAZY = {
    "AnyToAnyPipeline": "mm.pipelines.any_to_any",
    "Audio": "mm.audio",
    "Edit": "mm.pipelines.text_to_speech",
    "ImageTo3DPipeline": "mm.pipelines.image_to_3d",
    "ImageToTextPipeline": "mm.pipelines.image_to_text",
    "ShapeToTextPipeline": "mm.pipelines.shape_to_text",
    "SpeechToTextPipeline": "mm.pipelines.speech_to_text",
    "TextTo3DPipeline": "mm.pipelines.text_to_3d",
    "TextToImagePipeline": "mm.pipelines.text_to_image",
    "TextToSpeechPipeline": "mm.pipelines.text_to_speech",
    "TextToVideoPipeline": "mm.pipelines.text_to_video",
    "Video": "mm.video",
    "load_audio": "mm.audio",
    "load_video": "mm.video",
}

__all__ = [
    "AnyToAnyPipeline",
    "Audio",
    "Edit",
    "ImageTo3DPipeline",
    "ImageToTextPipeline",
    "ShapeToTextPipeline",
    "SpeechToTextPipeline",
    "TextTo3DPipeline",
    "TextToImagePipeline",
    "TextToSpeechPipeline",
    "TextToVideoPipeline",
    "Video",
    "__version__",
    "load_audio",
    "load_video",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mm' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
