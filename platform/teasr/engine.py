"""One class over DeepSpeed: ZeRO stages 0 to 3 and optimizer offload, on GPUs or on a CPU, by
settings alone.

The method knows nothing of DeepSpeed; it is handed `Engine.network`, a callable, and gives back a
loss. All that must be said to DeepSpeed (its backward, its learning rate, its collective saves)
is said here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from teasr.backbones.base import Backbone
from teasr.backbones.folder import compute_dtype
from teasr.config import Settings
from teasr.errors import TeasrError


class EngineSettings(Settings):
    """Optimisation and memory settings."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO: 1 shards the optimizer, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer states and fp32 weights in host memory (GPU recipes; needs a C++ compiler)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type; `auto` takes bf16 where the hardware multiplies it faster."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's averaging constants."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_share: float = Field(0.02, ge=0, lt=1)
    """Share of the run over which the learning rate rises from zero."""
    final_learning_rate_share: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of the run over its peak (cosine decay)."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 turns clipping off. DeepSpeed's own default has moved."""
    gradient_accumulation: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the average of the weights that is evaluated and registered; 0 keeps none."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> EngineSettings:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Compute type on this machine."""
        fixed = {"bf16": torch.bfloat16, "fp32": torch.float32}
        return fixed.get(self.precision) or compute_dtype()

    def learning_rate_at(self, progress: float) -> float:
        """Linear rise over `warmup_share`, then a cosine down to the final share of the peak."""
        if progress < self.warmup_share:
            return self.learning_rate * max(progress / self.warmup_share, 1e-2)
        done = min(max((progress - self.warmup_share) / (1 - self.warmup_share), 0.0), 1.0)
        low = self.final_learning_rate_share
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))

    def deepspeed_config(self, micro_batch: int) -> dict[str, Any]:
        """The configuration that is handed to `deepspeed.initialize`."""
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self.gradient_accumulation,
            "gradient_clipping": self.gradient_clipping,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": self.learning_rate,
                    "betas": list(self.betas),
                    "weight_decay": self.weight_decay,
                    "torch_adam": True,  # no compilation; the fused kernel is the GPU's default
                },
            },
            "steps_per_print": 10**9,
        }


class Engine:
    """A backbone under training.

    Must be built in a process where `torch.distributed` is initialised or RANK, WORLD_SIZE and
    MASTER_ADDR are set (Ray Train sets them). All methods are collective: every rank calls them.

    Attributes:
        network: the trained network, callable as a `Velocity`.
    """

    def __init__(self, network: Backbone, settings: EngineSettings, micro_batch: int) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed  # seconds to import, and it reads the environment when it does

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.settings = settings
        self._engine, *_ = deepspeed.initialize(
            model=network,
            model_parameters=[p for p in network.parameters() if p.requires_grad],
            config=settings.deepspeed_config(micro_batch),
            dist_init_required=not torch.distributed.is_initialized(),
        )
        self.network = self._engine
        self._average = (
            [_local(p).detach().float().clone() for p in self._trainable()]
            if settings.ema_decay > 0
            else None
        )
        self.steps = 0

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return torch.device(self._engine.device)

    def step(self, loss: Tensor, progress: float) -> float | None:
        """Backward, and at an accumulation boundary one optimizer step.

        Args:
            loss: scalar of this rank's micro-batch.
            progress: share of the run that is done, for the learning rate.

        Returns:
            The norm of the gradient before clipping, or None between boundaries.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(progress)
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        norm = None
        if self.settings.zero_stage == 0:  # DeepSpeed keeps the norm only where it shards
            gradients = [p.grad for p in self._trainable() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        self.steps += 1
        self._update_average()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def state_dict(self, average: bool = True) -> dict[str, Tensor]:
        """Whole float32 weights by parameter name, the average of the weights if there is one."""
        import deepspeed

        with self.averaged() if average else contextlib.nullcontext():
            result = {}
            for name, parameter in self._engine.module.named_parameters():
                with deepspeed.zero.GatheredParameters(
                    [parameter], enabled=self.settings.zero_stage == 3
                ):
                    result[name] = parameter.detach().float().cpu().clone()
        return result

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network computes with the average of its weights; take no step in here."""
        if self._average is None:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def averaged_network(self, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
        """The network with the average of its weights, as a `Velocity`; call it without gradient.

        No forward pass that is to be differentiated may be pending: weights change place for the
        length of the call.
        """
        with self.averaged():
            result: Tensor = self.network(x_t, t, r, condition)
        return result

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint: weights, optimizer, average, and `state`, readable back by `load`."""
        self._engine.save_checkpoint(str(folder), tag="engine", client_state={"teasr": state})
        if self._average is not None:
            rank = torch.distributed.get_rank()
            torch.save({"average": self._average}, folder / f"average-{rank}.pt")

    def load(self, folder: Path) -> dict[str, Any]:
        """Take up a checkpoint of `save` at the same world size and return its `state`.

        Raises:
            TeasrError: when the folder holds no checkpoint that fits.
        """
        average = folder / f"average-{torch.distributed.get_rank()}.pt"
        complete = self._average is None or average.is_file()
        if not (complete and (folder / "engine").is_dir()):
            raise TeasrError(
                f"{folder} holds no checkpoint of this run.",
                "World size and engine.ema_decay must be those of the run that wrote it.",
            )
        _, client = self._engine.load_checkpoint(str(folder), tag="engine")
        if self._average is not None:
            saved = torch.load(average, map_location=self.device, weights_only=True)
            self._average = saved["average"]
        self.steps = int(self._engine.global_steps)
        state: dict[str, Any] = client["teasr"]
        return state

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self._engine.module.parameters() if p.requires_grad]

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None:
            return
        # A short history first: the average forgets the initial weights as fast as a mean would.
        decay = min(self.settings.ema_decay, (1 + self.steps) / (10 + self.steps))
        for average, parameter in zip(self._average, self._trainable()):
            average.lerp_(_local(parameter).float(), 1 - decay)

    @torch.no_grad()
    def _swap(self) -> None:
        assert self._average is not None
        if self._kept is None:
            self._kept = [_local(p).clone() for p in self._trainable()]
            for average, parameter in zip(self._average, self._trainable()):
                _local(parameter).copy_(average)
        else:
            for kept, parameter in zip(self._kept, self._trainable()):
                _local(parameter).copy_(kept)
            self._kept = None
        # ZeRO-3 keeps small parameters gathered on every rank: drop those copies, now stale.
        persistent = getattr(self._engine.optimizer, "persistent_parameters", [])
        if persistent:
            persistent[0].partition(persistent)

    _kept: list[Tensor] | None = None


def _local(parameter: torch.nn.Parameter) -> Tensor:
    """This rank's part of a parameter: under ZeRO-3 a flat slice, otherwise all of it."""
    slice_: Tensor | None = getattr(parameter, "ds_tensor", None)
    return parameter.data if slice_ is None else slice_
