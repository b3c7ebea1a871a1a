"""Train a module of your own in your own loop: data order, mixed precision, replicas and checkpoints come with it.

python examples/own_module.py                                  one process
torchrun --nproc-per-node 2 examples/own_module.py replicas=2  two replicas that share each batch
"""

import sys

import torch
from torch import nn

import paceline
from paceline.config import override


class GruLanguageModel(nn.Module):
    """Embedding, two GRU layers, and a head that shares the embedding's weights."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.GRU(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, S) token ids to (B, S, V) logits."""
        hidden_BSD, _ = self.layers(self.embedding(input_ids))
        logits_BSV: torch.Tensor = self.head(hidden_BSD)
        return logits_BSV


CONFIG = {
    "data": {"source": "python-docs", "vocabulary": 1024},
    "batch": {"sequences": 16, "sequence_tokens": 128},
    "optimizer": {"name": "adamw", "lr": 3.0e-3},
    "precision": "fp32",
    "train": {"steps": 100, "output": "runs/own_module"},
    "track": {"display": "none"},
}


def main() -> None:
    torch.manual_seed(0)  # every replica must start from the same weights: it is checked
    config = override(CONFIG, sys.argv[1:])
    with paceline.Trainer(config, model=GruLanguageModel(1024, 128)) as trainer:
        for event in trainer.steps():
            if event.step % 10 == 0:
                print(f"step {event.step}  loss {event.loss:.3f}  {event.tokens_per_s:,.0f} tokens/s")
        print(f"held-out: {trainer.evaluate().bits_per_byte:.2f} bits per byte")


if __name__ == "__main__":
    main()
