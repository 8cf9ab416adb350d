"""A byte-level BPE trained on one's own captions: shorter prompts than bytes, lossless on any text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mm.safe_io import atomic_file

MAX_VOCAB = 1_000_000
"""Largest vocabulary. The trainer takes memory for all of it at once, and aborts the process where there is not enough."""


def train_bpe(texts: Iterable[str], folder: str | Path, vocab_size: int = 1024) -> Path:
    """Train a byte-level BPE of `vocab_size` ids (256 of them the bytes) and write `tokenizer.json` into `folder`.

    The folder is what `mm.tokenizers.text_hf` reads. Raises `ValueError` for fewer than 257 ids, more than `MAX_VOCAB`,
    or no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"a byte-level BPE needs at least 257 ids (256 bytes and one merge), got {vocab_size}")
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"a BPE of one's own has at most {MAX_VOCAB:,} ids, got {vocab_size:,}; give fewer")
    lines = [text for text in texts if text]
    if not lines:
        raise ValueError("no text to train a BPE on; give a source whose examples have captions")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    target = Path(folder) / "tokenizer.json"
    with atomic_file(target) as temporary:
        tokenizer.save(str(temporary))
    return target
