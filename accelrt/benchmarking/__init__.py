"""Measuring models and operators: paired, interleaved, within one run."""
