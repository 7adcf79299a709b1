"""Evaluation: generation, scoring, answer extraction and the command behind commonsense_evaluate.py."""
