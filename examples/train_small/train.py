"""Trains the small Keye from nothing on a CPU: `python -m examples.train_small.train --out DIR`.

Every `--save-every` steps the run's whole state goes to DIR/state.pt, and the same command goes on from there; the result is
the same as without the break. DIR becomes a checkpoint that `kk.Keye.from_pretrained` loads.
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

from . import world
from .batches import Batch, Batches, Recipe
from .checkpoint import PROCESSOR_FILES, new_model, save_weights, write_processor
from .curve import draw_curve

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.02, 1.0
EMA = 0.995
LOOKS_WEIGHT = 0.5
RECIPE = {
    "perception": "first steps, in which only the tower learns, from crowded pictures",
    "crowds": "pictures in a batch of the first steps",
    "scenes": "pictures in a batch of the later steps",
}
# Classes of `Batch.looks`; 0 is "nothing" for the first three
LOOKS = (len(world.SIZES) + 1, len(world.COLOURS) + 1, len(world.SHAPES) + 1, len(world.ROWS), len(world.COLUMNS))


class Trainee(nn.Module):
    """The model, and two readouts of its tower that only training uses.

    The answers say nothing about where to look, so they reach the tower slowly. Every token of a picture is asked, too, what
    it shows and where it lies; and every patch, halfway up the tower, which parts of it an object covers. Without the second
    question shapes stay a guess for thousands of pictures.
    """

    def __init__(self, model: kk.Keye):
        super().__init__()
        self.model = model
        vision = model.config.vision_config
        self.looks = nn.Linear(model.config.hidden_size, sum(LOOKS))
        self.coverage = nn.Linear(vision.hidden_size, 16)
        self._halfway: Tensor | None = None
        model.visual.layers[vision.num_hidden_layers // 2 - 1].register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._halfway = output

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of the answers, loss of the readouts, and which of the answers' tokens [len(labels)] are right."""
        model, decoder = self.model, self.model.model
        features = model.get_image_features(batch.pixel_values, batch.grid_thw)
        readouts = zip(self.looks(features).split(LOOKS, dim=1), batch.looks.unbind(1), strict=True)
        looks = sum(F.cross_entropy(logits, labels) for logits, labels in readouts)
        looks = looks + F.binary_cross_entropy_with_logits(self.coverage(self._halfway), batch.coverage)
        if len(batch.labels) == 0:
            return looks.new_zeros(()), looks, torch.zeros(0, dtype=torch.bool)
        embeds = decoder.embed_tokens(batch.input_ids)
        embeds = embeds.index_put((batch.placeholders,), features[batch.feature_index])
        hidden = self._decode(embeds, batch)[batch.targets]
        logits = model.lm_head(decoder.norm(hidden))
        answers = F.cross_entropy(logits, batch.labels, reduction="none") @ batch.weights / batch.weights.sum()
        return answers, looks, logits.argmax(1) == batch.labels

    def _decode(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, hidden] through the decoder's layers, all questions packed: no padding, and none sees another."""
        config = self.model.config
        inv_freq = inverse_frequencies(config.rope_theta, config.head_dim // 2, x.device)
        text = TextBatch(1, batch.position_ids, inv_freq, torch.empty(0), batch.cu_seqlens, None)
        for layer in self.model.model.layers:
            x = layer(x, text, None)
        return x


class Run:
    """A training run: model, its moving average, optimizer, step and history, saved and loaded as one."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, Path(options.out)
        if self.out.is_dir() and any(self.out.iterdir()) and not self._began_here():
            raise ValueError(
                f"--out {self.out} holds something else; name a new or an empty folder, or one of an earlier run"
            )
        config = write_processor(self.out)
        self.trainee = Trainee(new_model(config, options.seed))
        self.average = {name: p.detach().clone() for name, p in self.trainee.model.named_parameters()}
        matrices = [p for p in self.trainee.parameters() if p.ndim > 1]
        others = [p for p in self.trainee.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, fused=True)
        self.step, self.history, self.seconds = 0, [], 0.0
        if (self.out / "state.pt").is_file():
            self._load()

    def train(self) -> None:
        """Trains from the step reached to the last one."""
        options, model = self.options, self.trainee.model
        processor = kk.KeyeProcessor.from_pretrained(self.out)
        data = Batches(processor, model.config, Recipe(options.seed, *(getattr(options, name) for name in RECIPE)))
        steps = range(self.step, options.steps)
        workers = {"num_workers": 1, "prefetch_factor": 4, "worker_init_fn": _start_worker} if options.worker else {}
        batches = iter(DataLoader(data, batch_size=None, sampler=steps, **workers))
        parameters = list(model.parameters())
        begin = time.perf_counter() - self.seconds
        with tqdm(
            total=options.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=options.tick
        ) as bar:
            for batch in batches:
                for group in self.optimizer.param_groups:
                    group["lr"] = options.lr * self.rate(self.step)
                answers, looks, right = self.trainee(batch)
                self.optimizer.zero_grad()
                (answers + LOOKS_WEIGHT * looks).backward()
                nn.utils.clip_grad_norm_(self.trainee.parameters(), CLIP)
                self.optimizer.step()
                self.step += 1
                kept = min(EMA, (self.step - 1) / (self.step + 8))
                torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in parameters], 1 - kept)
                # Not a number where nothing was asked
                asked = answers.item() if len(right) else math.nan
                self.history.append([asked, looks.item(), right.float().mean().item()])
                self.seconds = time.perf_counter() - begin
                loss, readout, share = torch.tensor(self.history[-50:]).nanmean(0).tolist()
                bar.set_postfix_str(f"loss {loss:.3f}, readout {readout:.3f}, tokens right {share:.1%}", False)
                bar.update()
                if self.step % options.save_every == 0 or self.step == options.steps:
                    self.save()
        draw_curve(self.history, self.out / "loss.png")

    def _began_here(self) -> bool:
        """Whether the folder holds a run, or what a run writes before its first save."""
        if (self.out / "state.pt").is_file():
            return True
        return {file.name for file in self.out.iterdir()} <= PROCESSOR_FILES

    def rate(self, step: int) -> float:
        """Share of the learning rate: in each stage a linear warm-up, then constant; half a cosine over the last steps."""
        began = self.options.perception if step >= self.options.perception else 0
        warm = min(1.0, (step - began + 1) / self.options.warmup)
        left = min(1.0, (self.options.steps - step) / self.options.decay)
        return warm * (1 - math.cos(math.pi * left)) / 2

    def save(self) -> None:
        """Writes the state and the averaged weights; each file is whole or the old one at any moment."""
        state = {
            "settings": self._settings(),
            "step": self.step,
            "seconds": self.seconds,
            "history": torch.tensor(self.history),
            "trainee": self.trainee.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.out / "state.pt.part")
        os.replace(self.out / "state.pt.part", self.out / "state.pt")
        save_weights(self.trainee.model, self.average, self.out)

    def _load(self) -> None:
        try:
            state = torch.load(self.out / "state.pt", weights_only=True)
        except Exception as error:  # whatever the unpickler makes of a broken file
            raise ValueError(f"{self.out / 'state.pt'} is not a saved run: {type(error).__name__}: {error}") from error
        if state["settings"] != self._settings():
            raise ValueError(
                f"{self.out} holds a run with other settings: {json.dumps(state['settings'])}; "
                "go on with those, or name another folder with --out"
            )
        self.trainee.load_state_dict(state["trainee"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"].tolist()

    def _settings(self) -> dict[str, float]:
        """What the weights of every step before the decay depend on."""
        return {name: getattr(self.options, name) for name in ("seed", "lr", "warmup", *RECIPE)}


def _start_worker(number: int) -> None:
    torch.set_num_threads(1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.train_small.train", description="Train the small Keye.")
    parser.add_argument("--out", required=True, metavar="DIR", help="the checkpoint; a run that is there goes on")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--decay", type=int, default=1200, help="last steps, in which the rate falls")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    for name, meaning in RECIPE.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe, name), help=meaning)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", action=argparse.BooleanOptionalAction, default=True, help="draw in another process")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument(
        "--tick", type=float, default=0.5, metavar="SECONDS", help="between updates of the progress bar"
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
        print(f"train: stopped; the same command goes on from the last save in {options.out}", file=sys.stderr)
        return 130
    print(f"{run.step} steps in {run.seconds / 60:.0f} minutes; {run.out} is a checkpoint, loss.png its curve")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
