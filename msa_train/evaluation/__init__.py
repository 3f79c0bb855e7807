"""Measure what a model does with long contexts: tasks with known answers, losses by position, selections."""
