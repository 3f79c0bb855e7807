"""Attend with one new token per sequence to a cache, through block selection."""
