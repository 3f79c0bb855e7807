"""Collect figures of a step over the ranks (`collect`), write and print them; `registry` declares them."""
