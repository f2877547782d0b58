"""The training loop: gradients, Adam, running averages, checkpoints that a kill cannot spoil, a validation curve.

A step is a function of (seed, step number, weights), so a run given in `steps` and killed at any moment ends
with the bits of an uninterrupted one, in one process or in as many as before. A run given in minutes follows the
clock instead: its learning rate decays with the time used, counted across restarts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recon3d.priors.checkpoints.folder import write_folder
from recon3d.priors.network_prior import compute_dtype
from recon3d.priors.networks import UNet
from recon3d.priors.training.card import model_card
from recon3d.priors.training.config import TrainConfig
from recon3d.priors.training.curve import write_curve
from recon3d.priors.training.data import SliceData
from recon3d.priors.training.objectives import Objective
from recon3d.priors.training.sheets import write_denoised, write_samples
from recon3d.priors.training.start import start_from
from recon3d.priors.training.state import State
from recon3d.priors.training.team import Team, team
from recon3d.priors.training.throughput import Rate, bf16_peak, flops_per_pixel
from recon3d.priors.training.validation import best, draw, measure, row, waited

__all__ = ["Progress", "TrainResult", "train"]


@dataclass(frozen=True)
class Progress:
    """Told to the progress callback after every step."""

    step: int
    fraction: float  # of the steps or minutes asked for
    elapsed_s: float
    images: int
    loss: float  # mean of about the last 100 steps
    learning_rate: float
    validation: dict[float, float] | None  # sigma -> PSNR in dB (peak 1 network unit), when just measured
    saved: bool
    images_per_s: float  # of all processes, over about the last minute
    left_s: float  # at this rate; infinite before there is one
    peak_share: float | None  # of the bfloat16 operations that the GPUs could do, where they are known


@dataclass(frozen=True)
class TrainResult:
    """Where a finished or stopped run stands."""

    out: Path
    prior: Path  # the folder load_prior takes
    step: int
    finished: bool
    validation: dict[float, float]
    stopped_early: bool = False  # finished because the held-out loss fell no more


def train(
    config: TrainConfig,
    progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train a prior, or go on with the run found in `config.out`.

    In a process that torchrun started, or that has a process group of its own, every process must call this with the
    same configuration; the batch is then shared among them. All of them read the data, the first one alone writes.

    Args:
        config: the run; see `TrainConfig`.
        progress: called after every step, in the first process.
        should_stop: asked after every step, in the first process; True saves a checkpoint and the prior as it stands,
            and returns.

    Returns:
        A `TrainResult`; `finished` is False when stopped.

    Raises:
        ValueError: no training data, or `config.out` holds a run with other settings.
    """
    device = torch.device(config.device)
    with (
        _one_thread_each(device),
        team(device) as (group, device),
        ThreadPoolExecutor(config.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        return _Run(config, pool, group, device).go(progress, should_stop)


@contextmanager
def _one_thread_each(device: torch.device) -> Iterator[None]:
    # every thread of the run computes alone: two that meet at the end of a step wait for each other far less than two
    # that meet after every operation, above all on a machine with other work
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# what the first process says after a step
_ON, _DONE, _STOPPED, _EARLY = range(4)


class _Run:
    def __init__(self, config: TrainConfig, pool: ThreadPoolExecutor, group: Team, device: torch.device) -> None:
        self.config, self.pool, self.team, self.device = config, pool, group, device
        self.out = Path(config.out)
        self.data = SliceData(config)
        self.half = config.bfloat16 and compute_dtype(device) is torch.bfloat16
        self.model = self._objective()
        self.checkpoint = self.out / "checkpoint.safetensors"
        if config.init is not None and not self.checkpoint.exists():
            start_from(self.model.net, config.init, config.data.slices, config.beside_channels)
        named = dict(self.model.net.named_parameters())
        adam = torch.optim.AdamW(
            named.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.state = State(named, adam)
        # a GPU takes the batch whole
        shares = config.workers if device.type == "cpu" else 1
        self.replicas = [self.model, *(self._replica() for _ in range(shares - 1))]
        if config.compile:
            for replica in self.replicas:
                replica.net.compile()
        if self.checkpoint.exists():
            self.state.restore(self.checkpoint, config)
        self.ahead: dict[int, Future[tuple[Tensor, ...]]] = {}
        self.rate, self.pixels = Rate(), 0
        self.peak = bf16_peak(device)
        self.started = self.saved_at = self.validated_at = time.monotonic()
        self.before = self.state.count.elapsed_s

    def go(self, progress: Callable[[Progress], None] | None, should_stop: Callable[[], bool] | None) -> TrainResult:
        count = self.state.count
        verdict = _DONE if self._fraction() >= 1 else _EARLY if self._exhausted() else _ON
        while verdict == _ON:
            rate = self._timed_step()
            if self.team.first:
                verdict = self._after_step(rate, progress, should_stop)
            count.elapsed_s, said = self.team.agree(count.elapsed_s, verdict)
            verdict = int(said)
        done = verdict != _STOPPED
        return TrainResult(self.out, self.out / "prior", count.step, done, self._psnr(), verdict == _EARLY)

    def _after_step(
        self, rate: float, progress: Callable[[Progress], None] | None, should_stop: Callable[[], bool] | None
    ) -> int:
        """Validate, save and report as it is due; what to do next."""
        cfg, count, now = self.config, self.state.count, time.monotonic()
        verdict = _DONE if self._fraction() >= 1 else _ON
        if verdict == _ON and should_stop is not None and should_stop():
            verdict = _STOPPED
        due = _due(count.step, now - self.validated_at, cfg.validate_every_steps, cfg.validate_every_s)
        validated = due or verdict == _DONE
        if validated:
            self._validate()
            self.validated_at = time.monotonic()
            if verdict == _ON and self._exhausted():
                verdict = _EARLY
        saved = verdict != _ON or _due(count.step, now - self.saved_at, cfg.save_every_steps, cfg.save_every_s)
        if saved:
            self.state.save(self.checkpoint, cfg)
            self.saved_at = time.monotonic()
        if verdict == _STOPPED and not validated:
            self._export()
        if progress is not None:
            progress(self._progress(rate, validated, saved))
        return verdict

    def _progress(self, rate: float, validated: bool, saved: bool) -> Progress:
        count, done = self.state.count, min(1.0, self._fraction())
        mean = self.rate.images_per_s
        left = 60 * float(self.config.budget_minutes or 0) * (1 - done)
        if self.config.steps is not None:
            left = (self.config.steps - count.step) * self.rate.seconds_per_step
        share = None
        if self.peak is not None:
            share = self.rate.pixels_per_s * flops_per_pixel(self.config.network) / (self.peak * self.team.size)
        report = self._psnr() if validated else None
        return Progress(
            count.step, done, count.elapsed_s, count.images, count.loss, rate, report, saved, mean, left, share
        )

    def _fraction(self) -> float:
        if self.config.steps is not None:
            return self.state.count.step / self.config.steps
        return self.state.count.elapsed_s / 60 / float(self.config.budget_minutes or 1)

    def _exhausted(self) -> bool:
        return self.config.patience is not None and waited(self.state.curve) >= self.config.patience

    def _psnr(self) -> dict[float, float]:
        """Of the last validation."""
        last = self.state.curve[-1] if self.state.curve else {}
        return {v: last[f"psnr_db_sigma_{v:g}"] for v in self.config.validation_sigmas if last}

    def _timed_step(self) -> float:
        count, began = self.state.count, time.monotonic()
        before = (count.images, self.pixels)
        rate = self._step()
        now = time.monotonic()
        self.rate.add(count.images - before[0], self.pixels - before[1], now - began)
        count.elapsed_s = self.before + now - self.started
        return rate

    def _step(self) -> float:
        cfg, count = self.config, self.state.count
        rate = (
            cfg.learning_rate
            * min(1.0, (count.step + 1) / max(1, cfg.warmup_steps))
            * _decay(self._fraction(), cfg.decay_share)
        )
        batch = self._batch(count.step)
        images = len(batch[0])
        mine = self.team.share(images)
        # shares are cut by the configuration alone and added in order: the sum does not depend on timing
        cuts = [t[mine.start : mine.stop].tensor_split(max(1, min(len(self.replicas), len(mine)))) for t in batch]
        jobs = [
            self.pool.submit(self._gradient, model, images, *part)
            for model, *part in zip(self.replicas, *cuts, strict=False)
        ]
        losses = [job.result() for job in jobs]
        parameters = list(self.state.named.values())
        for replica in self.replicas[1 : len(losses)]:
            for p, q in zip(parameters, replica.net.parameters(), strict=True):
                if p.grad is not None and q.grad is not None:
                    p.grad.add_(q.grad)
        loss = torch.stack(losses).sum()
        self.team.add([loss, *(p.grad for p in parameters if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip_norm)
        size, value = torch.stack([norm, loss]).tolist()
        if not math.isfinite(size):
            raise FloatingPointError(f"train: the gradient is not finite at step {count.step}; lower learning_rate")
        for group in self.state.adam.param_groups:
            group["lr"] = rate
        self.state.adam.step()
        count.step += 1
        count.images += images
        self.pixels += images * batch[0][0, 0].numel()
        half_life = min(cfg.ema_halflife_images, cfg.ema_ramp * count.images)
        keep = 0.5 ** (images / max(half_life, 1e-8))
        for k, p in self.state.named.items():
            self.state.ema[k].lerp_(p.detach(), 1 - keep)
        count.loss = value if math.isnan(count.loss) else count.loss + 0.01 * (value - count.loss)
        return rate

    def _batch(self, step: int) -> tuple[Tensor, ...]:
        """On the device; for a GPU batches are made ahead, as many at a time as there are workers."""
        if self.device.type == "cpu":
            return self.data.batch(step)
        for k in range(step, step + self.config.workers + 1):
            if k not in self.ahead:
                self.ahead[k] = self.pool.submit(self.data.batch, k)
        return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in self.ahead.pop(step).result())

    def _gradient(self, model: Objective, images: int, clean: Tensor, *rest: Tensor) -> Tensor:
        """Gradient of a share's part of the batch mean, left in the model; returns that part of the loss."""
        if len(clean) == 0:  # fewer images than processes
            for p in model.net.parameters():
                p.grad = torch.zeros_like(p)
            return torch.zeros((), device=self.device)
        model.zero_grad(set_to_none=True)
        with self._autocast():
            loss = model.loss(clean, *rest)
        loss = loss * (len(clean) / images)
        torch.autograd.backward(loss)
        return loss.detach()

    def _replica(self) -> Objective:
        """A model over the same weights with gradients of its own."""
        replica = self._objective()
        for p, q in zip(self.model.net.parameters(), replica.net.parameters(), strict=True):
            q.data = p.data
        return replica

    def _objective(self) -> Objective:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)  # the initial weights; nothing else draws from torch's generator
            net = UNet(self.config.network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Objective(net, self.config).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def _validate(self) -> None:
        """A row of the curve, pictures, and the prior as it stands, unless patience keeps a better one."""
        cfg, count = self.config, self.state.count
        model = self._objective()
        model.net.load_state_dict(self.state.ema)
        model.eval()
        clean, noise, *beside = (t.to(self.device) for t in self.data.validation_set())
        over = self.pool.map if self.device.type == "cpu" else map
        also = beside[0] if beside else None
        found = measure(model, clean, noise, also, cfg.validation_sigmas, self._autocast, over)
        counts = {"step": count.step, "images": count.images, "elapsed_s": round(count.elapsed_s, 1)}
        self.state.curve.append(row(found, {**counts, "train_loss": count.loss}, cfg.sigma_data))
        write_curve(self.out, self.state.curve)
        sheets = self.out / "sheets"
        write_denoised(sheets / f"denoised_{count.step:08d}.png", found, clean, cfg.data.slices, cfg.data.complex)
        if cfg.samples > 0:
            # of the size that the network was trained on, from the middle of the slices where anything is beside them
            h, w = (min(cfg.crops[0].size, n) for n in clean.shape[-2:])
            top, left = (clean.shape[-2] - h) // 2, (clean.shape[-1] - w) // 2
            each = None if also is None else also[torch.arange(cfg.samples) % len(also)]
            each = None if each is None else each[..., top : top + h, left : left + w]
            images = draw(model, cfg, (clean.shape[1], h, w), each, self.device, self._autocast)
            write_samples(sheets / f"samples_{count.step:08d}.png", images, clean, cfg.data.slices, cfg.data.complex)
        if cfg.patience is None or best(self.state.curve) == len(self.state.curve) - 1:
            self._export()

    def _export(self) -> None:
        """Write the averaged weights, with their card, into `out/prior`."""
        names = tuple(v.name for v in self.data.volumes)
        card = model_card(self.config, self.state, names, self.data.validation.name, self._psnr())
        write_folder(self.out / "prior", card, self.state.ema)


def _decay(fraction: float, share: float) -> float:
    """1, then half a cosine down to 0 over the last share: useful steps however unevenly the machine gives them."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, 1 - (1 - fraction) / share))))


def _due(step: int, since_s: float, every_steps: int | None, every_s: float) -> bool:
    return step % every_steps == 0 if every_steps else since_s >= every_s
