"""A run in a few sentences: what came out, what it took, and what was out of the ordinary."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from paceline.track.curves import smooth, smoothing_steps, spikes, stalls
from paceline.track.folder import RunFolder
from paceline.track.words import count, percent, quantity, size, span

MUCH_WAITING = 0.1


Sentence = tuple[str, str, str]
"""What it is about, the number that matters, and the rest."""


def verdict(run: RunFolder) -> list[Sentence]:
    """The sentences, the most important first."""
    results = [_held_out(run), _loss(run), _work(run), _speed(run)] if run.metrics else []
    remarks = [("Remarks", "", sentence) for sentence in _remarks(run)]
    return [sentence for sentence in results if sentence[1]] + remarks


def baselines(run: RunFolder) -> list[tuple[str, float]]:
    """(name, bits per byte) of what the model is compared with."""
    given = run.summary.get("baselines")
    found = given.items() if isinstance(given, dict) else ()
    return [(name, float(value)) for name, value in found if isinstance(value, int | float)]


def bits_per_byte(run: RunFolder) -> float | None:
    """The final held-out bits per byte: of the summary, else of the last evaluation that has it."""
    final = run.summary.get("bits_per_byte")
    if isinstance(final, int | float):
        return float(final)
    measured = run.held_out("bits_per_byte")
    return measured[-1][1] if measured else None


def _held_out(run: RunFolder) -> Sentence:
    final, losses = bits_per_byte(run), run.held_out("loss")
    if final is None:
        return "Held-out text", f"{quantity(losses[-1][1])} nats per token" if losses else "not measured", ""
    compared = [
        f"{percent(abs(final / value - 1))} {'fewer' if final < value else 'more'} than {name} ({quantity(value)})"
        for name, value in baselines(run)
    ]
    best, step = min(
        ((bits, step) for step, bits in run.held_out("bits_per_byte") if bits is not None), default=(final, 0)
    )
    if best < 0.995 * final:
        compared.append(f"the best was {quantity(best)} at step {step:,.0f}")
    return "Held-out text", f"{quantity(final)} bits per byte", "".join(f", {words}" for words in compared)


def _loss(run: RunFolder) -> Sentence:
    losses = [(x, y) for x, y in run.points(run.column("loss")) if y is not None]
    if not losses:
        return "Training loss", "not recorded", ""
    (first_step, first), (last_step, last) = losses[0], losses[-1]
    average = smooth([y for _, y in losses], smoothing_steps(len(losses)))[-1]
    rest = f" (smoothed; {quantity(last)} at step {last_step:,.0f})"
    if len(losses) > 1:
        rest += f", from {quantity(first)} at step {first_step:,.0f}"
    return "Training loss", f"{quantity(average)} nats per token", rest


def _work(run: RunFolder) -> Sentence:
    last, wanted = run.metrics[-1], run.setting("train", "steps")
    rest = f", {count(last['tokens_seen'])} tokens" if "tokens_seen" in last else ""
    if seconds := sum(_known(run, "step_s")):
        rest += f", {span(seconds)} in steps"
    times = [value for record in (*run.metrics, *run.events) if isinstance(value := record.get("time"), int | float)]
    if len(times) > 1:
        rest += f", {span(max(times) - min(times))} from start to end"
    if resumed := [f"{event['step']:,}" for event in run.of_kind("resume")]:
        rest += f"; continued from step {_some(resumed)}"
    return "Work", f"{last['step']:,}{f' of {wanted:,}' if isinstance(wanted, int) else ''} steps", rest


def _speed(run: RunFolder) -> Sentence:
    speeds = _known(run, "tokens_per_s")
    rest = " (median)" if speeds else ""
    if shares := _known(run, "mfu"):
        rest += f", MFU {percent(median(shares))}"
    if memory := _known(run, "memory_bytes"):
        rest += f", {size(max(memory))} of memory at most"
    if formula := run.info and run.info.mfu_formula:
        rest += f"; {formula}"
    return "Speed", f"{median(speeds):,.0f} tokens/s" if speeds else "", rest


def _remarks(run: RunFolder) -> list[str]:
    """What was out of the ordinary, or that nothing was."""
    if not run.metrics:
        return ["No step is finished yet.", *_trouble(run)]
    found = [*_trouble(run), *_odd_losses(run), *_slow(run)]
    return found or ["Nothing out of the ordinary: no warning, no leap of the loss, no stalled step."]


def _trouble(run: RunFolder) -> list[str]:
    remarks = []
    for event in run.of_kind("error")[-1:]:
        remarks.append(f"Error at step {event['step']:,}: {event.get('message', '')}")
    wanted = run.setting("train", "steps")
    if run.metrics and isinstance(wanted, int) and run.metrics[-1]["step"] < wanted:
        remarks.append(f"The run is not finished: {wanted - run.metrics[-1]['step']:,} steps are left.")
    if warnings := run.of_kind("warning"):
        remarks.append(
            f"{len(warnings)} warning{'s' * (len(warnings) != 1)}, the last at step {warnings[-1]['step']:,}."
        )
    if skipped := [f"{record['step']:,}" for record in run.metrics if record.get("skipped")]:
        remarks.append(
            f"{len(skipped)} step{'s' * (len(skipped) != 1)} skipped, because a gradient overflowed in fp16: "
            f"{_some(skipped)}. The loss scale was {_known(run, 'loss_scale')[-1]:,.10g} in the end."
        )
    missing = [a["step"] + 1 for a, b in pairwise(run.metrics) if b["step"] != a["step"] + 1]
    if missing:
        remarks.append(f"Steps are missing in the record from {_some([f'{step:,}' for step in missing])}.")
    return remarks


def _odd_losses(run: RunFolder) -> list[str]:
    losses = run.column("loss")
    remarks = []
    if leaps := spikes(losses):
        steps = [f"{run.metrics[place]['step']:,}" for place in leaps]
        highest = max(value for place in leaps if (value := losses[place]) is not None)
        remarks.append(f"The loss leapt up at step {_some(steps)}, to {quantity(highest)} at most.")
    if lost := [f"{record['step']:,}" for record, loss in zip(run.metrics, losses, strict=True) if loss is None]:
        remarks.append(f"The loss was not a finite number at step {_some(lost)}.")
    return remarks


def _slow(run: RunFolder) -> list[str]:
    seconds, waits = run.column("step_s"), _known(run, "data_wait_s")
    remarks = []
    if places := stalls(seconds, run.session_starts()):
        longest = max(value for place in places if (value := seconds[place]) is not None)
        steps = [f"{run.metrics[place]['step']:,}" for place in places]
        remarks.append(f"Over 5 times the median time at step {_some(steps)}; the longest took {span(longest)}.")
    total = sum(value for value in seconds if value is not None)
    if total and sum(waits) > MUCH_WAITING * total:
        remarks.append(f"{percent(sum(waits) / total)} of the time of the steps went into waiting for data.")
    return remarks


def _known(run: RunFolder, key: str) -> list[float]:
    return [value for value in run.column(key) if value is not None]


def _some(items: Sequence[Any], most: int = 5) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
