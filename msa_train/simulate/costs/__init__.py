"""Add up what a layer costs: bytes and seconds of its transfers and kernels."""
