"""Trains the small Keye from scratch on a CPU: `python -m examples.train_small.train --out DIR`.

The state of the run is saved to DIR/state.pt every `--save-every` steps. The same command resumes from there, and the result is
the same as without the interruption. DIR is also a checkpoint that `kk.Keye.from_pretrained` loads.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import keye_kernels as kk
from keye_kernels.model.decoder import TextBatch
from keye_kernels.model.positions import inverse_frequencies
from keye_kernels.segments import Segments

from . import world
from .batches import Batch, Batches, Recipe
from .checkpoint import PROCESSOR_FILES, new_model, save_weights, write_processor
from .curve import draw_curve

BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.98), 0.02, 1.0
EMA_DECAY = 0.995
AUXILIARY_LOSS_WEIGHT = 0.5
RECIPE = {
    "perception": "number of first steps, which train only the vision tower, on crowded images",
    "crowds": "images per batch in the first steps",
    "scenes": "images per batch in the later steps",
}
# Number of classes of each column of `Batch.attributes`. The first three have a class 0, "no object".
ATTRIBUTE_CLASSES = (
    len(world.SIZES) + 1,
    len(world.COLOURS) + 1,
    len(world.SHAPES) + 1,
    len(world.ROWS),
    len(world.COLUMNS),
)


class TrainingModel(nn.Module):
    """The model and two auxiliary heads, which are used in training only.

    The answers alone train the vision tower slowly, because they do not say where the objects are. The attribute head predicts
    the object and the position of every merged patch from the image features. The coverage head predicts the covered parts of
    every patch from the middle layer of the vision tower. Without the coverage head, shapes stay near chance for thousands of
    images.
    """

    def __init__(self, model: kk.Keye):
        super().__init__()
        self.model = model
        vision = model.config.vision_config
        self.attributes = nn.Linear(model.config.hidden_size, sum(ATTRIBUTE_CLASSES))
        self.coverage = nn.Linear(vision.hidden_size, 16)
        self._middle: Tensor | None = None
        model.visual.layers[vision.num_hidden_layers // 2 - 1].register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._middle = output

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the answers, loss of the auxiliary heads, and whether each answer token is right [len(labels)]."""
        model, decoder = self.model, self.model.model
        features = model.get_image_features(batch.pixel_values, batch.grid_thw)
        heads = zip(self.attributes(features).split(ATTRIBUTE_CLASSES, dim=1), batch.attributes.unbind(1), strict=True)
        auxiliary = sum(F.cross_entropy(logits, labels) for logits, labels in heads)
        auxiliary = auxiliary + F.binary_cross_entropy_with_logits(self.coverage(self._middle), batch.coverage)
        if len(batch.labels) == 0:
            return auxiliary.new_zeros(()), auxiliary, torch.zeros(0, dtype=torch.bool)
        embeds = decoder.embed_tokens(batch.input_ids)
        embeds = embeds.index_put((batch.placeholders,), features[batch.feature_index])
        hidden = self._decode(embeds, batch)[batch.targets]
        logits = model.lm_head(decoder.norm(hidden))
        answers = F.cross_entropy(logits, batch.labels, reduction="none") @ batch.weights / batch.weights.sum()
        return answers, auxiliary, logits.argmax(1) == batch.labels

    def _decode(self, x: Tensor, batch: Batch) -> Tensor:
        """Decoder layers on packed sequences [T, hidden], without padding. Attention stays within a sequence."""
        config = self.model.config
        inv_freq = inverse_frequencies(config.rope_theta, config.head_dim // 2, x.device)
        segments = Segments.from_lengths(batch.cu_seqlens.diff().tolist(), x.device)
        text = TextBatch(1, batch.position_ids, inv_freq, torch.empty(0), segments, None)
        for layer in self.model.model.layers:
            x = layer(x, text, None)
        return x


class Run:
    """A training run: model, averaged weights, optimizer, step and loss history, saved and loaded together."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, Path(options.out)
        if self.out.is_dir() and any(self.out.iterdir()) and not self._is_run_folder():
            raise ValueError(
                f"--out {self.out} contains files of something else; use a new folder, an empty one or that of an earlier run"
            )
        config = write_processor(self.out)
        self.training_model = TrainingModel(new_model(config, options.seed))
        self.average = {name: p.detach().clone() for name, p in self.training_model.model.named_parameters()}
        matrices = [p for p in self.training_model.parameters() if p.ndim > 1]
        others = [p for p in self.training_model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, fused=True)
        self.step, self.history, self.seconds = 0, [], 0.0
        if (self.out / "state.pt").is_file():
            self._load()

    def train(self) -> None:
        """Trains from the current step to the last one."""
        options, model = self.options, self.training_model.model
        processor = kk.KeyeProcessor.from_pretrained(self.out)
        data = Batches(processor, model.config, Recipe(options.seed, *(getattr(options, name) for name in RECIPE)))
        steps = range(self.step, options.steps)
        workers = {"num_workers": 1, "prefetch_factor": 4, "worker_init_fn": _start_worker} if options.worker else {}
        batches = iter(DataLoader(data, batch_size=None, sampler=steps, **workers))
        parameters = list(model.parameters())
        start = time.perf_counter() - self.seconds
        with tqdm(
            total=options.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=options.progress_interval,
        ) as bar:
            for batch in batches:
                for group in self.optimizer.param_groups:
                    group["lr"] = options.lr * self.learning_rate_factor(self.step)
                answers, auxiliary, right = self.training_model(batch)
                self.optimizer.zero_grad()
                (answers + AUXILIARY_LOSS_WEIGHT * auxiliary).backward()
                nn.utils.clip_grad_norm_(self.training_model.parameters(), MAX_GRAD_NORM)
                self.optimizer.step()
                self.step += 1
                decay = min(EMA_DECAY, (self.step - 1) / (self.step + 8))
                torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in parameters], 1 - decay)
                # NaN for a batch without questions
                answer_loss = answers.item() if len(right) else math.nan
                self.history.append([answer_loss, auxiliary.item(), right.float().mean().item()])
                self.seconds = time.perf_counter() - start
                means = torch.tensor(self.history[-50:]).nanmean(0).tolist()
                bar.set_postfix_str("loss {:.3f}, auxiliary loss {:.3f}, token accuracy {:.1%}".format(*means), False)
                bar.update()
                if self.step % options.save_every == 0 or self.step == options.steps:
                    self.save()
        draw_curve(self.history, self.out / "loss.png")

    def _is_run_folder(self) -> bool:
        """Whether the folder contains a saved run, or only the files that a run writes before its first save."""
        if (self.out / "state.pt").is_file():
            return True
        return {file.name for file in self.out.iterdir()} <= PROCESSOR_FILES

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up at the start of each stage, then constant, and a cosine decay over the last steps."""
        stage_start = self.options.perception if step >= self.options.perception else 0
        warmup = min(1.0, (step - stage_start + 1) / self.options.warmup)
        remaining = min(1.0, (self.options.steps - step) / self.options.decay)
        return warmup * (1 - math.cos(math.pi * remaining)) / 2

    def save(self) -> None:
        """Writes the state of the run and the averaged weights. Each file is replaced atomically."""
        state = {
            "settings": self._settings(),
            "step": self.step,
            "seconds": self.seconds,
            "history": torch.tensor(self.history),
            "training_model": self.training_model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.out / "state.pt.part")
        os.replace(self.out / "state.pt.part", self.out / "state.pt")
        save_weights(self.training_model.model, self.average, self.out)

    def _load(self) -> None:
        try:
            state = torch.load(self.out / "state.pt", weights_only=True)
        except Exception as error:  # the unpickler raises many types for a broken file
            raise ValueError(f"{self.out / 'state.pt'} is not a saved run: {type(error).__name__}: {error}") from error
        if state["settings"] != self._settings():
            raise ValueError(
                f"{self.out} contains a run with other settings: {json.dumps(state['settings'])}; "
                "resume with those, or choose another folder with --out"
            )
        self.training_model.load_state_dict(state["training_model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"].tolist()

    def _settings(self) -> dict[str, float]:
        """The options that a resumed run must share with the saved one. --steps and --decay may change."""
        return {name: getattr(self.options, name) for name in ("seed", "lr", "warmup", *RECIPE)}


def _start_worker(number: int) -> None:
    torch.set_num_threads(1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_small.train", description="Train the small Keye from scratch."
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the checkpoint; a run in it is resumed")
    parser.add_argument("--steps", type=int, default=6000, help="total number of steps")
    parser.add_argument("--decay", type=int, default=1200, help="number of last steps with a decaying learning rate")
    parser.add_argument("--warmup", type=int, default=150, help="warm-up steps at the start of each stage")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    for name, text in RECIPE.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe, name), help=text)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads")
    parser.add_argument(
        "--worker", action=argparse.BooleanOptionalAction, default=True, help="create batches in a second process"
    )
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS", help="steps between saves")
    parser.add_argument(
        "--progress-interval",
        type=float,
        default=0.5,
        metavar="SECONDS",
        help="time between updates of the progress bar",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        for name in ("steps", "decay", "warmup", "threads", "save_every"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
        torch.set_num_threads(options.threads)
        run = Run(options)
        run.train()
    except (ValueError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"train: interrupted; the same command resumes from the last save in {options.out}", file=sys.stderr)
        return 130
    print(f"{run.step} steps in {run.seconds / 60:.0f} minutes; wrote the checkpoint {run.out} and the loss curve loss.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
