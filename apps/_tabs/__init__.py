"""The tabs of `mm app`, a file each, and what they share: models (`shelf`), controls (`common`), looks (`look`)."""
