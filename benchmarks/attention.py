"""Attention in bf16 on a CPU: ours beside torch's `scaled_dot_product_attention`, forward and backward, turn by turn.

    python benchmarks/attention.py                                 16 rows of 128 tokens, 4 heads of 64
    python benchmarks/attention.py --rows 4 --tokens 512 --json attention.json
    python benchmarks/attention.py --rows 16 --tokens 128 --queries 1        a step of decoding, forward alone

Rows are padded on the left, from none to half of them, as prompts in a batch are. Work counts what padding and the
causal mask leave; torch's side is what Hugging Face calls.
"""

from collections.abc import Callable
from types import SimpleNamespace

from dschat.errors import UserError, run_program
from dschat.models.attention import attention

import torch
from harness import median, parser, phase_header, phase_row, ratios, report
from machine import measure_limits
from shapes import Work
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from turns import Facts, interleave, now

LAYER = SimpleNamespace(is_causal=True, num_key_value_groups=1)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=16)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--queries", type=int, help="of them; default: all")
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--head_size", type=int, default=64)
    made.add_argument("--calls", type=int, default=20, help="in a turn")
    made.add_argument("--repeats", type=int, default=10)
    args = made.parse_args()
    queries = args.queries or args.tokens
    if not 1 <= queries <= args.tokens:
        raise UserError(f"--queries {queries}: expected from 1 to --tokens")
    torch.manual_seed(args.seed)
    limits = measure_limits(torch.device("cpu"), torch.bfloat16)
    shape = (args.rows, args.tokens, args.heads, args.head_size)
    q, k, v = (torch.randn(shape).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3))
    q = q[:, :, -queries:].detach().requires_grad_()
    upstream = torch.randn(args.rows, queries, args.heads, args.head_size).bfloat16()
    real = torch.arange(args.tokens) >= (torch.arange(args.rows) * args.tokens // 2 // args.rows)[:, None]
    mask = (torch.ones(args.tokens, args.tokens, dtype=torch.bool).tril()[-queries:] & real[:, None])[:, None]

    def side(function: Callable) -> Callable[[], Facts]:
        def turn() -> Facts:
            facts: Facts = {"sequences": args.rows * args.calls, "forward_s": 0.0, "backward_s": 0.0}
            for _ in range(args.calls):
                begin = now()
                with torch.set_grad_enabled(queries > 1):
                    result = function(LAYER, q, k, v, mask)[0]
                facts["forward_s"] += now() - begin
                if queries > 1:
                    begin = now()
                    result.backward(upstream)
                    facts["backward_s"] += now() - begin
                    q.grad = k.grad = v.grad = None
            return facts

        return turn

    sides = {"dschat": side(attention), "torch": side(sdpa_attention_forward)}
    _, turns = interleave(sides, 2, args.repeats, lambda facts: None)
    pairs = 2 * args.heads * args.head_size * int(mask.sum()) * args.calls  # multiplied and added in one product
    moved = 2 * (q.numel() + k.numel() + v.numel() + upstream.numel()) * args.calls
    work = {"forward": Work(2 * pairs, moved), "backward": Work(4 * pairs, 2 * moved)}
    phases = ("forward", "backward") if queries > 1 else ("forward",)
    rows = [phase_row(n, p, median(f, f"{p}_s"), work[p], limits, []) for n, f in turns.items() for p in phases]
    rates = {n: [f["sequences"] / (f["forward_s"] + f["backward_s"]) for f in facts] for n, facts in turns.items()}
    report(args, limits, phase_header(), rows, turns=turns, ratios=ratios(rates))


if __name__ == "__main__":
    run_program(main)
