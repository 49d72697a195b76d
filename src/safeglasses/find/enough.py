"""How many samples are enough. It stands alone, since what only reads results asks it without PyTorch."""

FEWEST = 10
"""Samples of each class that an expert's neuron must have met to be rated. Whatever is selected rests on the normal
approximation of Mann and Whitney's U, which they found close from 8 of each on; and among few samples perfect
separation is chance: 1 in 184,756 for 10 and 10, 1 in 252 for 5 and 5, where millions of neurons are looked at."""
