"""What is verified: the user's model, made small unless asked otherwise, on rows that show what is often wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from paceline.config import Config
from paceline.data.rows import Row
from paceline.data.tokenizer import SpecialTokens
from paceline.errors import ConfigError
from paceline.models.source import ModelSource
from paceline.objectives.base import ObjectiveContext, ObjectiveOptions
from paceline.train.build import Goal

SMALL: dict[str, int] = {
    "vocab_size": 131,  # divides by no number of ranks
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 16,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "n_layer": 4,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "head_dim": 8,
    "d_kv": 8,
    "query_pre_attn_scalar": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "shared_expert_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 12,
    "max_position_embeddings": 64,
    "n_positions": 64,
}
"""What the sizes of a family's config become, where they are greater."""

SEQUENCES = 7
"""Of a step: divides by no number of ranks either."""
SEQUENCE_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, an objective and rows, as every rank makes them alike."""

    source: ModelSource
    options: ObjectiveOptions
    context: ObjectiveContext
    seed: int

    @classmethod
    def of(cls, config: Config, *, full: bool) -> "Subject":
        """The subject a config gives; ``full`` keeps the model's sizes and weights."""
        if config.model is None:
            raise ConfigError("model is missing; set model.config, model.preset or model.path")
        assert isinstance(config.objective, ObjectiveOptions)
        source = ModelSource.of(config.model, config.objective.head)
        defaults = source.hugging_face_config().to_dict()
        changes = no_dropout(defaults) if full else no_dropout(defaults) | small_sizes(defaults)
        written = source.settings if source.folder is None or full else defaults
        source = replace(source, settings={**written, **changes}, folder=source.folder if full else None)
        if source.vocabulary is None:
            source = source.with_vocabulary(SMALL["vocab_size"])
        assert source.vocabulary is not None
        sentinels = tuple(range(source.vocabulary - 1, source.vocabulary - 21, -1))
        special = SpecialTokens(
            vocabulary=source.vocabulary, end=2, bos=1, eos=2, pad=0, mask=3, cls=1, sep=2, unk=4, sentinels=sentinels
        )
        start = source.hugging_face_config().decoder_start_token_id if source.head == "seq2seq" else None
        return cls(
            source=source,
            options=config.objective,
            context=ObjectiveContext(
                special=special,
                sequence_tokens=SEQUENCE_TOKENS,
                isolate_documents=config.data.isolate_documents,
                decoder_start=0 if source.head == "seq2seq" and start is None else start,
            ),
            seed=config.seed,
        )

    def model(self, dtype: torch.dtype) -> nn.Module:
        """Whole, on the CPU, in ``dtype``; norms and biases at random values, for ones and zeros hide mistakes."""
        model: Any = self.source.build(self.seed).to(dtype)
        if dtype is torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # torch's grouped products know no fp64
        if self.source.folder is None:
            for index, (name, parameter) in enumerate(model.named_parameters()):
                if parameter.ndim == 1:
                    generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.data.add_(0.3 * noise.to(dtype))
                    assert parameter.data.isfinite().all(), name
        whole: nn.Module = model
        return whole

    def goal(self) -> Goal:
        """What the model is to learn."""
        objective = self.options.build(self.context)
        sample = objective.batch(self.rows(0)[1:3], seed=self.seed, step=0)
        return Goal(objective=objective, options=self.options, context=self.context, sample=sample)

    def rows(self, step: int) -> list[Row]:
        """The global batch of a step: rows of uneven length, documents inside them, and one row without a target."""
        most = self.options.row_tokens(self.context)
        return [self._row(step, slot, most) for slot in range(SEQUENCES)]

    def _row(self, step: int, slot: int, most: int) -> Row:
        rng = np.random.default_rng([self.seed, step, slot])
        length = most if slot % 3 else most // 2
        low = min(8, self.context.special.vocabulary - 1)
        high = self.context.special.vocabulary - (20 if self.source.head == "seq2seq" else 0)
        tokens = rng.integers(low, max(high, low + 1), length)
        starts = np.array(sorted({0, *rng.integers(2, max(3, length - 2), 2).tolist()}))
        tokens[starts[starts > 0] - 1] = self.context.special.end
        return Row(step * SEQUENCES + slot, tokens, starts, weight=0.0 if slot == 1 else 1.0)


def small_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes every size of a config small; query and key/value heads keep their ratio's kind: all, some or one."""
    small: dict[str, Any] = {
        key: most for key, most in SMALL.items() if isinstance(size := config.get(key), int) and size > most
    }
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int):
        now = small.get("num_attention_heads", heads)
        small["num_key_value_heads"] = now if groups == heads else 1 if groups == 1 else max(1, now // 2)
    if isinstance(types := config.get("layer_types"), Sequence) and (layers := small.get("num_hidden_layers")):
        small["layer_types"] = list(types[:layers])
    if isinstance(text := config.get("text_config"), Mapping):
        small["text_config"] = {**text, **small_sizes(text)}
    return small


def no_dropout(config: Mapping[str, Any]) -> dict[str, float]:
    """What switches off every dropout of a config."""
    return {key: 0.0 for key, value in config.items() if isinstance(value, float) and value > 0 and "drop" in key}
