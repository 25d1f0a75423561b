"""LoRA: low-rank adapters beside frozen layers."""

from memplan.passes.lora.lora import add_lora, merge_lora, unmerge_lora
from memplan.passes.lora.save_load import load_lora, lora_like, save_lora

__all__ = ["add_lora", "load_lora", "lora_like", "merge_lora", "save_lora", "unmerge_lora"]
