"""Plan a step of a 6.7 B parameter Llama on an H100, on any machine: nothing is allocated.

python examples/plan_without_a_gpu.py --budget 40GiB
python examples/plan_without_a_gpu.py --device a100 --budget 50% --batch-size 2 --explain
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import transformers

import memplan


def main() -> None:
    """Plan, and print the plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h100", help="one of memplan.costs.DEVICES")
    parser.add_argument("--budget", default="50%", help='such as "40GiB" or "50%%"')
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--explain", action="store_true", help="say what is at the peak")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=arguments.layers,
        num_attention_heads=32,
        vocab_size=32000,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()
        tokens = torch.zeros(arguments.batch_size, arguments.context, dtype=torch.long)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters / 1e9:.2f} B parameters, {tuple(tokens.shape)} tokens")
    start = time.perf_counter()
    plan = memplan.plan(
        model,
        {"input_ids": tokens, "labels": tokens},
        budget=arguments.budget,
        options=memplan.Options(device=arguments.device),
    )
    planning_s = time.perf_counter() - start
    print(plan.explain() if arguments.explain else plan)
    host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    host = memplan.format_bytes(host_bytes)
    print(f"planned in {planning_s:.1f} s, with at most {host} of host memory")


if __name__ == "__main__":
    main()
