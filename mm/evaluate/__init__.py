"""`mm evaluate`: every quality figure of a model as a table and JSON.

One file a family: `tokenizer`, `digits`, `emoji`, `styles`, `bytes` (pictures as files), `video`, `shapes`, those of speech;
`protocol` holds every constant, `subject` is the model under test, `gallery` the real pictures, `networks` the judges that are
trained here, `motion` what is measured without one, `results` the figures.
From Python: `mm.evaluate.run.evaluate(model_or_pipeline, {"digits": source, "emoji": source})`.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Raises `ValueError` for what the user can mend."""
    from mm.evaluate.command import main as run

    return run(argv)
