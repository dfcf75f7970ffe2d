"""Data sets to train and measure on."""
