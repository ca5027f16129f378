"""What a training run has to survive, done to real runs of a tiny model."""
