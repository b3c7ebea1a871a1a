"""``paceline init``: a config to start from, with a word on each line."""

from pathlib import Path

from paceline.errors import ConfigError

STARTER = """\
# Train with:    paceline train {name}
# Look first:    paceline train {name} --dry-run
# Change a value for one run:    paceline train {name} optimizer.lr=1e-3
# All keys, for editors:         paceline schema > paceline.schema.json

model: {{preset: llama-5m}}           # or {{config: {{model_type: llama, ...}}}}, or {{path: FOLDER-OR-HUB-NAME}}
data: {{source: python-docs}}         # a path, directory or glob such as texts/*.jsonl; or a list of them with weights
batch: {{sequences: 16, sequence_tokens: 256}}   # of one step, over all ranks
train: {{steps: 300, output: runs/first}}
replicas: 2                         # copies of the model that share the batch
sync: all_reduce                    # how the copies agree
optimizer: {{name: adamw, lr: 2.0e-3}}
schedule: {{name: cosine}}            # with a warm-up of a twentieth of the steps
precision: auto                     # bf16 where the processor has the units, else fp32
evaluate: {{every: 100, prompts: ["import "]}}
checkpoint: {{every: 100, resume: auto}}         # run the same command again to continue
"""


def write_starter(path: Path) -> None:
    """Write the starter config; ``ConfigError`` if the file is there already or cannot be written."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(STARTER.format(name=path))
    except FileExistsError:
        raise ConfigError(f"{path} is there already; choose another name") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
