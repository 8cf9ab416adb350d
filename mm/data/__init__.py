"""Data: sources of examples → documents → packed token streams.

`sources` (random access) and `streaming` (shards too large or too far away for it) give examples; `documents` turns an
example into a list of segments; `loader` packs laid-out documents into batches; `module` is the LightningDataModule;
`cache` keeps encoded items; `convert` makes and converts data sets.
"""
