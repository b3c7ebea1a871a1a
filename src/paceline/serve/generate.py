"""Continuing a prompt with a trained model, piece by piece, as it is written."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

from safetensors import SafetensorError

from paceline.config import read_tree
from paceline.errors import ConfigError, ModelError


def generate(run: Path, prompt: str, *, tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """Yield the text that follows ``prompt``; ``run`` is a run's folder or a Hugging Face folder.

    Raises ``ModelError`` if there is no exported model, or if it does not write from left to right.
    """
    folder = run / "export" if (run / "export").is_dir() else run
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{run} holds no trained model (no export/config.json); a run writes it when it ends or is stopped"
        )
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one character to continue")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("the prompt is not valid UTF-8") from None
    _refuse_backward(folder)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    if "CausalLM" not in name and "LMHead" not in name:
        raise ModelError(
            f"{folder} holds {name or 'a model'}, which does not continue text; train with objective=next_token"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder} cannot be loaded, a file of it is missing or damaged: {reason}") from error
    yield from _stream(model, tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed)


def _refuse_backward(folder: Path) -> None:
    """A right-to-left model is stored like any other: only the config of its run says what it learned."""
    config = folder.resolve().parent / "config.yaml"
    if folder.resolve().name != "export" or not config.is_file():
        return
    if read_tree(config).get("objective", {}).get("name") == "right_to_left":
        raise ModelError(
            f"{folder} writes from right to left and cannot continue a prompt; the texts it wrote before the "
            "evaluate.prompts of its run stand in the report"
        )


def _stream(model: Any, tokenizer: Any, prompt: str, *, tokens: int, temperature: float, seed: int) -> Iterator[str]:
    import torch
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and inputs.input_ids.shape[1] + tokens > limit:
        raise ConfigError(
            f"the prompt has {inputs.input_ids.shape[1]} tokens, and {tokens} more are asked for; the model has "
            f"{limit} positions. Shorten one of them."
        )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    left = Event()

    def run() -> None:
        torch.manual_seed(seed)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
        )
        try:
            model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([lambda ids, _: torch.full(ids.shape[:1], left.is_set())]),
                **sampling,
            )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:  # whoever reads may leave early, and the process must not end while torch computes
        left.set()
        thread.join()
    if failure:
        raise ModelError(f"generation failed: {type(failure[0]).__name__}: {failure[0]}") from failure[0]
