"""Which model a run trains: from a config map, a preset, or a folder with weights.

A source is cheap to make and to send to other processes. transformers, which takes seconds to import, is imported when
a model or its full config is asked for, never before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from paceline.config import ModelConfig
from paceline.errors import ConfigError, ModelError
from paceline.models import attention
from paceline.models import settings as checked
from paceline.models.heads import Head, auto_class, is_encoder, model_class, require_head
from paceline.models.initialise import materialise
from paceline.models.locate import has_tokenizer, locate, read_json
from paceline.models.presets import PRESETS
from paceline.models.weights import load
from paceline.registry import unknown

POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Families whose positions count from the padding id: the first pad + 1 rows of the position table are never used."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that can be described without memory (``meta``) and built with its values (``build``)."""

    head: Head
    settings: Mapping[str, Any]
    """The config as written: the user's map, the preset's, or the folder's ``config.json``."""
    folder: Path | None = None
    """Where the weights are; None for a model that starts from random values."""
    attention: str = "auto"
    token_ids: Mapping[str, int] = field(default_factory=dict)
    """``bos_token_id`` and so on of a tokenizer made for this model; the settings win over them."""

    @classmethod
    def of(cls, config: ModelConfig, head: Head) -> Self:
        """The source a config names. Raises ``ConfigError`` for an unknown preset, ``ModelError`` for a bad path."""
        if config.preset is not None:
            if config.preset not in PRESETS:
                raise ConfigError(f"model.preset={config.preset!r}: {unknown(config.preset, PRESETS)}")
            return cls(head=head, settings=PRESETS[config.preset], attention=config.attention)
        if config.config is not None:
            return cls(head=head, settings=config.config, attention=config.attention)
        assert config.path is not None  # ModelConfig has seen to it that one of the three is given
        folder = locate(config.path)
        settings = read_json(folder / "config.json")
        _refuse_unreadable(folder, settings)
        return cls(head=head, settings=settings, folder=folder, attention=config.attention)

    @property
    def family(self) -> str:
        """The ``model_type`` of transformers."""
        return str(self.settings["model_type"])

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embedding; None for a config that leaves it to the tokenizer. ``ConfigError`` if not a count."""
        text = self.settings.get("text_config")
        inner = text.get("vocab_size") if isinstance(text, Mapping) else None
        size = self.settings.get("vocab_size", inner)
        if size is None:
            return None if self.folder is None else int(self.hugging_face_config().get_text_config().vocab_size)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"model.config.vocab_size={size!r}: expected a whole number of at least 1")
        return size

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the config allows for, in tokens; None for a family without such a limit."""
        config = self.hugging_face_config().get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if not isinstance(positions, int) or positions <= 0:
            return None
        return positions - config.pad_token_id - 1 if self.family in POSITIONS_AFTER_PADDING else positions

    @property
    def tokenizer(self) -> str | None:
        """The folder of the model's own tokenizer, if it brings one."""
        return str(self.folder) if self.folder is not None and has_tokenizer(self.folder) else None

    def with_vocabulary(self, size: int, special: Mapping[str, int | None] | None = None) -> Self:
        """This source for a tokenizer of ``size`` entries whose special token ids are ``special`` (bos, eos, pad, ...).

        Sets what the config leaves open; a folder with weights stays as it is. A padding id that is also another
        special token is left out, for its embedding row would never be trained. Raises ``ModelError`` if the model has
        fewer rows than the tokenizer has entries.
        """
        rows = self.vocabulary
        if rows is not None and size > rows:
            raise ModelError(
                f"the tokenizer has {size} entries but the model's vocabulary has {rows}. Use the model's own "
                f"tokenizer, or a model with vocab_size of at least {size}."
            )
        if self.folder is not None:
            return self
        ids = {f"{name}_token_id": token for name, token in (special or {}).items() if token is not None}
        ids = {name: token for name, token in ids.items() if name in checked.TOKEN_IDS}
        if ids.get("pad_token_id") in (ids.get("bos_token_id"), ids.get("eos_token_id")):
            ids.pop("pad_token_id", None)
        return replace(self, settings={"vocab_size": size, **self.settings}, token_ids=ids)

    def hugging_face_config(self) -> Any:
        """The config object of transformers, new at every call. Raises ``ConfigError`` or ``ModelError``.

        An encoder-decoder's always has ``decoder_start_token_id``: the one given, else padding, bos or eos.
        """
        if self.folder is None:
            config = checked.hugging_face_config(self.settings, self.token_ids)
        else:
            config = _read_config(self.folder)
        if self.head == "causal" and is_encoder(self.family) and not config.is_encoder_decoder:
            config.is_decoder = True  # else attention looks both ways and sees the tokens to predict
        return config

    def meta(self) -> nn.Module:
        """The model on the meta device: names, shapes and ties, in training mode, without memory.

        Raises ``ModelError`` if the family does not have the head or cannot be built as configured.
        """
        config = self.hugging_face_config()
        require_head(self.family, self.head)
        implementation = self._attention()
        try:
            with torch.device("meta"):
                model = auto_class(self.head).from_config(
                    config, dtype=torch.float32, attn_implementation=implementation
                )
        except Exception as error:  # each family raises what it likes
            raise ModelError(
                f"model family {self.family!r} refuses this config: {' '.join(str(error).split())}"
            ) from error
        return model.train()  # type: ignore[no-any-return]

    def build(
        self, seed: int, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
    ) -> nn.Module:
        """The model with its values, in training mode: weights of the folder, else a function of (seed, name) alone.

        Values are made or read in fp32 on the CPU, then parameters are rounded to ``dtype``; buffers stay as they are.
        None leaves the weights of a folder in the dtype in which they are stored: they are then mapped, not read.
        Raises ``ModelError`` as ``meta`` does, or if the folder's weights do not fit.
        """
        if self.folder is None:
            model = self.meta()
            materialise(model, seed)
        else:
            require_head(self.family, self.head)
            config = self.hugging_face_config()
            as_stored = dtype is None
            model = load(self.folder, self.head, config, seed=seed, attention=self._attention(), as_stored=as_stored)
        if dtype is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        return model.to(device)

    def _attention(self) -> str | None:
        """The name transformers knows the attention by; None leaves the choice to it."""
        if self.attention == "auto":
            return None
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention.register()
        known = ["auto", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
        if self.attention not in known:
            raise ConfigError(f"model.attention={self.attention!r}: {unknown(self.attention, known)}")
        if self.attention in attention.OURS:
            attention.check(model_class(self.family, self.head), self.attention)
        return self.attention


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each family raises what it likes
        raise ModelError(f"{folder / 'config.json'} is refused: {' '.join(str(error).split())}") from error
    if config.is_encoder_decoder and getattr(config, checked.DECODER_START, None) is None:
        generation = folder / "generation_config.json"
        own = read_json(generation).get(checked.DECODER_START) if generation.is_file() else None
        config.decoder_start_token_id = checked.first_token(config) if own is None else own
    return config


def _refuse_unreadable(folder: Path, settings: Mapping[str, Any]) -> None:
    if "model_type" not in settings:
        raise ModelError(f"{folder / 'config.json'} has no model_type; expected the config of a transformers model.")
    if "quantization_config" in settings:
        raise ModelError(f"{folder} holds quantised weights, which cannot be trained. Use the model's full weights.")
