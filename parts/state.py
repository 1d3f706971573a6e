"""Holds the state of a training run (everything that changes from step to step), and saves and loads this state."""

import glob
import sys
import time
import zipfile
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from parts.errors import explain_errors
from parts.model import Model
from parts.ranks import from_all_ranks, world_size
from parts.records import atomic_write, differing_field


class Diverged(Exception):
    """Reports that loss or class logits became NaN or infinite, or that no step changed a weight. A sweep continues."""


class Training:
    """Holds a model in training with its optimiser, its learning rate schedule and its results so far."""

    def __init__(self, model: Model, config: dict, classifier_only: bool = False):
        self.model, self.config, self.classifier_only = model, config, classifier_only
        self.device = model.backbone.device
        self.lam, self.tau = (0.0 if classifier_only else config["lam"]), config["tau"]  # the second stage is CE
        self.optimizer = make_optimizer(model, config, classifier_only)
        warmup_steps = min(round(config["warmup_ratio"] * config["steps"]), config["steps"] - 1)
        self.schedule = transformers.get_linear_schedule_with_warmup(self.optimizer, warmup_steps, config["steps"])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config["precision"] == "fp16")
        self.network = nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model
        if config["compile"]:
            self.network = torch.compile(self.network, dynamic=True)
        self.step = 0  # number of the current step; the first step is 1
        self.sums: dict[str, Tensor] = {}  # the sum of each loss over the steps since the last validation
        self.best_weights: dict[str, Tensor] = {}
        self.result: dict = {"best_step": None, "validation_accuracy": None, "validation_accuracies": []}
        self.started = time.perf_counter()

    def mean_losses(self) -> dict[str, float]:
        """Returns the mean of each loss since the last validation. Waits until the device has computed all losses."""
        steps = (self.step - 1) % self.config["eval_every"] + 1  # since the last validation
        means = torch.stack([total / steps for total in self.sums.values()]).tolist()  # a single copy to the CPU
        return dict(zip(self.sums, means, strict=True))

    def record_accuracy(self, accuracy: float) -> None:
        """Records the validation accuracy of the current step.

        Copies the model's weights if the accuracy is at least as high as all earlier validation accuracies.
        """
        self.result["validation_accuracies"].append([self.step, accuracy])
        if not self.best_weights or accuracy >= self.result["validation_accuracy"]:
            self.result |= {"best_step": self.step, "validation_accuracy": accuracy}
            self.best_weights = {name: weight.cpu().clone() for name, weight in self.model.state_dict().items()}

    def restore_best(self) -> None:
        """Loads the weights with the best validation accuracy into the model, if there was a validation."""
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)

    def save(self, file: Path) -> None:
        modules = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule", "scaler")}
        plain = {name: getattr(self, name) for name in ("classifier_only", "step", "sums", "result", "best_weights")}
        seconds = time.perf_counter() - self.started
        saved = {"config": self.config, "modules": modules, "plain": plain, "seconds": seconds}
        with atomic_write(file) as part, open(part, "wb") as opened:
            torch.save(saved, opened)

    @classmethod
    def start_or_resume(cls, model: Model, config: dict, state_file: Path) -> "Training":
        """Loads the saved state of this run, or starts at step 1.

        Prints a note about saved states of runs with the same method and seed, but other flags.
        """
        if any(from_all_ranks(state_file.is_file())):
            training = cls.load(model, config, state_file)
            print(f"resuming after step {training.step}, from {state_file}")
            return training
        same_arm_and_seed = glob.escape(str(state_file.parent / f"{config['arm']}-seed{config['seed']}-"))
        for other in glob.glob(f"{same_arm_and_seed}*.state.pt"):
            print(f"note: {other} is the saved state of a run with other flags; this run starts at step 1",
                  file=sys.stderr)
        return cls(model, config)

    @classmethod
    def load(cls, model: Model, config: dict, file: Path) -> "Training":
        """Restores the training state that `save` wrote. Rejects a damaged file and the state of another run."""
        with explain_errors("--save-every", file, "the saved state of this run; delete the file to start again"):
            if damaged := zipfile.ZipFile(file).testzip():
                raise ValueError(f"{damaged} is damaged")
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if field := differing_field(config, saved["config"]):
                raise ValueError(f"its run had other {field}")
            training = cls(model, config, saved["plain"]["classifier_only"])
            for name, values in saved["modules"].items():
                getattr(training, name).load_state_dict(values)
            vars(training).update(saved["plain"], started=training.started - saved["seconds"])
            training.sums = {name: total.to(training.device) for name, total in training.sums.items()}
        return training


def make_optimizer(model: Model, config: dict, classifier_only: bool) -> torch.optim.Optimizer:
    """Returns AdamW with fairseq's settings for GLUE. Freezes the encoder if `classifier_only` is true (second stage).

    The classifier has its own learning rate, `head_lr`. Biases and layer norms have no weight decay. With lam = 1, the
    first stage does not train the classifier, so the first stage has no weight decay for the classifier.
    """
    classifier, groups = model.classifier_names(), dict[tuple[float, float], dict]()
    for name, parameter in model.named_parameters():
        if classifier_only and name not in classifier:
            parameter.requires_grad_(False)
        lr = config["head_lr" if name in classifier else "lr"]
        is_untrained = name in classifier and config["lam"] == 1 and not classifier_only
        decay = 0.0 if is_untrained or parameter.ndim == 1 else config["weight_decay"]
        groups.setdefault((lr, decay), {"lr": lr, "weight_decay": decay, "params": []})["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), betas=(0.9, 0.98), eps=1e-6, fused=True)
