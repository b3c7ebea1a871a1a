"""Mistakes to make on purpose: what ``mutants.py`` changes, where, and on which model verify should notice.

Most are after real ones of training systems that went unnoticed for months; each is what that mistake would be here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One mistake."""

    name: str
    path: str
    """In the package."""
    old: str
    """Stands there once."""
    new: str
    layouts: str = ""
    """Those that should notice first; all are among the default ones."""
    family: str = "llama"
    """Of ``layout_matrix.FAMILIES``."""
    optimizer: str = "adamw"
    """Of the config, as YAML; verify judges its updates if it looks beyond single values."""
    overrides: tuple[str, ...] = ()
    """What the config says besides, as ``key.path=value``."""
    tests: tuple[str, ...] = ()
    """Files of tests that should notice, in place of verify: of a mistake that the replicas of one process make as well
    by which verify judges replicas that learn alone."""


MUTATIONS = (
    # Loss, and what it is divided by
    Mutation(
        "each micro-batch is divided by its own targets, and by their number",
        "schedule/accumulate.py",
        "(loss * scale).backward()",
        "(loss / max(1, batch.count) / len(batches)).backward()",
        "accumulate=3",
    ),
    Mutation(
        "targets are not counted over replicas",
        "sync/all_reduce.py",
        "return int(total.item())",
        "return count * self.link.size",
        "replicas=2",
    ),
    Mutation(
        "targets are not counted over shard and context ranks",
        "train/again.py",
        "(own_targets,), _ = replica.total([sum(batch.count for batch in batches)])",
        "own_targets = replica.mesh.states.size * sum(batch.count for batch in batches)",
        "shard=2",
    ),
    Mutation(
        "every context rank counts all targets of a sequence",
        "parallel/context.py",
        "count = int((labels != NO_TARGET).sum())",
        "count = batch.count",
        "context=2",
    ),
    Mutation(
        "the last target of every piece of a sequence is lost, as if labels were shifted after the cut",
        "parallel/context.py",
        "labels = batch.labels[:, places_P].masked_fill(fill_P, NO_TARGET)",
        "labels = batch.labels[:, places_P].masked_fill(fill_P | "
        "(columns_P % max(1, padded // (2 * self._size)) == 0), NO_TARGET)",
        "context=2",
    ),
    Mutation(
        "rows that only fill up a micro-batch count",
        "data/loader.py",
        "sequence=first + slot, weight=0.0)",
        "sequence=first + slot, weight=share[0].weight)",
        "replicas=2",
    ),
    Mutation(
        "a micro-batch without targets counts as one",
        "objectives/base.py",
        "count=int(np.count_nonzero(labels != NO_TARGET)),",
        "count=max(1, int(np.count_nonzero(labels != NO_TARGET))),",
        "accumulate=15",
    ),
    Mutation(
        "the loss over a cut vocabulary takes labels for columns of the first rank",
        "objectives/softening.py",
        "columns_NK = labels_NK - cut.start",
        "columns_NK = labels_NK - 0 * cut.start",
        "tensor=2",
    ),
    Mutation(
        "labels are smoothed over the entries of a rank",
        "objectives/softening.py",
        "softmax_NV.sub_(smoothing / (softmax_NV.shape[1] if cut is None else cut.vocabulary))",
        "softmax_NV.sub_(smoothing / softmax_NV.shape[1])",
        "tensor=2",
        overrides=("objective.label_smoothing=0.1",),
    ),
    Mutation(
        "the mean of the logits is that of a rank's entries",
        "objectives/cross_entropy.py",
        "total_N1[0] / cut.vocabulary if smooths else None",
        "own_MN1[3] / max(1, cut.entries) if smooths else None",
        "tensor=2",
        overrides=("objective.label_smoothing=0.1",),
    ),
    Mutation(
        "the gradient of the z-loss is that of a rank's own logits",
        "objectives/head_cross_entropy.py",
        "level_C1 = found.greatest_N1 + found.sum_N1.log() if targets.softening.z_loss else None",
        "level_C1 = logits_CV.to(dtype).logsumexp(1, keepdim=True) if targets.softening.z_loss else None",
        "tensor=2",
        overrides=("objective.z_loss=0.01",),
    ),
    Mutation(
        "sequences are mixed with one of the same rank",
        "data/loader.py",
        "row_of(int(others[sample - first])).tokens",
        "row_of(sample).tokens if not share else share[-1].tokens",
        "replicas=2",
        overrides=("objective.mixup=0.5",),
    ),
    Mutation(
        "every context rank mixes in the first positions",
        "parallel/context.py",
        "batch.mixed.at(places_P)",
        "batch.mixed.at(places_P - places_P.min())",
        "context=2",
        overrides=("objective.mixup=0.5",),
    ),
    Mutation(
        "the greatest logit of all ranks is taken for this rank's own sum",
        "objectives/cross_entropy.py",
        "sum_N1 = (sum_NR * (greatest_NR - greatest_N1).exp()).sum(1, keepdim=True)",
        "sum_N1 = sum_NR.sum(1, keepdim=True)",
        "tensor=2",
    ),
    Mutation(
        "the gradient of hidden states from a cut head is not added up",
        "parallel/vocabulary.py",
        "lambda _, args: (copy(args[0], cut.axis, where=where), *args[1:])",
        "lambda _, args: args",
        "tensor=2",
    ),
    Mutation(
        "held-out rows that fill up a rank's share count",
        "data/loader.py",
        "weight=1.0 if place < chosen else 0.0",
        "weight=1.0",
        "shard=2",
    ),
    # Accumulation, pipelines, exchange between replicas
    Mutation(
        "the schedule divides gradients by its micro-batches",
        "schedule/pipeline.py",
        '"scale_grads": False',
        '"scale_grads": True',
        "pipeline=2",
    ),
    Mutation(
        "a pipeline divides by the targets in its log only",
        "schedule/stage.py",
        "return loss * self.scale",
        "return loss",
        "pipeline=2",
    ),
    Mutation(
        "the gradients of a table tied over two stages are never added",
        "parallel/stages.py",
        "summed_over=lines[tuple(line)]",
        "summed_over=None",
        "pipeline=2",
    ),
    Mutation(
        "a stage takes masks and positions of the first micro-batch for all",
        "schedule/stage.py",
        "batch = self.batches[micro_batch]",
        "batch = self.batches[0]",
        "pipeline=2",
    ),
    Mutation(
        "the second half of a split backward pass passes over what entered late",
        "schedule/split.py",
        "if self.apart:",
        "if False:",
        "pipeline=2,schedule=zbv,zero=2",
        "t5",
    ),
    Mutation(
        "gradients arriving over two borders of a split backward pass are counted twice",
        "schedule/split.py",
        "if len(borders) > 1 else []",
        "if len(borders) > 1000 else []",
        "pipeline=2,schedule=zbv,zero=2",
        "t5",
    ),
    Mutation(
        "ZeRO 1 sums gradients after every micro-batch but the last",
        "parallel/shard.py",
        "self._modules[-1].set_requires_gradient_sync(last)",
        "self._modules[-1].set_requires_gradient_sync(not last)",
        "shard=2,zero=1",
    ),
    Mutation(
        "gradients are exchanged before the last micro-batch has added to them",
        "train/replica.py",
        "if self._last and name not in self._late:",
        "if name not in self._late:",
        "replicas=2",
    ),
    Mutation(
        "gradients of which ranks have parts are exchanged before the parts are added",
        "train/replica.py",
        "if self._last and name not in self._late:",
        "if self._last:",
        "replicas=2,tensor=2,sequence=true,recompute=full",
    ),
    Mutation(
        "a bucket is sent when it still waits for one gradient",
        "sync/all_reduce.py",
        "self._buckets[self._launched].waiting == 0",
        "self._buckets[self._launched].waiting <= 1",
        "replicas=2",
    ),
    Mutation(
        "a tensor larger than a bucket is never sent",
        "sync/buckets.py",
        "        buckets[-1].append(index)\n",
        "        if numels[index] <= most:\n            buckets[-1].append(index)\n",
        "replicas=2",
    ),
    Mutation(
        "sums over replicas are divided once more",
        "sync/all_reduce.py",
        "shard.set_gradient(view if mark > 0 else None)",
        "shard.set_gradient(view / mark if mark > 0 else None)",
        "replicas=2",
    ),
    Mutation(
        "shard ranks average gradients",
        "parallel/shard.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(float(mesh.states.size))",
        "shard=2",
    ),
    Mutation(
        "shard ranks learn from the same rows",
        "comm/world.py",
        "return data_rank(self.coordinates.replica, self.group_sizes, self.mesh.shard.index)",
        "return data_rank(self.coordinates.replica, self.group_sizes, 0)",
        "shard=2",
    ),
    Mutation(
        "collectives run over the default group",
        "comm/mesh.py",
        "dist.all_reduce(tensor, group=self.group)",
        "dist.all_reduce(tensor)",
        "shard=2,tensor=2,context=2,recompute=selective; replicas=2,shard=2,tensor=2",
    ),
    Mutation(
        "the parts of a gradient are not added at the end of a step",
        "train/replica.py",
        "        for axis, shards in self._summed:\n            _add_up(axis, shards, self._device, self.reduction)\n",
        "",
        "tensor=2,sequence=true",
    ),
    # Tensor and sequence
    Mutation(
        "norms that see their rank's tokens only are taken for whole",
        "parallel/tensor.py",
        """                    "to treat each position by itself. Use sequence=false"
                )
            self.parameters.in_parts(inner, key)""",
        """                    "to treat each position by itself. Use sequence=false"
                )""",
        "tensor=2,sequence=true",
    ),
    Mutation(
        "norms of heads are added up with sequence parallelism only",
        "parallel/tensor.py",
        "            if parameter not in self._is_whole:\n                self.parameters.in_parts(inner, key)",
        "            if self._sequence and parameter not in self._is_whole:\n"
        "                self.parameters.in_parts(inner, key)",
        "tensor=2",
        "qwen3",
    ),
    Mutation(
        "the gradient of what enters a region is this rank's share",
        "parallel/collectives.py",
        "return ctx.axis.all_reduce(grad.contiguous().clone(), where=ctx.where), None, None",
        "return grad, None, None",
        "tensor=2",
    ),
    Mutation(
        "the gradient of gathered pieces is not summed",
        "parallel/collectives.py",
        "return ctx.axis.reduce_scatter(grad, ctx.dim, where=ctx.where), None, None, None",
        "return ctx.axis.piece(grad, ctx.dim).contiguous(), None, None, None",
        "tensor=2,sequence=true",
    ),
    Mutation(
        "the gradient of pieces gathered for equal work is summed all the same",
        "parallel/collectives.py",
        "return ctx.axis.piece(grad, ctx.dim).contiguous(), None, None, None",
        "return ctx.axis.reduce_scatter(grad, ctx.dim), None, None, None",
        "tensor=2,sequence=true",
    ),
    Mutation(
        "query heads meet the wrong key/value heads where these do not divide",
        "parallel/tensor_heads.py",
        "needed = [head * self.key_value // self.query for head in self.own_queries]",
        "needed = [head % self.key_value for head in self.own_queries]",
        "tensor=4",
    ),
    Mutation(
        "fused projections are cut as one",
        "parallel/tensor_parameters.py",
        "runs = even_runs([units] * parts, self._axis.size, self._axis.index, unit)",
        "runs = even_runs([units * parts], self._axis.size, self._axis.index, unit)",
        "tensor=2",
        "phi3",
    ),
    Mutation(
        "every rank adds the bias of a layer whose parts are summed",
        "parallel/tensor_regions.py",
        "if isinstance(self._linear, nn.Linear) else x @ weight)\n"
        "        return output if bias is None else output + bias",
        "if isinstance(self._linear, nn.Linear) else x @ weight + bias)\n        return output",
        "tensor=2",
        "gpt2",
    ),
    Mutation(
        "the bias behind a scattered sum is taken for whole",
        "parallel/tensor.py",
        '        if border.sequence:\n            self.parameters.in_parts(linear, "bias")',
        '        if False:\n            self.parameters.in_parts(linear, "bias")',
        "tensor=2,sequence=true",
        "gpt2",
    ),
    Mutation(
        "each rank looks up its own rows only, and none are added",
        "parallel/vocabulary.py",
        "return all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self._cut.axis, where=self._where)",
        "return rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)",
        "tensor=2",
    ),
    # Norm and clipping
    Mutation(
        "what tensor ranks hold alike counts once for each in the norm",
        "train/update.py",
        "return self.mesh.tensor.index == 0 if held is None else held.is_owner",
        "return True if held is None else held.is_owner",
        "tensor=2",
    ),
    Mutation(
        "what tensor ranks hold parts of is left out of the norm, but for the first rank's",
        "train/update.py",
        "return self.mesh.tensor.index == 0 if held is None else held.is_owner",
        "return self.mesh.tensor.index == 0",
        "tensor=2",
    ),
    Mutation(
        "each stage clips by its own norm",
        "train/update.py",
        'self.mesh.world.all_reduce(squares, where="gradient norm")',
        'self.mesh.states.all_reduce(squares, where="gradient norm")',
        "pipeline=2",
    ),
    Mutation(
        "each shard clips by its own norm",
        "train/update.py",
        'self.mesh.world.all_reduce(squares, where="gradient norm")',
        'self.mesh.tensor.all_reduce(squares, where="gradient norm")',
        "shard=2",
    ),
    # Clipping and penalties
    Mutation(
        "each stage numbers its own blocks",
        "train/clip.py",
        "groups = [numbers.get(_block_of(shard.name, numbers), len(numbers)) for shard in update.shards]",
        "own = [_block_of(shard.name, numbers) for shard in update.shards]\n"
        "        groups = [sorted(set(own)).index(block) for block in own]",
        "pipeline=2",
        overrides=("train.clip_block_norm=1.0",),
    ),
    Mutation(
        "rows that ranks hold parts of are measured by each rank alone",
        "train/max_norm.py",
        'update.mesh.tensor.all_reduce(squares, where="row norms").sqrt()',
        "squares.sqrt()",
        "tensor=2",
        overrides=("regularisation.max_norm=0.1",),
    ),
    Mutation(
        "the penalty on momentum forgets the last update at a resume",
        "train/penalties.py",
        "return self._before",
        "return {name: value.clone() for name, value in self._before.items()}",
        "shard=2",
        overrides=("regularisation.momentum=2.0",),
    ),
    # Context
    Mutation(
        "positions begin anew on every context rank",
        "parallel/context.py",
        "inputs |= {name: value[:, places_P] for name, value in whole.items()}",
        'inputs |= {name: value[:, places_P] for name, value in whole.items()} | {"position_ids": '
        "torch.arange(len(columns_P)).expand_as(labels)}",
        "context=2",
    ),
    Mutation(
        "documents see each other under context parallelism",
        "parallel/context.py",
        "            documents=part.documents,\n            tokens=tokens,",
        "            documents=None,\n            tokens=tokens,",
        "context=2",
        "llama, untied",
    ),
    Mutation(
        "keys and values that have gone round are taken for those of another rank",
        "parallel/ring.py",
        """keys[(axis.index - hop) % axis.size]):
            part =""",
        """keys[(axis.index + hop) % axis.size]):
            part =""",
        "context=4",
    ),
    Mutation(
        "gradients of keys do not come home",
        "parallel/ring.py",
        "                grad_held += before()",
        "                before()",
        "context=2",
    ),
    Mutation(
        "parts of a softmax are put together by the greater sum",
        "parallel/ring.py",
        "total = torch.logaddexp(lse, lse_BNR)",
        "total = torch.maximum(lse, lse_BNR)",
        "context=2",
    ),
    Mutation(
        "key/value heads are repeated in the wrong order before they are dealt out",
        "parallel/ulysses.py",
        "(x.repeat_interleave(copies, 1) if copies > 1 else x",
        "(x.repeat(1, copies, 1, 1) if copies > 1 else x",
        "context=4,attention=ulysses",
    ),
    Mutation(
        "the soft cap of scores is forgotten under context parallelism",
        "parallel/context.py",
        "            softcap=softcap,\n            dropout=dropout,",
        "            softcap=None,\n            dropout=dropout,",
        "context=2",
        "gemma2",
    ),
    # Experts
    Mutation(
        "an expert's gradient is divided like any other",
        "parallel/shard.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(float(mesh.expert.size) if name in dealt else 1.0)",
        "shard=2,expert=2",
        "mixtral",
    ),
    Mutation(
        "routers learn nothing from what other ranks' experts made",
        "parallel/expert.py",
        "made_TKD * weights_TK.unsqueeze(-1)",
        "made_TKD * weights_TK.detach().unsqueeze(-1)",
        "shard=2,expert=2",
        "mixtral",
    ),
    Mutation(
        "only the first rank's experts count in the norm",
        "parallel/expert.py",
        "whole = Held(full_shape=tuple(full.shape), is_owner=mesh.tensor.index == 0)",
        "whole = Held(full_shape=tuple(full.shape), is_owner=mesh.tensor.index == 0 and axis.index == 0)",
        "shard=2,expert=2",
        "mixtral",
    ),
    Mutation(
        "what experts made comes back in the order of experts",
        "parallel/expert.py",
        "made_RD[order.argsort()].unflatten(0, weights_TK.shape)",
        "made_RD[order].unflatten(0, weights_TK.shape)",
        "shard=2,expert=2",
        "mixtral",
    ),
    Mutation(
        "the balance loss takes a micro-batch for one sequence",
        "parallel/balance.py",
        "fraction_BE = counts[:, :experts] / counts[:, experts:].clamp(min=1)",
        "fraction_BE = (counts[:, :experts].sum(0) / counts[:, experts:].sum().clamp(min=1)).expand_as(probability_BE)",
        "accumulate=3",
        "qwen3_moe",
    ),
    Mutation(
        "each context rank balances its own part of a sequence",
        "parallel/balance.py",
        "for axis in (self.context, self.sequence):",
        "for axis in (self.sequence,):",
        "context=2",
        "qwen3_moe",
    ),
    # Chance
    Mutation(
        "all data ranks drop out alike",
        "parallel/dropout.py",
        "return torch.tensor(self._sequences) if size == len(self._sequences) else None",
        "return torch.arange(size) if size == len(self._sequences) else None",
        "replicas=2",
        "gpt2",
    ),
    Mutation(
        "tensor ranks drop out their heads as if these were the first",
        "parallel/dropout.py",
        "return torch.arange(own.start, own.start + size) if is_piece else None",
        "return torch.arange(size) if is_piece else None",
        "tensor=2",
        "gpt2",
    ),
    Mutation(
        "a recomputed block drops out as the micro-batch does that is current by then",
        "parallel/dropout.py",
        "return nullcontext(), nullcontext() if self._pass is None else _Again(self._in_force, self._pass)",
        "return nullcontext(), nullcontext()",
        "recompute=full",
        "gpt2",
    ),
    Mutation(
        "context ranks drop out by their own positions",
        "parallel/dropout.py",
        "columns = torch.arange(whole) if self._columns is None else self._columns",
        "columns = torch.arange(whole)",
        "context=2",
        "gpt2",
    ),
    # Rows, rate, checkpoints
    Mutation(
        "ranks are dealt overlapping rows",
        "data/loader.py",
        "slot = place.rank + plan.data_parallel * row",
        "slot = 0 * place.rank + plan.data_parallel * row",
        "replicas=2",
    ),
    Mutation(
        "the rate follows micro-batches, not steps",
        "train/trainer.py",
        "factor = rate.factor(step, seen)",
        "factor = rate.factor(step * parts.batches.at(step).micro_batches, seen)",
        "accumulate=3",
    ),
    Mutation(
        "a resumed run begins with the first sample again",
        "train/trainer.py",
        'self.sequences_seen = values["sequences_seen"]',
        "self.sequences_seen = 0",
        "shard=2",
    ),
    Mutation(
        "a resumed run begins the schedule of the rate again",
        "train/trainer.py",
        "factor = rate.factor(step, seen)",
        'self.since = getattr(self, "since", 0) + 1\n        factor = rate.factor(self.since, seen)',
        "shard=2",
    ),
    Mutation(
        "the average of the weights begins again after a resume",
        "train/average.py",
        'self.taken = values["taken"]',
        "self.taken = 0",
        "shard=2",
    ),
    Mutation(
        "the optimizer's state is not loaded",
        "checkpoint/reader.py",
        "            room.copy_(saved)",
        '            if name.startswith("model/"):\n                room.copy_(saved)',
        "shard=2",
    ),
    Mutation(
        "the state of a cut parameter is saved as if the cut began at its first row",
        "parallel/boxes.py",
        "_with(own.start, dim, run.start + first - run.inner),",
        "_with(own.start, dim, run.start),",
        "tensor=2; replicas=2,shard=2,tensor=2",
    ),
    Mutation(
        "of ranks that share states only the first reads its part of a checkpoint",
        "checkpoint/reader.py",
        "        for block in state.blocks:\n            saved, room",
        "        for block in state.blocks[:1] if sum(state.blocks[0].start[:1]) == 0 else ():\n"
        "            saved, room",
        "shard=2",
    ),
    Mutation(
        "ranks but the first cut their part one row off",
        "parallel/held.py",
        "local.narrow(dim, run.inner, run.size).copy_(full.narrow(dim, run.start, run.size))",
        "local.narrow(dim, run.inner, run.size).copy_(full.narrow(dim, max(0, run.start - 1), run.size))",
        "tensor=2",
    ),
    # Optimizers that look beyond single values
    Mutation(
        "each rank makes its own part of a matrix orthogonal",
        "optim/matrices.py",
        """        matrices = self.full.gather(parts, self.owner)
        made = self.directions(matrices, {name: self.state[parameters[name]] for name in matrices})
        made = {name: direction.to(matrices[name].dtype) for name, direction in made.items()}
        for name, direction in self.full.scatter(made, parts, self.owner).items():""",
        """        made = self.directions(parts, {name: self.state[parameters[name]] for name in parts})
        for name, direction in made.items():""",
        "shard=2; tensor=2",
        optimizer="muon",
    ),
    Mutation(
        "the matrices that ranks own come back to the wrong ones",
        "parallel/full.py",
        "for b in self._blocks[name][r]\n",
        "for b in self._blocks[name][-1 - r]\n",
        "shard=2",
        optimizer="soap",
    ),
    Mutation(
        "the norm of a tensor is that of a rank's values",
        "optim/lamb.py",
        "(squares,) = self._full.total([squares * counted.unsqueeze(1)])",
        "squares = squares + 0 * counted.unsqueeze(1)",
        "shard=2",
        optimizer="lamb",
    ),
    Mutation(
        "values that several ranks hold count several times in the size of a tensor",
        "optim/adafactor.py",
        "return torch.stack(torch._foreach_norm(tensors)).double().square_() * counted",
        "return torch.stack(torch._foreach_norm(tensors)).double().square_() + 0 * counted",
        "tensor=2",
        optimizer="adafactor",
    ),
    Mutation(
        "the means of columns are over a rank's rows",
        "optim/adafactor.py",
        "norms, *sums = self._full.total([norms, *sums])",
        "(norms,) = self._full.total([norms])",
        "shard=2",
        optimizer="adafactor",
    ),
    Mutation(
        "every rank takes the scale of a block from the columns it has",
        "optim/adamw_8bit.py",
        "ours.copy_(self._full.greatest(cut.name, ours))",
        "ours.copy_(ours)",
        "tensor=2",
        optimizer="{name: adamw_8bit, small: 0}",
    ),
    Mutation(
        "labels are drawn by the place of a row in its micro-batch",
        "objectives/drawn.py",
        "torch.tensor(sequences, device=device))",
        "torch.arange(len(sequences), device=device))",
        "replicas=2; accumulate=3",
        optimizer="sophia",
    ),
    # Replicas that learn alone
    Mutation(
        "a step that is not taken gives its replica weight in the mean",
        "sync/alone.py",
        "self._count * finish.stepped",
        "self._count",
        tests=("sync/test_precision.py",),
    ),
    Mutation(
        "a rank draws the rounding of its part as if that were the whole",
        "sync/alone.py",
        "start=block.start, full_shape",
        "start=block.inner, full_shape",
        tests=("sync/test_precision.py",),
    ),
    Mutation(
        "targets count for all means to come",
        "sync/periodic.py",
        "        self._window.zero_()\n",
        "",
        tests=("sync/test_local.py",),
    ),
    Mutation(
        "with Nesterov the outer momentum of before counts as well",
        "sync/diloco.py",
        "            if not self._options.nesterov:\n",
        "            if True:\n",
        tests=("sync/test_local.py",),
    ),
    Mutation(
        "a fragment's targets count for all its exchanges to come",
        "sync/streaming_diloco.py",
        "self._sent[p], self._windows[p] = self._step, 0.0",
        "self._sent[p] = self._step",
        tests=("sync/test_streaming.py",),
    ),
    Mutation(
        "a fragment is mixed in a step late",
        "sync/streaming_diloco.py",
        "self._step - self._options.delay\n",
        "self._step - self._options.delay - 1\n",
        tests=("sync/test_streaming.py",),
    ),
    Mutation(
        "what is on its way is not in a checkpoint",
        "sync/streaming_diloco.py",
        "        self._arrive(*range(self._options.fragments))\n        state = ",
        "        state = ",
        tests=("sync/test_streaming.py",),
    ),
    Mutation(
        "a replica waits for the sums when it has sent a fragment",
        "sync/streaming_diloco.py",
        "                self._send(p)\n",
        "                self._send(p)\n                self._arrive(p)\n",
        tests=("sync/test_streaming.py",),
    ),
    Mutation(
        "pairs are the same in every round",
        "sync/gossip.py",
        "turn = exchanges(self._options.every, self._step)",
        "turn = 1",
        tests=("sync/test_gossip.py",),
    ),
    Mutation(
        "the parameters of a pair are not drawn together",
        "sync/gossip.py",
        "            moved.add_(their_slow.sub_(slow), alpha=self._options.pulls / 2)\n",
        "",
        tests=("sync/test_gossip.py",),
    ),
    Mutation(
        "each replica decides by its own vote what it sends",
        "sync/partial.py",
        "if is_last or n > 0]",
        "if is_last or wishes[i] > 0]",
        tests=("sync/test_partial.py",),
    ),
    Mutation(
        "a norm is that of a rank's own part",
        "parallel/full.py",
        'functools.reduce(torch.add, self._axis.all_gather(own, 0, where="norms").cpu())',
        "own[0].cpu()",
        tests=("sync/test_partial.py",),
    ),
    Mutation(
        "what was not sent is forgotten",
        "sync/partial.py",
        "        for shard in looked:\n",
        "        for shard in looked:\n            shard.local.copy_(self._sent[shard.name])\n",
        tests=("sync/test_partial.py",),
    ),
    Mutation(
        "a tensor's targets count for all its means to come",
        "sync/partial.py",
        "            self._targets[shard.name].zero_()\n",
        "",
        tests=("sync/test_partial.py",),
    ),
)
