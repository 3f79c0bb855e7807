"""Time the flash-msa package and of ours in its shape, in the same run."""

from benchmarks.gpu.context import Context, LeftOutError, Step
from benchmarks.gpu.layer import layer_forward, layer_step, make_inputs
from benchmarks.gpu.ours import checks_of_attention
from benchmarks.gpu.problem import make_index, select
from benchmarks.gpu.rival_flash_msa import FLASH_MSA_SIZES, flash_msa_steps, why_not
from benchmarks.gpu.rows import Dense, Row

FORWARD, TRAINING = "flash-msa's shape, forward", "flash-msa's shape, training step"


class FlashMsaPart:
    """Time forward, and forward and backward with the KL loss, selection included on both sides."""

    def __init__(self, context: Context, seq_len: int) -> None:
        self.context, self.seq_len = context, seq_len

    def steps(self) -> dict[str, Step]:
        """Return ours first; theirs cannot harm it."""
        needs = ("selection", *checks_of_attention(FLASH_MSA_SIZES.num_kv_heads, backward=True))
        return {"ours": Step(self._ours, needs), "theirs": Step(self._theirs, after=("ours",))}

    def _ours(self) -> None:
        if reason := why_not():
            raise LeftOutError(f"flash-msa: {reason}")
        context, sizes, kernel = self.context, FLASH_MSA_SIZES, self.context.kernel
        index = make_index(context.tensors, sizes, self.seq_len)
        inputs = make_inputs(context.tensors, sizes, index, select(index, sizes, kernel))

        def selected() -> None:
            inputs.block_indices = select(index, sizes, kernel)

        for what, call in ((FORWARD, layer_forward), (TRAINING, layer_step)):

            def step(call: object = call) -> None:
                selected()
                assert callable(call), "one of the two"
                call(inputs, kernel)

            context.add(Row(what, self.seq_len, context.clock.seconds(step)))

    def _theirs(self) -> None:
        steps = flash_msa_steps(self.context.tensors, self.seq_len)
        for what, step in zip((FORWARD, TRAINING), steps, strict=True):
            self.context.add_dense(Dense(what, self.seq_len, self.context.clock.seconds(step), "flash-msa"))
