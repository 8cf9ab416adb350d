"""How the app looks: colours of the modalities, theme, style sheet, the line at the top."""

from __future__ import annotations

from html import escape
from typing import Any

COLOURS = {
    "text": "#6366f1",
    "picture": "#f59e0b",
    "sound": "#10b981",
    "video": "#ec4899",
    "shape": "#0ea5e9",
    "control": "#94a3b8",
}
"""Of each medium, on the page and in the strips of tokens."""
CSS = """
.gradio-container { max-width: 1180px !important; width: 100%; margin: auto; }
.gradio-container main, .gradio-container .wrap.fillable { width: 100%; }
.tabs { width: 100%; }
.head { display: flex; align-items: center; gap: 14px; flex-wrap: wrap; padding: 6px 0 2px; }
.head .name { font-size: 30px; font-weight: 800; letter-spacing: -1px;
  background: linear-gradient(90deg, #6366f1, #ec4899, #f59e0b); -webkit-background-clip: text; color: transparent; }
.head .dots { display: inline-flex; gap: 5px; }
.head .dots i { width: 11px; height: 11px; border-radius: 4px; display: inline-block; }
.head .what { color: var(--body-text-color-subdued); }
.pictures img, .chat img { image-rendering: pixelated; object-fit: contain !important; }
.pictures .grid-wrap { overflow-y: auto; }
.moving video { image-rendering: pixelated; object-fit: contain; }
.chat button[aria-label="Share"] { display: none; }
.chat .message img { width: 192px; max-width: 60vw; height: auto; border-radius: 10px; }
.note { min-height: 1.6em; color: var(--body-text-color-subdued); }
.cannot .cannot { border: 0; padding: 0 !important; }
.cannot { border: 1px dashed var(--border-color-primary); border-radius: 12px; padding: 22px !important; }
.strip { display: flex; flex-wrap: wrap; gap: 3px; margin: 8px 0 14px; }
.strip div { width: 30px; border-radius: 6px; text-align: center; color: #fff; font: 11px/1.25 ui-monospace, monospace;
  padding: 3px 0; overflow: hidden; }
.strip b { display: block; color: #fff; font-size: 12px; height: 15px; overflow: hidden; }
.strip .noisy { outline: 2px dashed #f43f5e; outline-offset: -2px; }
.strip .swatch { display: block; height: 13px; margin: 1px 4px; border-radius: 3px; border: 1px solid #fff8; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; }
.legend i { width: 11px; height: 11px; border-radius: 3px; display: inline-block; margin-right: 5px; }
.matrix svg { width: min(100%, 460px); height: auto; display: block; border-radius: 8px; background: #8881; }
@media (max-width: 480px) { .gradio-container { padding: 8px !important; } .head .name { font-size: 24px; } }
"""
"""Small pictures are enlarged, each pixel to a square: a blur would hide what the model drew."""


def theme() -> Any:
    """Fonts of the visitor's system: nothing is fetched from elsewhere."""
    import gradio as gr

    return gr.themes.Soft(
        primary_hue="indigo",
        secondary_hue="pink",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


def head(names: list[str]) -> str:
    """The line at the top: the name, a dot a modality, the models."""
    dots = "".join(f'<i style="background:{colour}" title="{name}"></i>' for name, colour in COLOURS.items())
    models = ", ".join(names) or "none"
    return (
        f'<div class="head"><span class="name">mm</span><span class="dots">{dots}</span>'
        f'<span class="what">One decoder, one token stream, every modality · {escape(models)}</span></div>'
    )
