"""Settings of the evaluator, with its sections for latencies and tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from secateur.search.losses import LOSSES
from secateur.search.settings.training import TrainingSettings
from secateur.spaces.measurement import MARGIN, Fidelity
from secateur.spaces.names import nearest
from secateur.spaces.section import Section

Count = Annotated[int, Field(gt=0)]
Measure = Literal["weighted_kl", "acceptance"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""Measures besides ``kl`` and ``ce`` that the evaluator computes if they are asked for, in the order of values."""


class DataSettings(Section):
    """Sources of text: ``docs``, a file, a directory, or a hub dataset. The sets are disjoint.

    Args:
        calibration: for statistics of the model.
        search: for the losses that controllers see.
        test: for the final measurements alone.
        contrast: second calibration text, for metrics and formulas over two: of a domain and what is general.
        format: ``text`` reads files as plain text whatever their suffix is, as ``text:PATH`` does for one of them.
    """

    calibration: str = "docs"
    search: str = "docs"
    test: str = "docs"
    contrast: str | None = Field(default=None, min_length=1)
    format: Literal["auto", "text"] = Field(default="auto", exclude=True)

    @model_validator(mode="after")
    def _as_text(self) -> DataSettings:
        if self.format == "auto":
            return self
        for part in ("calibration", "search", "test", "contrast"):
            source = getattr(self, part)
            if source not in (None, "docs") and not source.startswith(("hub:", "text:")):
                object.__setattr__(self, part, f"text:{source}")
        object.__setattr__(self, "format", "auto")  # what it says is in the sources now
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain values; without `contrast` where there is none, as in studies from before there was such a key."""
        plain: dict[str, Any] = handler(self)
        if self.contrast is None:
            plain.pop("contrast", None)
        return plain


class LatencySettings(Section):
    """Conditions of a table that ``secateur latency`` has measured, for latency objectives and targets.

    Args:
        batch: sequences at a time; or a list, of which the first is that of ``latency_decode``, and the others of
            ``latency_decode@8`` and the like.
        prompt: tokens of each: computed at once in prefill, in the cache in decode.
        threads: on a CPU; None for all that the process may use.
        clock: ``wall`` or ``cpu``.
        eager: on a CUDA device, decode steps made by Python, in place of CUDA graphs.
        table: file with a table, as ``secateur latency --json`` prints it on the target device; used in place of the
            user's cache.
    """

    batch: Count | Annotated[tuple[Count, ...], Field(min_length=1)] = 1
    prompt: int = Field(default=512, gt=0)
    threads: int | None = Field(default=None, gt=0)
    clock: Literal["wall", "cpu"] = "wall"
    eager: bool = False
    table: str | None = None

    @field_validator("batch")
    @classmethod
    def _check_batch(cls, batch: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(batch, tuple) and len(set(batch)) < len(batch):
            raise ValueError(f"Expected each of `batch` once, got {list(batch)}.")
        return batch

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes, that of ``latency_decode`` first."""
        return self.batch if isinstance(self.batch, tuple) else (self.batch,)

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain values; without `eager` where it is not set, as in studies from before there was such a key."""
        plain: dict[str, Any] = handler(self)
        if not self.eager:
            plain.pop("eager", None)
        return plain


class TaskSettings(Section):
    """Files and samples of objectives ``task:<name>``, measured at the largest fidelity of the search.

    Args:
        directory: of task files, YAML as lm-eval reads them, with their data beside them.
        samples: of each task, the same for every candidate; None for all.
        batch: sequences that go through the model together.
    """

    directory: str
    samples: int | None = Field(default=100, gt=0)
    batch: int = Field(default=8, gt=0)


class EvaluatorSettings(Section):
    """Loss, data and fidelities of a measurement.

    Args:
        loss: what is minimised: ``kl`` to the dense model, ``ce`` or ``weighted_kl``, all in nats per token,
            ``acceptance`` (one minus it), or ``margin:<task>``; see `LOSSES`.
        measures: recorded with each measurement besides ``kl`` and ``ce``; the loss and the objectives are, anyway.
        data: sources of text.
        window: tokens of a sequence.
        bos: begin each sequence with the tokenizer's BOS token, whose position is not scored; ``auto``: where the
            tokenizer does so by itself.
        moe_all_experts: statistics of the projections of routed experts are of all calibration tokens, where otherwise
            an expert's are of those that are routed to it.
        allow_long_windows: permit windows longer than the model's positions, where these are not learned.
        calibration_tokens: size of the calibration set, a multiple of the window.
        test_tokens: size of the test measurements, a multiple of the window.
        fidelities: tokens of search measurements, ascending multiples of the window; nested.
        training: light training of candidates before they are measured; None for none.
        latency: table for latency objectives and targets; None for the one measured under default conditions.
        tasks: for objectives ``task:<name>`` and ``margin:<name>``, and for the latter as the loss.
        seed: of the choice of windows, the metric ``random``, samples of tasks and the order of training; None: that of
            the search.
    """

    loss: str = "kl"
    measures: tuple[Measure, ...] = ()
    data: DataSettings = DataSettings()
    window: int = Field(default=512, gt=1)
    bos: bool | Literal["auto"] = "auto"
    moe_all_experts: bool = False
    allow_long_windows: bool = False
    calibration_tokens: int = Field(default=16384, gt=0)
    test_tokens: int = Field(default=8192, gt=0)
    fidelities: tuple[int, ...] = Field(default=(2048, 8192, 32768), min_length=1)
    training: TrainingSettings | None = None
    latency: LatencySettings | None = None
    tasks: TaskSettings | None = None
    seed: int | None = Field(default=None, ge=0)

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, name: str) -> str:
        if name in LOSSES or (name.startswith(MARGIN) and name != MARGIN):
            return name
        known = [*LOSSES, MARGIN + "<task>"]
        raise ValueError(f"Expected `loss` to be {', '.join(known)}, got {name!r}.{nearest(name, known)}")

    @model_validator(mode="after")
    def _check(self) -> EvaluatorSettings:
        if any(a >= b for a, b in zip(self.fidelities, self.fidelities[1:], strict=False)):
            raise ValueError(f"Expected `fidelities` to ascend, got {list(self.fidelities)}.")
        for name in ("calibration_tokens", "test_tokens", "fidelities"):
            value = getattr(self, name)
            for n_tokens in value if isinstance(value, tuple) else (value,):
                if n_tokens <= 0 or n_tokens % self.window:
                    near = max(1, round(n_tokens / self.window)) * self.window
                    raise ValueError(
                        f"Expected `{name}` in whole windows of {self.window} tokens, got {n_tokens}. "
                        f"Use {near}, or change `evaluator.window`."
                    )
        if self.training is not None:
            self.training.check_fits(self.window, len(self.fidelities))
        return self

    @property
    def search_fidelities(self) -> tuple[Fidelity, ...]:
        """Fidelities of search measurements, ascending; comparisons use the last one."""
        trained = self.training.tokens if self.training is not None else (0,) * len(self.fidelities)
        return tuple(Fidelity("search", *pair) for pair in zip(self.fidelities, trained, strict=True))

    @property
    def compared(self) -> Fidelity:
        """Largest fidelity of the search, at which front, report and pick compare."""
        return self.search_fidelities[-1]

    @property
    def test_fidelity(self) -> Fidelity:
        """Fidelity of test measurements, trained as much as the largest one of the search."""
        return Fidelity("test", self.test_tokens, self.compared.n_trained)
