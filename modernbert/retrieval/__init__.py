"""Documents in, ranked passages out: `corpus` reads, `search` ranks, `explain` says why."""
