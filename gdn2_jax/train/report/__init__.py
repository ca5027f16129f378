"""Records of a run: metrics, skipped batches, plot, final table."""
