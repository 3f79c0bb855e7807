"""Figures of a step: collected over ranks, written, printed."""
