"""Pipelines: a checkpoint, one call, what was asked for. `mm.TextToImagePipeline` and its siblings."""
