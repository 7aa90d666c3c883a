"""Loss of `tiny` before and after recovery: full, LoRA and norms at equal tokens, on the same data.

python experiments/recovery-tiny/measure.py > experiments/recovery-tiny/results.jsonl
"""

from __future__ import annotations

import json
import time

from secateur.evaluators.data.windows import losses_on, teacher_batches
from secateur.evaluators.recovery import RecoveryJob, first_windows, make_trainer, open_pruned
from secateur.evaluators.training.settings import Training
from secateur.search import app
from secateur.search.settings.settings import settings_from

TOKENS = 32768


def main() -> None:
    """One line a run."""
    settings = settings_from(
        {"space": {"target": [0.6, 0.7]}, "evaluator": {"fidelities": [2048], "test_tokens": 8192}}
    )
    plan = app.plan(settings)
    uniform = app.open_session(settings).space.baselines()
    for name in ("uniform@0.6", "uniform@0.7"):
        for method in ("full", "lora", "norms"):
            training = Training(method=method, tokens=TOKENS)
            job = RecoveryJob(plan, uniform[name].text, True, training)
            session, dense = open_pruned(job, lambda line: None)
            test = teacher_batches(dense, first_windows(session, plan.fidelities[-1]))
            before = losses_on(session.anatomy, test)
            trainer = make_trainer(session, dense, job)
            started = time.perf_counter()
            trainer.train(trainer.n_steps)
            seconds = time.perf_counter() - started
            trainer.finish()
            after = losses_on(session.anatomy, test)
            row = {"candidate": name, "recipe": training.to_json(), "learning": trainer.n_learning}
            row |= {"before": before, "after": after, "failure": trainer.failure}
            print(json.dumps(row | {"seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
