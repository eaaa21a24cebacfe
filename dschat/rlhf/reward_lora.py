"""Scores of a reward model that is an adapter on the reference: no second model in memory."""

from typing import TYPE_CHECKING

from dschat.engine.distributed import Runtime
from dschat.engine.micro_batches import MicroBatches
from dschat.errors import UserError
from dschat.models.scorer import check_probes, padding_gap, score_token_ids
from dschat.rlhf.rewards import Judged, Samples
from dschat.rlhf.rlhf_engine import require_same_tokenizer

import torch
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from dschat.models.adapters import AdapterScorer  # imports PEFT, which takes a second


class LoraReward:
    """The reward source ``lora``; `dschat.models.adapters.add_adapter_reward` makes its ``scorer`` of the reference.

    Make this when the reference is where it will stay, on its device or sharded: with ``verify`` (for a ``scorer``
    with the statistics of step 2) the stored probe texts prove that adapter, head and this trunk score as in training.
    Where the reference is sharded (ZeRO 3), that and each call are collectives: every rank brings equally many
    responses.

    Raises:
        UserError: another tokenizer than the adapter's; scores other than in training, as on another trunk.
    """

    name = "lora"

    def __init__(
        self,
        scorer: "AdapterScorer",
        adapter_dir: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        micro_batch_size: int,
        device: torch.device,
        memory: MicroBatches | None = None,
        verify: bool = True,
    ):
        require_same_tokenizer(tokenizer.name_or_path, tokenizer, adapter_dir)
        if verify:
            try:
                check_probes(adapter_dir, scorer)
            except UserError as error:
                raise UserError(f"{error} (an adapter needs the trunk that it was trained on as the actor)") from None
        self.scorer, self.micro_batch_size, self.device = scorer, micro_batch_size, device
        self.pad_token_id: int = tokenizer.pad_token_id
        self.memory = memory or MicroBatches(Runtime(0, 1, device))

    def __call__(self, samples: Samples) -> Judged:
        def ask() -> list[float]:
            size = self.memory.rows(self.micro_batch_size)
            return score_token_ids(self.scorer, samples.token_ids, self.pad_token_id, size, self.device)

        return Judged([*self.memory.ask(ask)])

    def padding_gap(self, samples: Samples) -> float:
        """By how much padding changes the first few scores; see `dschat.models.scorer.padding_gap`."""
        return padding_gap(self.scorer, samples.token_ids, self.pad_token_id, self.device)
