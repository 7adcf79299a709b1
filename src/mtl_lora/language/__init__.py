"""Causal language models that answer in words: the eight commonsense benchmarks and one's own tasks."""
