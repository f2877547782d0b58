"""The training loop: EDM loss, Adam, EMA, checkpoints that a kill cannot spoil, a validation curve.

A step is a function of (seed, step number, weights), so a run given in `steps` and killed at any moment ends
with the bits of an uninterrupted one. A run given in minutes follows the clock instead: its learning rate
decays with the time used, counted across restarts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from recon3d.io import BadInput
from recon3d.priors.base import ModelCard
from recon3d.priors.checkpoints.atomic import write_safetensors
from recon3d.priors.checkpoints.folder import read_folder, write_folder
from recon3d.priors.networks import EDMDenoiser, UNet
from recon3d.priors.training.config import TrainConfig
from recon3d.priors.training.curve import write_curve
from recon3d.priors.training.data import SliceData
from recon3d.priors.training.pairs import condition_card

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


@dataclass(frozen=True)
class TrainResult:
    """Where a finished or stopped run stands."""

    out: Path
    prior: Path  # the folder load_prior takes
    step: int
    finished: bool
    validation: dict[float, float]


def train(
    config: TrainConfig,
    progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train a prior, or go on with the run found in `config.out`.

    Args:
        config: the run; see `TrainConfig`.
        progress: called after every step.
        should_stop: asked after every step; True saves a checkpoint and the prior as it stands, and returns.

    Returns:
        A `TrainResult`; `finished` is False when stopped.

    Raises:
        ValueError: no training data, or `config.out` holds a run with other settings.
    """
    # every thread of the run computes alone: two that meet at the end of a step wait for each other far less than two
    # that meet after every operation, above all on a machine with other work
    threads = torch.get_num_threads()
    on_cpu = torch.device(config.device).type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(config.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return _Run(config, pool).go(progress, should_stop)
    finally:
        if on_cpu:
            torch.set_num_threads(threads)


@dataclass
class _Counters:
    step: int = 0
    images: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan


class _Run:
    def __init__(self, config: TrainConfig, pool: ThreadPoolExecutor) -> None:
        self.config = config
        self.pool = pool
        self.out = Path(config.out)
        self.data = SliceData(config)
        device = torch.device(config.device)
        self.model = self._denoiser(device)
        self.checkpoint = self.out / "checkpoint.safetensors"
        if config.init is not None and not self.checkpoint.exists():
            _start_from(self.model.net, config.init, config.data.slices)
        self.device = device
        self.named = dict(self.model.net.named_parameters())
        self.ema = {k: p.detach().clone() for k, p in self.named.items()}
        self.adam = torch.optim.AdamW(
            self.named.values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.replicas = [self.model, *(self._replica() for _ in range(config.workers - 1))]
        self.count = _Counters()
        self.curve: list[dict[str, float]] = []
        self.latest: dict[float, float] = {}
        if self.checkpoint.exists():
            self._restore()

    def go(self, progress: Callable[[Progress], None] | None, should_stop: Callable[[], bool] | None) -> TrainResult:
        cfg, count = self.config, self.count
        before, started = count.elapsed_s, time.monotonic()
        saved_at = validated_at = started
        while self._fraction() < 1:
            rate = self._step()
            now = time.monotonic()
            count.elapsed_s = before + now - started
            done = self._fraction() >= 1
            stop = not done and should_stop is not None and should_stop()
            validated = _due(count.step, now - validated_at, cfg.validate_every_steps, cfg.validate_every_s) or done
            if validated:
                self._validate()
                self.export()
                validated_at = time.monotonic()
            saved = _due(count.step, now - saved_at, cfg.save_every_steps, cfg.save_every_s) or done or stop
            if saved:
                self._save()
                saved_at = time.monotonic()
            if stop:
                self.export()
            if progress is not None:
                report = self.latest if validated else None
                progress(
                    Progress(
                        count.step,
                        min(1.0, self._fraction()),
                        count.elapsed_s,
                        count.images,
                        count.loss,
                        rate,
                        report,
                        saved,
                    )
                )
            if stop:
                return TrainResult(self.out, self.out / "prior", count.step, False, self.latest)
        return TrainResult(self.out, self.out / "prior", count.step, True, self.latest)

    def _fraction(self) -> float:
        if self.config.steps is not None:
            return self.count.step / self.config.steps
        return self.count.elapsed_s / 60 / float(self.config.budget_minutes or 1)

    def _step(self) -> float:
        cfg, count = self.config, self.count
        rate = (
            cfg.learning_rate
            * min(1.0, (count.step + 1) / max(1, cfg.warmup_steps))
            * _decay(self._fraction(), cfg.decay_share)
        )
        batch = tuple(t.to(self.device) for t in self.data.batch(count.step))
        images = len(batch[0])
        # shares are cut by the configuration alone and added in order: the sum does not depend on timing
        cuts = [t.tensor_split(min(cfg.workers, images)) for t in batch]
        jobs = [
            self.pool.submit(self._gradient, model, images, *share)
            for model, *share in zip(self.replicas, *cuts, strict=False)
        ]
        losses = [job.result() for job in jobs]
        for replica in self.replicas[1 : len(losses)]:
            for p, q in zip(self.named.values(), replica.net.parameters(), strict=True):
                if p.grad is not None and q.grad is not None:
                    p.grad.add_(q.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), cfg.clip_norm)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"train: the gradient is not finite at step {count.step}; lower learning_rate")
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        count.step += 1
        count.images += images
        half_life = min(cfg.ema_halflife_images, cfg.ema_ramp * count.images)
        keep = 0.5 ** (images / max(half_life, 1e-8))
        for k, p in self.named.items():
            self.ema[k].lerp_(p.detach(), 1 - keep)
        value = sum(losses)
        count.loss = value if math.isnan(count.loss) else count.loss + 0.01 * (value - count.loss)
        return rate

    def _gradient(self, model: EDMDenoiser, images: int, clean: Tensor, *rest: Tensor) -> float:
        """Gradient of a share's part of the batch mean, left in the model; returns that part of the loss."""
        model.zero_grad(set_to_none=True)
        with self._autocast():
            loss = model.loss(clean.contiguous(memory_format=torch.channels_last), *rest)
        loss = loss * (len(clean) / images)
        torch.autograd.backward(loss)
        return float(loss.detach())

    def _replica(self) -> EDMDenoiser:
        """A model over the same weights with gradients of its own."""
        replica = self._denoiser(self.device)
        for p, q in zip(self.model.net.parameters(), replica.net.parameters(), strict=True):
            q.data = p.data
        return replica

    def _denoiser(self, device: torch.device) -> EDMDenoiser:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)  # the initial weights; nothing else draws from torch's generator
            net = UNet(self.config.network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return EDMDenoiser(net, self.config.sigma_data).to(device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16)

    @torch.no_grad()
    def _validate(self) -> None:
        cfg = self.config
        model = self._denoiser(self.device)
        model.net.load_state_dict(self.ema)
        model.eval()
        clean, noise, *beside = (t.to(self.device) for t in self.data.validation_set())
        row: dict[str, float] = {
            "step": self.count.step,
            "images": self.count.images,
            "elapsed_s": round(self.count.elapsed_s, 1),
        }
        row["train_loss"] = self.count.loss
        for level in cfg.validation_sigmas:
            error = 0.0
            for x, z, *c in zip(clean[:, None], noise[:, None], *(b[:, None] for b in beside), strict=True):
                with self._autocast():
                    d = model(x + level * z, torch.full((1,), level, device=self.device), *c)
                error += float((d - x).double().square().mean()) / clean.shape[0]
            self.latest[level] = 10 * math.log10(1 / error)
            row[f"loss_sigma_{level:g}"] = error * (level**2 + cfg.sigma_data**2) / (level * cfg.sigma_data) ** 2
            row[f"psnr_db_sigma_{level:g}"] = self.latest[level]
        self.curve.append(row)
        write_curve(self.out, self.curve)

    def export(self) -> None:
        """Write the EMA as it stands, with its card, into `out/prior`."""
        write_folder(self.out / "prior", self._card(), self.ema)

    def _card(self) -> ModelCard:
        cfg, card = self.config, self.config.card
        planes = {source.plane or cfg.data.plane for source in cfg.data.sources}
        low, high = ((v - cfg.data.file_offset) / cfg.data.file_scale for v in cfg.data.clip)
        known = cfg.data.percentile is None and cfg.data.mean_above is None
        unit = (
            f"percentile {cfg.data.percentile:g} of a volume"
            if cfg.data.percentile is not None
            else f"mean of the voxels above {cfg.data.mean_above or 0:g} of the maximum of a volume"
        )
        return ModelCard(
            name=card.name,
            statement=card.statement,
            plane=planes.pop() if len(planes) == 1 else "any",
            spacing_mm=cfg.data.spacing_mm,
            offset=card.offset,
            scale=card.scale,
            unit=card.unit,
            channels=cfg.network.out_channels,
            cond_channels=cfg.cond_channels,
            condition=None if cfg.data.condition is None else condition_card(cfg.data.condition),
            slices=cfg.data.slices,
            value_range=(card.offset + card.scale * low, card.offset + card.scale * high) if known else None,
            path="edm",
            sigma_range=cfg.sigma_range,
            sigma_data=cfg.sigma_data,
            architecture={"family": "unet", **cfg.network.model_dump(mode="json")},
            parameters=sum(p.numel() for p in self.named.values()),
            training_data=tuple(v.name for v in self.data.volumes),
            attribution=card.attribution,
            licence=card.licence,
            training={
                "steps": self.count.step,
                "images": self.count.images,
                "minutes": round(self.count.elapsed_s / 60, 1),
                "log_sigma": [cfg.log_sigma_mean, cfg.log_sigma_std],
                **({} if known else {"one network unit": unit}),
                **({} if cfg.init is None else {"init": Path(cfg.init).name}),
            },
            validation={
                "volume": self.data.validation.name,
                "slices": cfg.validation_slices,
                "peak": "1 network unit",
                **{f"psnr_db_sigma_{s:g}": round(v, 2) for s, v in self.latest.items()},
            },
        )

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {f"model.{k}": p.detach() for k, p in self.named.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        state = self.adam.state
        for k, p in self.named.items():
            tensors[f"adam.exp_avg.{k}"] = state[p]["exp_avg"]
            tensors[f"adam.exp_avg_sq.{k}"] = state[p]["exp_avg_sq"]
        meta = {
            "config": self.config.model_dump_json(),
            "counters": json.dumps(asdict(self.count)),
            "curve": json.dumps(self.curve),
        }
        write_safetensors(self.checkpoint, tensors, meta)

    def _restore(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.checkpoint, framework="pt") as f:
                meta: dict[str, str] = f.metadata()
                tensors: dict[str, Tensor] = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            found = TrainConfig.model_validate_json(meta["config"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            why = f"not a training checkpoint ({str(error).splitlines()[0]})"
            raise BadInput(self.checkpoint, why, "delete it to train from the start") from None
        changed = _differences(found, self.config)
        if changed:
            raise ValueError(
                f"train: {self.out} holds a run with other settings ({', '.join(changed)}); "
                "give them back or choose another out"
            )
        self.count = _Counters(**json.loads(meta["counters"]))
        self.curve = json.loads(meta["curve"])
        with torch.no_grad():
            for k, p in self.named.items():
                p.copy_(tensors[f"model.{k}"])
                self.ema[k].copy_(tensors[f"ema.{k}"])
                # the fused update walks memory, so the moments must lie as the weights do (channels last)
                moments = {name: torch.empty_like(p) for name in ("exp_avg", "exp_avg_sq")}
                for name, value in moments.items():
                    value.copy_(tensors[f"adam.{name}.{k}"])
                self.adam.state[p] = {"step": torch.tensor(float(self.count.step)), **moments}


def _start_from(net: torch.nn.Module, folder: str, slices: int, joined: int = 0) -> None:
    """Copy the tensors of a prior folder that the network has with the same name and shape.

    Where the network sees several slices and that prior one, the first convolution starts as one of their mean, with
    differences between slices as they were drawn, and the last one gives every slice the same. A kernel that only lacks
    the `joined` input channels of a condition gets zeros for those: the network then starts as the prior that it came
    from, blind to the condition.
    """
    card, state = read_folder(folder)
    for k, p in net.named_parameters():
        if k in state and state[k].ndim == p.ndim:
            if slices > 1 and card.slices == 1:
                state[k] = _for_slices(state[k], p.detach(), slices, joined)
            if joined and p.ndim == 4 and state[k].shape[1] + joined == p.shape[1]:
                state[k] = torch.nn.functional.pad(state[k], (0, 0, 0, 0, 0, joined))
    with torch.no_grad():
        same = [(p, state[k]) for k, p in net.named_parameters() if k in state and state[k].shape == p.shape]
        for p, value in same:
            p.copy_(value)
    if not same:
        raise ValueError(f"train: init {folder} has no tensor with a name and shape of this network; leave init out")


def _for_slices(value: Tensor, drawn: Tensor, slices: int, joined: int) -> Tensor:
    """A tensor whose channels in or out are those of one slice, for slices side by side (and `joined` channels in)."""
    for beside in {0, joined}:
        if value.ndim > 1 and value.shape[1] * slices == drawn.shape[1] - beside:
            # were all slices alike to the network, they would stay so: their gradients would be the same
            own = drawn[:, : drawn.shape[1] - beside].unflatten(1, (-1, slices))
            value = (value.unsqueeze(2) / slices + own - own.mean(2, keepdim=True)).flatten(1, 2)
    return value.repeat_interleave(slices, dim=0) if value.shape[0] * slices == drawn.shape[0] else value


# a restart may change these: they say how long, how often and where, not what is learned
_FREE = {
    "out",
    "steps",
    "budget_minutes",
    "threads",
    "save_every_s",
    "save_every_steps",
    "validate_every_s",
    "device",
    "card",
}


def _differences(a: TrainConfig, b: TrainConfig) -> list[str]:
    x, y = a.model_dump(mode="json"), b.model_dump(mode="json")
    return sorted(k for k in x if k not in _FREE and x[k] != y[k])


def _decay(fraction: float, share: float) -> float:
    """1, then half a cosine down to 0 over the last share: useful steps however unevenly the machine gives them."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, 1 - (1 - fraction) / share))))


def _due(step: int, since_s: float, every_steps: int | None, every_s: float) -> bool:
    return step % every_steps == 0 if every_steps else since_s >= every_s
