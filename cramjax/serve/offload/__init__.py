"""Generation with models larger than memory: weights, cache and activations over device, host and disk (FlexGen)."""
