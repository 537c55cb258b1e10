"""What the evaluation scripts share: flags, candidates and baselines, one interleaved clock, one result cache."""
