"""Set before torch is imported anywhere, and inherited by every process that a test starts."""

import os

# Megatron compiles small functions on their first call: seconds of C++ compilation that help nothing here.
# The launcher sets the same for workers on the CPU.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
