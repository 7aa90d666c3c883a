"""Tasks of lm-eval, loaded once and measured on one model again and again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from torch import nn

from secateur.evaluators.tasks.task_files import TRUST, check_task_files
from secateur.spaces.measurement import MARGIN, TASK

MISSING = "Expected lm-eval for tasks, got an installation without it. Install it with: pip install 'secateur[tasks]'"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class TaskPlan:
    """Tasks and samples, as plain values.

    Args:
        names: of the tasks, as their files say.
        directory: of the task files (YAML as lm-eval reads them), with their data beside them.
        samples: of each task, the same ones for every model; None for all.
        batch: sequences computed together.
        seed: of the samples; those of a smaller number are among those of a larger one.
        trusted: let the task files run code; else such files are a ValueError.
    """

    names: tuple[str, ...]
    directory: Path
    samples: int | None = None
    batch: int = 8
    seed: int = 0
    trusted: bool = False

    def __post_init__(self) -> None:
        check_task_files(self.directory, trusted=self.trusted)


@dataclass(frozen=True)
class TaskResult:
    """A model in one task.

    Args:
        metrics: all of the task's by name, the objective first.
        samples: their number.
        margins: of each sample of a multiple-choice task, in nats: log-likelihood of the right answer minus that of the
            best wrong one, both without normalisation. The accuracy ``acc`` is the share above 0; the margins
            also tell by how much, so that they move where accuracy stands still (a margin is the objective of GISP
            for such tasks, https://github.com/uncc-efficient-ai/GISP).
    """

    metrics: dict[str, float]
    samples: int
    margins: tuple[float, ...] = ()

    @property
    def score(self) -> float:
        """The task's first metric; higher is better."""
        return next(iter(self.metrics.values()))

    @property
    def margin(self) -> float:
        """Mean of the margins, in nats; higher is better."""
        return sum(self.margins) / len(self.margins)

    @property
    def margin_loss(self) -> float:
        """Mean of ``log(1 + exp(-margin))`` in nats, >= 0: smooth, and little is won beyond a clear decision."""
        return float(np.logaddexp(0, -np.array(self.margins)).mean())


def task_values(results: Mapping[str, TaskResult]) -> dict[str, float]:
    """Values of a measurement: ``task:<name>`` of each task, and ``margin:<name>`` where it has margins."""
    scores = {f"{TASK}{name}": result.score for name, result in results.items()}
    return scores | {f"{MARGIN}{name}": result.margin for name, result in results.items() if result.margins}


class TaskSet:
    """Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) over one live model.

    Only the given directory has tasks, not lm-eval's own, and nothing is downloaded. Paths in task files are relative
    to that directory.

    Args:
        plan: of the tasks.
        model: a causal LM of transformers; measured with its present weights.
        tokenizer: its tokenizer.
        bos: begin contexts with the tokenizer's BOS token; ``auto``: as the tokenizer does by itself.

    Attributes:
        samples: numbers of the measured samples, by task.

    Raises:
        ValueError: if lm-eval is not installed, there is no such task, or its first metric is not one that is
            better when higher.
    """

    def __init__(
        self, plan: TaskPlan, model: nn.Module, tokenizer: Any, bos: bool | Literal["auto"] = "auto"
    ) -> None:
        self._plan = plan
        self._loaded = _load(plan)
        self.samples = {name: sorted(self._order(name)[: plan.samples]) for name in self._loaded["tasks"]}
        from lm_eval.models.huggingface import HFLM

        with _contained(plan):
            self._lm = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=plan.batch,
                add_bos_token=None if bos == "auto" else bos,
            )
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(self._lm, kind, partial(getattr(self._lm, kind), disable_tqdm=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self._loaded["tasks"])

    def first(self, share: float) -> dict[str, list[int]]:
        """Numbers of a share of the measured samples, at least one a task; those of a smaller share are among them."""
        counts = {name: math.ceil(share * len(samples)) for name, samples in self.samples.items()}
        return {name: sorted(self._order(name)[: max(1, n)]) for name, n in counts.items()}

    def held_out(self) -> dict[str, list[int]]:
        """Numbers of as many samples, or of what is left, that are not among the measured ones.

        Raises:
            ValueError: if a task has no more.
        """
        counts = {name: len(samples) for name, samples in self.samples.items()}
        found = {name: sorted(self._order(name)[n : 2 * n]) for name, n in counts.items()}
        for name, samples in found.items():
            if not samples:
                raise ValueError(
                    f"Expected samples of the task {name} for the search and others for the test, got {counts[name]} "
                    f"for the search, which are all. Lower `evaluator.tasks.samples`."
                )
        return found

    def check_margins(self, name: str) -> None:
        """Raise a ValueError unless the task has margins."""
        kind = self._loaded["tasks"][name].OUTPUT_TYPE
        if kind != "multiple_choice":
            raise ValueError(
                f"Expected a task of `output_type` multiple_choice for {MARGIN}{name}, got {kind}. Use {TASK}{name}."
            )

    def _order(self, name: str) -> list[int]:
        """Numbers of all samples in the order in which they are taken."""
        n_docs = len(self._loaded["tasks"][name].eval_docs)
        order: list[int] = np.random.default_rng(self._plan.seed).permutation(n_docs).tolist()
        return order

    def measure(self, samples: Mapping[str, list[int]] | None = None) -> dict[str, TaskResult]:
        """Results of the live model, by task.

        Args:
            samples: their numbers by task, ascending; None for `samples`.
        """
        from lm_eval.evaluator import evaluate

        samples = self.samples if samples is None else samples
        with _contained(self._plan):
            found: Any = evaluate(
                lm=self._lm,
                task_dict=self._loaded,
                samples=dict(samples),
                bootstrap_iters=0,
                log_samples=True,
            )
        return {
            name: TaskResult(
                _metrics(task, found["results"][name]),
                len(samples[name]),
                _margins(task, found["samples"][name]),
            )
            for name, task in self._loaded["tasks"].items()
        }


def tasks_sha256(plan: TaskPlan) -> str:
    """Hash of the task files and the choice of samples, on which scores depend.

    Raises:
        ValueError: if there is no such directory.
    """
    total = hashlib.sha256(repr((plan.names, plan.samples, plan.seed)).encode())
    for path in sorted(path for path in _directory(plan).rglob("*") if path.is_file()):
        total.update(path.relative_to(plan.directory).as_posix().encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _directory(plan: TaskPlan) -> Path:
    if not plan.directory.is_dir():
        raise ValueError(f"Expected a directory of task files, got {plan.directory}, which is none.")
    return plan.directory


def _load(plan: TaskPlan) -> Any:
    """The tasks with their data; each must have a score that is better when higher."""
    for name in OFFLINE:  # read when the libraries are imported
        os.environ.setdefault(name, "1")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(MISSING) from error
    directory = _directory(plan).resolve()
    with _contained(plan), contextlib.chdir(directory):  # from where a task file names its data
        manager = TaskManager(include_path=str(directory), include_defaults=False)
        known = manager.all_subtasks
        for name in plan.names:
            if name not in known:
                raise ValueError(
                    f"Expected a task of {plan.directory}, got {name!r}. There: {', '.join(known) or 'none'}."
                )
        try:
            loaded = manager.load(list(plan.names))
        except Exception as error:  # whatever a task file, its functions or its data raise
            raise ValueError(
                f"Expected tasks that lm-eval can load in {plan.directory}, got {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else error!r}"
            ) from error
    for name, task in loaded["tasks"].items():
        first = next(iter(task.higher_is_better()), None)
        if first is None or not task.higher_is_better()[first]:
            raise ValueError(
                f"Expected the first metric of the task {name} to be better when higher, got {first}. "
                f"Put such as `acc` first in its `metric_list`."
            )
    return loaded


def _metrics(task: Any, results: dict[str, Any]) -> dict[str, float]:
    """Lm-eval names them ``acc,none``: the metric, and the filter of the answers."""
    found = {}
    for metric in task.higher_is_better():
        key = next((key for key in results if key.partition(",")[0] == metric), None)
        if key is not None:
            found[metric] = float(results[key])
    return found


def _margins(task: Any, logged: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """Margins from lm-eval's record of the samples; none without choices, or of a sample without a right one."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return ()
    found = []
    for sample in {sample["doc_id"]: sample for sample in logged}.values():  # one a filter is enough
        doc, choices = sample["doc"], task.doc_to_choice(sample["doc"])
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        right = {
            choices.index(x) if x in choices else x for x in (gold if isinstance(gold, list) else [gold])
        }
        likelihoods = [float(value) for value, _ in sample["filtered_resps"]][: len(choices)]
        of_right = [value for i, value in enumerate(likelihoods) if i in right]
        of_wrong = [value for i, value in enumerate(likelihoods) if i not in right]
        if of_right and of_wrong:
            found.append(max(of_right) - max(of_wrong))
    return tuple(found)


@contextlib.contextmanager
def _contained(plan: TaskPlan) -> Iterator[None]:
    """Silence of lm-eval's log, up to errors, and of its progress bars; a sandbox for templates without trust."""
    import datasets
    from lm_eval import utils
    from lm_eval.api import task as building  # the one of its bars that no argument turns off

    logger, bar, templates = logging.getLogger("lm_eval"), building.tqdm, utils.env
    level, shown = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    building.tqdm = partial(bar, disable=True)
    if not plan.trusted:
        utils.env = SandboxedEnvironment(undefined=templates.undefined, keep_trailing_newline=True)
        utils.env.filters = templates.filters
    datasets.disable_progress_bars()
    try:
        yield
    except SecurityError as error:
        raise ValueError(f"Expected templates without code, got one where {error}. {TRUST}") from error
    finally:
        utils.env = templates
        logger.setLevel(level)
        building.tqdm = bar
        if shown:
            datasets.enable_progress_bars()
