"""Optimizer steps that are left out because a loss or a gradient is no finite number."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.report.metrics import write_whole


class BadSteps:
    """Counts them and writes down their rows. The engine has left such a step out already: a gradient that is not
    finite, as `backward` makes that of a loss that is not, changes no weight on any rank."""

    LIMIT = 3  # in a row

    def __init__(self, output_dir: str, rank: int, say: Callable[[str], None]):
        self.output_dir, self.rank, self.say = Path(output_dir), rank, say
        self.number = self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number, self.in_a_row = state["number"], state["in_a_row"]

    def found(self, name: str, values: Mapping[str, float], rows: Callable[[], list[dict[str, Any]]]) -> bool:
        """Whether the step is one.

        Args:
            name: of the step, for people and for the file: "step 12", "step 12, minibatch 3".
            values: losses and norms of the step, the same on every rank.
            rows: this rank's, called for a bad step: ``repro/step_12.json``, above rank 0 in a folder of its own.

        Raises:
            RuntimeError: it is the third in a row.
            UserError: the file cannot be written.
        """
        bad = [value for value in values if not math.isfinite(values[value])]
        if not bad:
            self.in_a_row = 0
            return False
        self.number += 1
        self.in_a_row += 1
        folder = self.output_dir / f"rank{self.rank}" if self.rank else self.output_dir
        path = folder / "repro" / f"{name.replace(', ', '_').replace(' ', '_')}.json"
        record = {"step": name, "values": {key: str(value) for key, value in values.items()}, "rows": rows()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(record, indent=1))
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); make room there") from None
        self.say(f"{name} left out: {', '.join(bad)} not finite; its rows are in {path}")
        if self.in_a_row == self.LIMIT:
            raise RuntimeError(
                f"{self.LIMIT} steps in a row are not finite, the last one {name}; look at {path.parent}, lower the "
                "learning rate, or use --dtype bf16 or fp32; the same command continues from the last checkpoint"
            )
        return True
