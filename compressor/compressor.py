"""Compressor: prepare, fine-tune, finish. It ties policy, groups, losses and packing together."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from compressor.checkpointing.manager import Checkpoints
from compressor.checkpointing.serialization import checksum
from compressor.data.distributed_sampler import shard_loader
from compressor.formats.errors import UsageError
from compressor.lifecycle.convert import convert, halve_untouched
from compressor.lifecycle.importance import Batches, squared_gradients
from compressor.lifecycle.packed import Packed, SharedModel
from compressor.lifecycle.param_groups import param_groups
from compressor.lifecycle.prepare import fit_groups, penalties, start_rounds
from compressor.policy.policy import Policy, TensorPlan
from compressor.rng import seed_all
from compressor.sharing.group import Group
from compressor.sharing.initialization import initialise
from compressor.sharing.parametrization import attach, detach, restore, set_weight
from compressor.sharing.sites import finite_weights
from compressor.training.batch_norm import estimate_batch_norm
from compressor.training.checkpointer import TrainingCheckpointer
from compressor.training.distillation import frozen_copy, with_distillation
from compressor.training.loop import Epoch, OnStep, evaluate_after_epoch, train
from compressor.training.metrics import SharingMonitor
from compressor.training.mixup import Mixer, describe_mixup
from compressor.training.optim import make_optimizer
from compressor.training.step import steps_per_epoch

__all__ = ["Compressor"]

OnRound = Callable[[list[Tensor], int], None]


class Compressor:
    """Let the weights of a model share values, fine-tune it, and pack it.

    Everything is validated at once: rules, schemes, settings, weights.

    Args:
        model: any module; a timm model is rebuilt by name when its file is loaded.
        policy: what is shared how.
        model_args: the arguments it was built with by ``timm.create_model``, beside its name.
        copy: work on a copy, at ``job.model``; otherwise on the model itself.
        teacher: the model to distil from: "dense" for the model as it was, another module, or None.
        distill: weight of the distillation loss, 0 to 1; the task's has the rest.
        temperature: of the distillation's softmax.
        seed: of everything random in ``finetune``.
        preserve_sparsity: pin weights that are zero now to zero, as pruning before has left them.
        original: the weights by name that the report measures noise against; None: the model's as given.
        from_scratch: the weights are random, or drawn when they are shared where the model is on ``meta``: no "dense".

    Raises PolicyError where the policy does not fit the model, MissingError for weights that are not finite.

    Example:
        >>> from compressor.policy.policy import Rule
        >>> job = Compressor(nn.Sequential(nn.Linear(16, 16)), Policy([Rule("*", scheme="kmeans", bits=2)]))
        >>> packed = job.prepare().finish()
        >>> len(job.model[0].weight.unique())
        4
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        model_args: Mapping[str, Any] | None = None,
        copy: bool = True,
        teacher: Literal["dense"] | nn.Module | None = "dense",
        distill: float = 0.5,
        temperature: float = 2.0,
        seed: int = 0,
        preserve_sparsity: bool = False,
        original: Mapping[str, Tensor] | None = None,
        from_scratch: bool = False,
    ) -> None:
        self.model = copying.deepcopy(model) if copy else model
        self.policy, self.model_args, self.seed = policy, dict(model_args or {}), seed
        self.distill, self.temperature = distill, temperature
        self.plans: list[TensorPlan] = policy.plan(self.model)
        self.sites = [plan.site for plan in self.plans if plan.scheme]
        dense = {site.name: finite_weights(site) for site in self.sites if not (from_scratch and site.tensor.is_meta)}
        teacher = None if from_scratch and teacher == "dense" else teacher  # it knows nothing
        self.teacher = frozen_copy(model if teacher == "dense" else teacher) if distill > 0 else None
        taught = self.teacher is not None and teacher == "dense"  # by the same weights: they need keeping only once
        kept = self.teacher.state_dict() if self.teacher is not None and taught else {}
        self.dense = {name: kept[name] if taught else weights.clone() for name, weights in dense.items()}
        self.original = self.dense if original is None else {name: original[name] for name in self.dense}
        self.preserve_sparsity, self.from_scratch = preserve_sparsity, from_scratch
        self.groups: list[Group] = []
        self.steps = self.total_steps = 0

    def prepare(self, calibration: Batches | None = None, virtual: bool = False) -> Compressor:
        """Make codebooks and indices from the weights, and let the model compute with them.

        Args:
            calibration: (inputs, targets) batches; the squared gradients on them weigh the weights' errors.
            virtual: let go of the dense weights where a scheme generates its indices, and with them of ``undo()`` and
                the noise of the report. Layers then compute block by block.
        """
        if self.groups:
            raise UsageError("prepare() has been called: the model is shared already")
        importance = None if calibration is None else squared_gradients(self.model, self.sites, calibration)
        for plan in self.plans:
            if virtual and plan.scheme and plan.scheme.generator():
                self.dense.pop(plan.site.name, None)  # and from ``original``, which is the same if none was given
        self.groups = fit_groups(self.plans, importance, self.preserve_sparsity, self.from_scratch, virtual)
        if self.from_scratch:
            initialise(self.model)
        attach(self.model, self.groups)
        return self

    def param_groups(self, lr: float, weight_decay: float = 0.0, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Give the parameters for an optimiser: no decay on shared weights, codebooks, norms and biases.

        Decay would draw master weights off their codewords and whole codebooks to zero. With ``layer_decay`` below 1
        each layer learns so many times as fast as the one after it.
        """
        self._prepared("param_groups()")
        return param_groups(self.model, self.groups, lr, weight_decay, layer_decay)

    def attach(self, optimizer: Optimizer, total_steps: int, on_round: OnRound | None = None) -> None:
        """Let the schemes follow an optimiser's steps; nothing else is to be remembered in your own loop.

        Args:
            total_steps: how many there will be, for rounds and schedules are shares of the training.
            on_round: told when a scheme begins a round: the parameters it is about, and its steps. The optimiser has
                been made to forget what it remembered of them; their learning rate is for you to restart.
        """
        self._prepared("attach()")
        if total_steps < 1:
            raise UsageError(f"total_steps must be at least 1, got {total_steps}")
        self.total_steps = total_steps
        self._advance(optimizer, on_round)
        optimizer.register_step_post_hook(lambda *_: self._step(optimizer, on_round))

    def _step(self, optimizer: Optimizer, on_round: OnRound | None) -> None:
        self.steps += 1
        self._advance(optimizer, on_round)

    def _advance(self, optimizer: Optimizer, on_round: OnRound | None) -> None:
        progress = min(1.0, self.steps / self.total_steps)
        for end, parameters in start_rounds(self.groups, progress):
            for parameter in parameters:
                optimizer.state.pop(parameter, None)
            if on_round is not None:
                on_round(parameters, max(1, round((end - progress) * self.total_steps)))

    def loss(self, output: Tensor, target: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Give task loss (cross entropy), distillation and penalties in one.

        Args:
            output: float[batch, classes], logits.
            target: int[batch], or float[batch, classes].
            inputs: what the model was given; needed to ask the teacher.
        """
        task = functional.cross_entropy(output, target)
        if self.teacher is not None:
            task = with_distillation(task, output, inputs, self.teacher, self.distill, self.temperature)
        return task + self.penalty(task)

    def penalty(self, task: Tensor | None = None) -> Tensor:
        """Give the sum of the schemes' own terms of the loss; ``task``, or 1, is the loss without, some's measure."""
        return penalties(self.groups, torch.ones(()) if task is None else task.detach())

    def finetune(
        self, train_loader: DataLoader[Any], val: Batches | None = None, epochs: int = 4, lr: float = 3e-4,
        opt: str = "adamw", sched: str = "cosine", weight_decay: float = 0.0,
        on_epoch: Callable[[Epoch, float | None], None] | None = None, on_step: OnStep | None = None,
        device: str | None = None, amp: bool = False, checkpoints: Checkpoints | None = None, grad_accum: int = 1,
        layer_decay: float = 1.0, mixup: Mixer | None = None, model_ema_decay: float = 0.0,
    ) -> Compressor:  # fmt: skip
        """Train shared weights and codebooks; names and values of the options as in timm.

        Args:
            val: batches to evaluate on after each epoch.
            on_epoch: told after each epoch, with top-1 on ``val`` where there is one.
            on_step, device, amp, grad_accum, mixup, model_ema_decay: as ``compressor.training.loop.train`` has them.
            checkpoints: keep the training there, and go on from there; see docs/resuming.md.
        """
        self._prepared("finetune()")
        if epochs < 1:
            raise UsageError(f"epochs must be at least 1, got {epochs}; without training go on with finish()")
        updates = steps_per_epoch(train_loader := shard_loader(train_loader, device), grad_accum)
        seed_all(self.seed % (1 << 32))
        checkpointer = self._checkpointer(
            checkpoints, opt=opt, lr=lr, sched=sched, weight_decay=weight_decay, amp=amp, grad_accum=grad_accum,
            layer_decay=layer_decay, mixup=describe_mixup(mixup), model_ema_decay=model_ema_decay,
        )  # fmt: skip
        parameters = self.param_groups(lr, weight_decay, layer_decay)
        optimizer, schedule = make_optimizer(parameters, opt, lr, sched, epochs, updates)
        self.attach(optimizer, self.steps + epochs * updates, schedule.restart)
        train(
            self.model, train_loader, self.loss, optimizer, schedule, epochs,
            evaluate_after_epoch(self.model, val, SharingMonitor(self.groups), on_epoch), on_step, device, amp,
            checkpointer, grad_accum,
            mixup, model_ema_decay,
        )  # fmt: skip
        return self

    def _checkpointer(self, checkpoints: Checkpoints | None, **how: Any) -> TrainingCheckpointer:
        """Keep the fine-tuning: with all that its result depends on, ``how`` it is trained among it."""
        rules = [rule.to_dict() for rule in self.policy.rules]
        loss = {"distill": self.distill if self.teacher else 0.0, "temperature": self.temperature}
        weights = "" if checkpoints is None else f"CRC-32 {checksum(self.original):08x}"
        return TrainingCheckpointer(
            checkpoints, self, {"rules": rules, **loss, "seed": self.seed, **how, "weights": weights}
        )

    def finish(self, calibration: Batches | None = None, half_untouched: bool = False) -> Packed:
        """Snap every weight to its codeword and make ``job.model`` an ordinary module again.

        Args:
            calibration: batches to estimate BatchNorm statistics on anew.
            half_untouched: round the float32 tensors that are not shared to float16, and store them so.
        """
        self._prepared("finish()")
        tensors, books, values = convert(self.groups)
        detach(self.model)
        for site, value in values.items():
            set_weight(site, value)
        self.groups = []
        if calibration is not None:
            estimate_batch_norm(self.model, calibration)
        halved = halve_untouched(self.model, tensors) if half_untouched else frozenset()
        return Packed.of(
            SharedModel(
                self.model, tensors, books, halved, self.model_args, self.policy, self.plans, self.original, self.seed
            )
        )

    def undo(self) -> nn.Module:
        """Take the sharing off and give the weights their values from before."""
        self._prepared("undo()")
        restore(self.model, self.groups, self.dense)
        self.groups = []
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Give all that training changes, but for your optimiser, schedule and random generators: docs/resuming.md."""
        self._prepared("state_dict()")
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was taken, with the same model and policy; after ``prepare()``, ``attach()``."""
        self._prepared("load_state_dict()")
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]

    def _prepared(self, call: str) -> None:
        if not self.groups:
            raise UsageError(f"{call} needs prepare() before it")
