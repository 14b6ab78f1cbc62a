"""How a step is spread over processes and hardware: one process, DDP or FSDP2; precision; blocks changed for training.

Losses are shares that add up, so gradients are summed, never averaged, in every mode.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vilau.modeling.codebook import Codebooks
from vilau.training import parallel
from vilau.training.blocks import compile_blocks, find_blocks, recompute_in_backward
from vilau.training.config import ScaleConfig
from vilau.training.stage import Stage, StepResult

_SLOW = 2.0  # bfloat16 products may take so many times the time of float32 ones before they are refused


class StepModule(nn.Module):
    """The computation of one micro-batch as a module's forward: what DDP and FSDP2 hook into."""

    def __init__(self, stage: Stage, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.state = stage.state_module
        self.stage, self.device, self.bf16 = stage, device, bf16

    def forward(self, batch: Any, step: int) -> tuple[torch.Tensor, dict[str, tuple[Any, Any]]]:
        """Return the loss and the figures, which carry no gradient."""
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            result = self.stage.compute(batch, step)
        return result.loss, {name: (_detached(a), _detached(b)) for name, (a, b) in result.sums.items()}


class Spread:
    """A stage placed on this process's device and joined with the other processes as the configuration says.

    DDP (the default with several processes) sums gradients in buckets while the backward pass still runs. Parameters
    that a process did not use count as zero there; those that none used keep no gradient. FSDP2 also shards weights,
    gradients and optimizer states: the blocks that the stage names one by one, all other trained parameters together;
    frozen parameters outside those blocks and all buffers (the codebook) stay whole everywhere. A quantizer that learns
    by gradients is a block of its own, because it stays in float32 whatever the precision.

    Args:
        stage: its module is changed in place.
        scale: switches.

    Raises:
        ValueError: a switch that this machine or stage cannot do.
    """

    def __init__(self, stage: Stage, scale: ScaleConfig) -> None:
        self.device = this_device()
        bf16 = scale.precision == "bf16"
        if bf16 and not scale.allow_slow:
            refuse_slow_bf16(self.device)
        self.sharded = scale.sharding == "fsdp" and parallel.world_size() > 1
        self.counts_whole_step = stage.counts_whole_step
        stage.use_attention(scale.attention, self.device, bf16)
        self._change_blocks(stage.state_module, scale)
        step_module = StepModule(stage, self.device, bf16)
        self.module: nn.Module = step_module
        if self.sharded:
            self._shard(step_module, stage, scale, bf16)
        else:
            if scale.cpu_offload:
                raise ValueError("scale.cpu_offload needs scale.sharding 'fsdp' and at least 2 processes")
            step_module.to(self.device)
            if parallel.world_size() > 1:
                self.module = _with_ddp(step_module, scale)

    def _change_blocks(self, module: nn.Module, scale: ScaleConfig) -> None:
        blocks = find_blocks(module) if scale.compile or scale.gradient_checkpointing else []
        if scale.compile:
            compile_blocks(blocks)
        if scale.gradient_checkpointing:
            recompute_in_backward(blocks)

    def _shard(self, step_module: StepModule, stage: Stage, scale: ScaleConfig, bf16: bool) -> None:
        if scale.cpu_offload and self.device.type == "cpu":
            raise ValueError("scale.cpu_offload moves weights from a GPU to the CPU; there is no GPU here")
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        offload = CPUOffloadPolicy() if scale.cpu_offload else OffloadPolicy()
        mesh = init_device_mesh(self.device.type, (parallel.world_size(),))
        units = dict.fromkeys(stage.sharded_blocks(), precision)
        units |= {part: MixedPrecisionPolicy() for part in step_module.modules() if _learns_codes(part)}
        in_units = {p for unit in units for p in unit.parameters()}
        whole = {p for p in step_module.parameters() if not p.requires_grad} - in_units
        for unit, policy in units.items():
            fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload)
        fully_shard(step_module, mesh=mesh, mp_policy=precision, offload_policy=offload, ignored_params=whole)
        for part in step_module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
                part.set_reduce_scatter_unused_params(True, recurse=False)
        for p in whole:
            p.data = p.data.to(self.device)
        for part in step_module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self.device)

    def forward_backward(self, batches: list[Any], step: int) -> list[StepResult]:
        """Compute loss and gradients of a step's micro-batches; messages go with the last one, with FSDP2 with each.

        A loss in the results is the micro-batch's share of the step's.
        """
        share = 1.0 if self.counts_whole_step else 1.0 / len(batches)
        results = []
        for number, batch in enumerate(batches):
            with self._silent(number + 1 < len(batches)):
                loss, sums = self.module(batch, step)
                loss = loss * share if share != 1.0 else loss
                loss.backward()
            results.append(StepResult(loss.detach(), sums))
        return results

    def _silent(self, silent: bool) -> AbstractContextManager[Any]:
        return self.module.no_sync() if silent and isinstance(self.module, DistributedDataParallel) else nullcontext()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Give the first process all weights in plain parameters while entered; every process must enter.

        Nothing changes without FSDP2. The first process must have room for the whole model on its device.
        """
        if not self.sharded:
            yield
            return
        places: list[tuple[nn.Module, str, Any]] = [
            (part, name, parameter)
            for part in self.module.modules()
            for name, parameter in part._parameters.items()
            if isinstance(parameter, DTensor)
        ]
        whole: dict[int, nn.Parameter] = {}
        for _, _, sharded in places:
            if id(sharded) not in whole:
                full = sharded.detach().full_tensor()
                whole[id(sharded)] = nn.Parameter(full if parallel.rank() == 0 else full[:0], sharded.requires_grad)
        if parallel.rank() != 0:
            yield
            return
        hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in self.module.modules()]
        for part, name, sharded in places:
            part._parameters[name] = whole[id(sharded)]
        for part, _, _ in hooks:
            if isinstance(part, FSDPModule):  # they would ask the other processes for their shards
                part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for part, name, sharded in places:
                part._parameters[name] = sharded
            for part, before, after in hooks:
                part._forward_pre_hooks, part._forward_hooks = before, after


def _with_ddp(module: StepModule, scale: ScaleConfig) -> DistributedDataParallel:
    """Wrap for several processes; buckets keep their order for the whole run, so a resumed one adds up alike."""
    # DDP warns where it finds no unused parameter, though the next step may have one
    module.register_parameter("unused", nn.Parameter(torch.zeros(1, device=module.device)))
    wrapped = DistributedDataParallel(
        module,
        forward_sync_buffers=False,
        bucket_cap_mb=scale.bucket_mb,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    wrapped.register_comm_hook(None, lambda _, bucket: _sum(bucket.buffer()))
    return wrapped


def _sum(bucket: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def this_device() -> torch.device:
    """Return the GPU that torchrun gave to this process, the first without torchrun, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def refuse_slow_bf16(device: torch.device) -> None:
    """Raise ValueError where bfloat16 matrix products are slower than float32 ones, as on most CPUs.

    It is measured: one product of two matrices of 512 x 512 in each.
    """
    if device.type != "cpu":
        return
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        matrix @ matrix
        started = time.perf_counter()
        matrix @ matrix
        times[dtype] = time.perf_counter() - started
    ratio = times[torch.bfloat16] / times[torch.float32]
    if ratio > _SLOW:
        raise ValueError(
            f"scale.precision is bf16, but on this CPU bfloat16 matrix products take {ratio:.0f} times as long as "
            "float32 ones; set scale.precision to float32, or scale.allow_slow to true if it must be"
        )


def _learns_codes(part: nn.Module) -> bool:
    return isinstance(part, Codebooks) and any(p.requires_grad for p in part.parameters())


def _detached(value: torch.Tensor | float) -> torch.Tensor | float:
    return value.detach() if isinstance(value, torch.Tensor) else value
