"""Compressor: prepare, fine-tune, finish. It ties policy, groups, losses and packing together."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from compressor.calibration.calibrator import MEMORY
from compressor.calibration.images import Calibration
from compressor.calibration.measurement import Measurement
from compressor.checkpointing.manager import Checkpoints
from compressor.data.batches import Batches
from compressor.data.distributed_sampler import shard_loader
from compressor.formats.content import Codebook, SharedTensor
from compressor.formats.errors import UsageError
from compressor.lifecycle.convert import convert
from compressor.lifecycle.coverage import warn_of_dense
from compressor.lifecycle.description import describe_plans, describe_progress, plans_table
from compressor.lifecycle.finishing import Finishing
from compressor.lifecycle.fitting import Fitting, check_target, policy_for
from compressor.lifecycle.norms import check_foldable, minor_tensors
from compressor.lifecycle.packed import Packed, SharedModel, check_packable
from compressor.lifecycle.param_groups import check_embeddings, check_optimizer, freeze_untrained, param_groups
from compressor.lifecycle.prepare import OnRound, advance, check_zeros, forget_generated, not_shared, penalties
from compressor.lifecycle.rebuild import find_args
from compressor.lifecycle.size_control import SizeControl
from compressor.lifecycle.state import kept_weights, tensors_of
from compressor.lifecycle.target import FileOptions, Search, Target
from compressor.lifecycle.training_options import fingerprint, replaced, resolve_options, watched
from compressor.policy.policy import Policy, TensorPlan
from compressor.rng import seed_all
from compressor.sharing.group import Group
from compressor.sharing.initialization import initialise
from compressor.sharing.parametrization import attach, check_not_shared, detach, restore, set_weight
from compressor.sharing.sites import finite_weights
from compressor.training.checkpointer import TrainingCheckpointer
from compressor.training.config import TrainingConfig
from compressor.training.distillation import make_teacher, with_distillation
from compressor.training.history import History
from compressor.training.loop import OnEpoch, OnStep, evaluate_after_epoch, train
from compressor.training.metrics import SharingMonitor
from compressor.training.model_copy import check_trainable, checked_module, copy_module
from compressor.training.modes import modules_in_eval, train_mode
from compressor.training.optim import make_optimizer
from compressor.training.step import steps_per_epoch

__all__ = ["Compressor"]


class Compressor:
    """Makes the weights of a model share a few values, fine-tunes it, and packs it.

    The constructor validates everything: rules, schemes, settings, weights.

    Args:
        model: any module; a timm model is built again by its name when the packed file is loaded, or stored as any
            module where timm cannot, which a warning says. Of what ``torch.compile`` returned, the original is taken.
        policy: which tensors share values, and by which scheme; None: ``learnt`` for all, where a target is given.
        model_args: the arguments that ``timm.create_model`` built it with, beside its name; None: they are found.
        copy: work on a copy, at ``job.model``; otherwise on the model itself.
        teacher: the model to distil from: "dense" for the model with its present weights, another module, or None.
        distill: weight of the distillation loss beside the loss of the labels, 0 to 1; with 0 no teacher is kept.
        temperature: of the distillation's softmax.
        seed: of everything random in ``finetune``.
        preserve_sparsity: keep weights at zero that are zero now, such as those that an earlier stage has pruned.
        original: the weights by name, not copied, against which the report measures noise; None: those of the model.
        from_scratch: the weights are random, or drawn in ``prepare`` where they are on ``meta``; "dense" is no teacher.
        rate: price of a coded bit. One of this and the next three at most; ``prepare`` meets it, training holds it.
        target_size: bytes of the file, at most.
        target_bits: bits of the file for each shared weight, at most.
        max_drop: points of top-1 that may be lost on ``prepare(val=...)``.

    Raises:
        PolicyError: the policy does not fit the model.
        MissingError: a weight is not finite, or timm builds another model with ``model_args``.
        UsageError: another word than "dense"; the model cannot be copied, trained or packed, or is being compressed.

    Example:
        >>> from compressor.policy.policy import Rule
        >>> job = Compressor(nn.Sequential(nn.Linear(16, 16)), Policy([Rule("*", scheme="kmeans", bits=2)]))
        >>> packed = job.prepare().finish()
        >>> len(job.model[0].weight.unique())
        4
    """

    search: Search | None = None
    """What the search for a target has found; None without a target, and before ``prepare``."""
    control: SizeControl | None = None
    """What holds the size, or ``max_drop``, in training; None where a price is given, and before ``prepare``."""
    steps, total_steps, _is_finished, _options = 0, 0, False, FileOptions()
    _measured: Measurement | None = None
    _fitting: Fitting  # since ``prepare``
    _converted: tuple[dict[str, SharedTensor], tuple[Codebook, ...]] | None = None

    def __init__(
        self,
        model: nn.Module,
        policy: Policy | None = None,
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
        rate: float | None = None,
        target_size: int | None = None,
        target_bits: float | None = None,
        max_drop: float | None = None,
    ) -> None:
        self.target = Target(rate, target_size, target_bits, max_drop)
        self.policy = policy = policy_for(policy, self.target)
        model = checked_module(model)
        check_not_shared(model)
        self.model = copy_module(model) if copy else model
        check_trainable(self.model)
        self.seed, self.distill, self.temperature = seed, distill, temperature
        self.preserve_sparsity, self.from_scratch = preserve_sparsity, from_scratch
        self.plans: list[TensorPlan] = policy.plan(self.model)
        check_target(self.target, self.plans)
        check_zeros(self.plans, preserve_sparsity)
        warn_of_dense(self.model, policy, self.plans)
        self.sites = [plan.site for plan in self.plans if plan.scheme]
        weights = {site.name: finite_weights(site) for site in self.sites if not (from_scratch and site.tensor.is_meta)}
        check_packable(self.model, meta=from_scratch)
        self.model_args = find_args(self.model, model_args)
        self.teacher = make_teacher(model, teacher, from_scratch) if distill > 0 else None
        copied = self.teacher.state_dict() if self.teacher is not None and teacher == "dense" else None
        self.dense = kept_weights(weights, copied or tensors_of(model if copy else None, original))
        self.original = self.dense if original is None else {name: original[name] for name in self.dense}
        self._in_eval = set(modules_in_eval(self.model))
        self.groups: list[Group] = []
        self.history = History()

    def __repr__(self) -> str:
        done = describe_progress(self.steps, self.total_steps, bool(self.groups), self._is_finished)
        return f"<Compressor: {describe_plans(self.plans)}; {done}>"

    def _repr_html_(self) -> str:
        return plans_table(self.plans)

    def prepare(
        self,
        calibration: Calibration | Literal["synthetic"] | None = None,
        virtual: bool = False,
        *,
        val: Batches | None = None,
        options: FileOptions | None = None,
        memory: int = MEMORY,
    ) -> Compressor:
        """Finds codebooks and indices for the weights, and makes the model compute with them.

        Args:
            calibration: about 256 images that the cost of errors is measured on; targets are not used. "synthetic":
                images made from the model itself. None: the cost of an error of a weight is its square.
            virtual: keep no dense weights where a scheme generates its indices, so that layers compute chunk by
                chunk; ``undo()`` and the noise in the report are then not available for these tensors.
            val: batches (inputs, targets) that ``max_drop`` is measured on.
            options: how the file will be written, where a target is given; None: as by ``finish().save(path)``.
            memory: bytes that the measurements of layers may take at a time, about; of a larger layer less is measured.

        Raises:
            UsageError: it is prepared or finished already; the images do not suit it; the target cannot be reached.
        """
        if self.groups or self._is_finished:
            raise UsageError("prepare() has been called: the model is shared already; make a new Compressor of it")
        self.target.check(val, virtual)
        self._options = options = options or FileOptions()
        if calibration is not None:
            minor = minor_tensors(self.model, self.plans)
            self._measured = Measurement.of(self.model, self.sites, calibration, self.dense, self.seed, memory, minor)
        if virtual:
            forget_generated(self.plans, self.dense)  # and from ``original``, which is the same dict by default
        shared, measured = self._shared_model({}, ()), self._measured
        fitting = Fitting(shared, self.dense, measured, self.preserve_sparsity, self.from_scratch, virtual, options)
        self._fitting = fitting
        self._share(*(fitting.search(self.target, val) if self.target.is_given else (fitting.at(None), None)))
        return self

    def _share(self, new: list[Group], found: Search | None) -> None:
        """Makes the model compute with new groups, and holds what was asked for by the price that was found."""
        self.groups, self.search = new, found
        if found is not None:
            self.policy, self.control = self.policy.priced(found.rate), self._fitting.control(self.target, new, found)
        if self.from_scratch:
            initialise(self.model)
        attach(self.model, new)

    def _shared_model(self, tensors: Mapping[str, SharedTensor], books: tuple[Codebook, ...]) -> SharedModel:
        return SharedModel(
            self.model, tensors, books, frozenset(), self.model_args, self.policy, self.plans, self.original, self.seed
        )

    def param_groups(self, lr: float, weight_decay: float = 0.0, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Returns the parameter groups for an optimiser, without decay on shared weights, codebooks, norms and biases.

        Args:
            lr: learning rate of the last layer.
            weight_decay: of the other weights: it would draw these off their codewords, and codebooks to zero.
            layer_decay: learning rate of a layer, relative to the next one's.
        """
        self._check_prepared("param_groups()")
        return param_groups(self.model, self.groups, lr, weight_decay, layer_decay)

    def attach(self, optimizer: Optimizer, total_steps: int, on_round: OnRound | None = None) -> None:
        """Makes the schemes follow the steps of an optimiser; a loop of your own has nothing else to call.

        Args:
            optimizer: of all parameters of the job, built after ``prepare()``.
            total_steps: of the whole training; rounds and schedules begin at shares of it.
            on_round: called when a scheme begins a round, with its parameters and the number of its steps. The
                optimiser's state of these parameters is dropped before; restarting their learning rate is up to you.

        Raises:
            UsageError: there is no step, the optimiser lacks what the job trains, or an embedding cannot be trained.
        """
        self._check_prepared("attach()")
        if total_steps < 1:
            raise UsageError(f"total_steps must be at least 1, got {total_steps}")
        freeze_untrained(self.groups)
        check_embeddings(self.sites)
        check_optimizer(optimizer, self.groups)
        self.total_steps = total_steps
        advance(self.groups, optimizer, self.steps, total_steps, on_round)
        optimizer.register_step_post_hook(lambda *_: self._step(optimizer, on_round))

    def _step(self, optimizer: Optimizer, on_round: OnRound | None) -> None:
        self.steps += 1
        advance(self.groups, optimizer, self.steps, self.total_steps, on_round)
        if self.control is not None:
            self.control.on_step(self.steps, self.total_steps)

    def loss(self, output: Tensor, target: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Returns the sum of the loss of the labels (cross entropy), distillation, and the penalties of the schemes.

        Args:
            output: float[batch, classes] or [batch, classes, ...], logits.
            target: int[batch] or [batch, ...], or float of the shape of ``output``, as ``cross_entropy`` takes them.
            inputs: the batch that the model was given; needed where there is a teacher.

        Raises:
            UsageError: there is a teacher and no inputs, or the teacher has other classes.
        """
        task = functional.cross_entropy(output, target)
        if self.teacher is not None and self.distill > 0:
            task = with_distillation(task, output, inputs, self.teacher, self.distill, self.temperature)
        return task + self.penalty(task)

    def penalty(self, task: Tensor | None = None) -> Tensor:
        """Returns the sum of the schemes' own terms of the loss, a scalar.

        Args:
            task: the loss without them, which some schemes scale theirs by; None: 1.
        """
        return penalties(self.groups, torch.ones(()) if task is None else task.detach())

    def finetune(
        self,
        train_loader: DataLoader[Any],
        val: Batches | None = None,
        config: TrainingConfig | int | None = None,
        *,
        on_epoch: OnEpoch | None = None,
        on_step: OnStep | None = None,
        device: str | None = None,
        amp: bool = False,
        checkpoints: Checkpoints | None = None,
        progress: bool | None = None,
        **overrides: Any,
    ) -> Compressor:
        """Trains shared weights and codebooks; to a size perhaps from finer grids, whose price ``search`` then has.

        Frozen weights, those with ``requires_grad_(False)``, have shared values since ``prepare()`` and keep them.
        Modules that were in eval mode while the model was in training mode, such as a BatchNorm, stay in eval mode.

        Args:
            train_loader: of batches (inputs, targets); it, and not ``batch_size``, says how large they are.
            val: batches to evaluate on after each epoch; with ``max_drop``, those of ``prepare``.
            config: the options of the training, or its number of epochs; None: the defaults of ``TrainingConfig``.
                ``distill`` and ``temperature`` are those of the constructor unless a whole config is given.
            on_epoch: called after each epoch, with top-1 on ``val``, 0 to 1, or None where there is no ``val``.
            on_step: called after each step.
            device: where to train, such as "cuda:1", and where the model stays; None: the fastest there is.
            amp: automatic mixed precision: bf16, or fp16 on a GPU without it.
            checkpoints: where the training is saved, and resumed from; see docs/resuming.md.
            progress: whether stderr shows a bar and epochs; None: on a terminal or in a notebook, without ``on_step``.
            overrides: fields of ``TrainingConfig`` that win over ``config``: ``epochs``, ``lr``, ``opt`` ...;
                ``mixup`` may also be a mixer of your own, such as ``timm.data.Mixup``, in place of all mixing.

        Raises:
            UsageError: an option does not exist or has a value that cannot be, or prepare() was not called.
            QualityError, ResourceError, InterruptionError: see ``compressor.training.loop.train``.
        """
        self._check_prepared("finetune()")
        distill = None if self.teacher is None else self.distill
        config, mixup = resolve_options(self.model, config, overrides, distill, self.temperature)
        train_loader = shard_loader(train_loader, device)
        updates = steps_per_epoch(train_loader, config.grad_accum)
        seed_all(self.seed % (1 << 32))
        facts = fingerprint(self.policy, config, mixup, self.seed, amp, self.original if checkpoints else None)
        checkpointer = TrainingCheckpointer(checkpoints, self, facts)
        if finer := self._fitting.finer(self.target, self.groups, self.search, config.epochs * updates, self.steps):
            self._share(*finer)
        parameters = self.param_groups(config.lr, config.weight_decay, config.layer_decay)
        optimizer, schedule = make_optimizer(parameters, config.opt, config.lr, config.sched, config.epochs, updates)
        self.attach(optimizer, self.steps + config.epochs * updates, schedule.restart)
        monitor = SharingMonitor(self.groups, self.control)
        self._in_eval.update(modules_in_eval(self.model))
        train_mode(self.model, self._in_eval)
        if self.control is not None:
            on_epoch = self.control.following(on_epoch, val, config.epochs)
        watching = watched(self.history, progress, on_epoch, on_step)
        with watching as calls, replaced(self, distill=config.distill, temperature=config.temperature):
            train(
                self.model, train_loader, self.loss, optimizer, schedule, config,
                evaluate_after_epoch(self.model, val, monitor, calls[0]), calls[1], device, amp, checkpointer,
                mixup=mixup,
            )  # fmt: skip
        return self

    def finish(
        self, calibration: Batches | None = None, half_untouched: bool | None = None, fold_norms: bool | None = None
    ) -> Packed:
        """Sets every shared weight to its codeword, and makes ``job.model`` an ordinary module again.

        Where it fails, as ``calibration`` may, it can be called again. A target of bytes is met with any options.

        Args:
            calibration: batches (inputs, targets) that the BatchNorm statistics are estimated on anew, for the
                weights that have changed, except of layers that have been put in eval mode. Where ``prepare`` had
                images, they are kept as they were unless that brings the answers to these nearer to the dense ones.
            half_untouched: store the float32 tensors that are not shared as float16; None: for a searched target.
            fold_norms: fold the statistics of BatchNorm layers into scale and shift, and round norms and biases. The
                model is then for inference, no longer for training. None: likewise, where it can be done.

        Returns:
            The packed model: it saves itself as a file, and reports what the file holds.

        Raises:
            UsageError: prepare() was not called; or with ``fold_norms=True`` a layer's statistics cannot be folded.
        """
        if fold_norms:
            check_foldable(self.model, [site.name for site in self.sites])
        half, fold = self._options.chosen(self.target, half_untouched, fold_norms)
        finishing = Finishing(calibration, self._in_eval, half, fold, self._measured, self.search, self.steps > 0)
        packed = finishing(self._shared_model(*self._convert(half, fold)))
        self._converted = None
        return packed

    def _convert(self, half: bool, fold: bool) -> tuple[dict[str, SharedTensor], tuple[Codebook, ...]]:
        """Takes the groups off the model and returns what they have learnt, the same where ``finish()`` has failed."""
        if self._converted is None:
            self._check_prepared("finish()")
            if self.control is not None:
                self.control.settle(half=half, fold=fold, trained=self.steps > 0)
            tensors, books, values = convert(self.groups, in_place=True)
            detach(self.model)
            for site, value in values.items():
                set_weight(site, value)
            self.groups, self._converted, self._is_finished = [], (tensors, books), True
        return self._converted

    def copied(self) -> Compressor:
        """Returns a job of its own in the same state, to ``finish()`` while this one goes on; some memory is shared."""
        job = deepcopy(self, {id(one): one for one in (self.teacher, self._measured, self.dense, self.original)})
        if job.control is not None:
            job.control.has_ended = False  # it is this one that warns of its end
        return job

    def undo(self) -> nn.Module:
        """Ends the sharing, gives the weights the values that they had before, and returns the model."""
        self._check_prepared("undo()")
        restore(self.model, self.groups, self.dense)
        self.groups, self.steps = [], 0
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Returns all that training changes, except optimiser, schedule and random generators: docs/resuming.md."""
        self._check_prepared("state_dict()")
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict()`` returned for the same model and policy; call it after ``attach()``."""
        self._check_prepared("load_state_dict()")
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]

    def _check_prepared(self, call: str) -> None:
        if not self.groups:
            raise not_shared(call, self._is_finished)
