"""Ray: an evaluation on a cluster. Ray Data runs the searches, and the driver writes the records that come back.

Problems are rows. ``map_batches`` over a class, which Ray's documentation recommends for inference with models, keeps
an actor for each device, and each actor has an engine with models of its own. One call of an actor searches a few
problems. If a worker is lost, Ray starts another one and repeats its call, as often as necessary. Draws depend only on
the seed, the problem's text and the path in its tree. If the decoder computes each row by itself (the lean one on a
CPU) and all workers have the same instruction-set level, results are those of one machine to the bit. Otherwise they
are the same up to rounding, which changes a draw once in a while.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

from tts_search.engine.scheduler import MAX_ROWS
from tts_search.errors import SearchError, require
from tts_search.evaluation.evaluate import Runner, run_here
from tts_search.evaluation.experiment import Experiment
from tts_search.evaluation.records import Record, read_record, record_as_json
from tts_search.evaluation.tasks import Task, Tasks
from tts_search.search.protocol import Policy, Verifier
from tts_search.terminal import progress_bar

if TYPE_CHECKING:
    import numpy as np

__all__ = ["on_ray"]

ModelPair = tuple[Policy, "Verifier | None"]

# A call gives an engine this many times the problems that it searches at once, so that it is mostly full ...
_REFILLS: Final = 4
# ... but an actor gets at least this many calls, so that no actor is idle for long while the last calls run.
_CALLS: Final = 4


def on_ray(
    load: Callable[[], ModelPair],
    *,
    address: str | None = None,
    actors: int | None = None,
    device: str | None = None,
    max_in_flight: int | None = None,
    progress: bool = True,
) -> Runner:
    """Return a function that runs an experiment on a Ray cluster, for ``evaluate(..., run=on_ray(load))``.

    Parameters
    ----------
    load : callable
        Loads the policy and the verifier (or None); called once in each actor, for each experiment.
    address : str or None
        Address of the cluster, as for ``ray.init``; ``"local"`` starts one on this machine. By default ``RAY_ADDRESS``,
        then a cluster that runs here, then ``"local"``.
    actors : int or None
        How many actors; by default one for each GPU of the cluster, or one for each core if there is no GPU.
    device : str or None
        ``"cpu"`` gives each actor a core even if the cluster has GPUs.
    max_in_flight : int or None
        Problems that an actor searches at the same time, as in :func:`~tts_search.search_iter`.
    progress : bool
        Show a progress bar.

    Raises
    ------
    MissingExtraError
        If Ray is not installed.
    ValueError
        If ``actors`` is less than 1.

    Examples
    --------
    >>> from tts_search.evaluation.ray import on_ray
    >>> records = evaluate(tasks, [experiment], "results.jsonl", run=on_ray(load))  # doctest: +SKIP
    """
    if actors is not None and actors < 1:
        raise ValueError(f"actors: expected an int >= 1, got {actors!r}")
    ray = require("ray", "ray")
    data = require("ray.data", "ray")

    def run(experiment: Experiment, tasks: Tasks) -> Iterator[Record]:
        if not tasks:
            return
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        data.DataContext.get_current().enable_progress_bars = False
        available = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(available.get("GPU", 0))
        count = actors or gpus or int(available.get("CPU", 1))
        in_flight = max_in_flight or max(1, MAX_ROWS // experiment.config.n)
        calls = math.ceil(len(tasks) / problems_per_call(len(tasks), count, in_flight))
        rows = [{"task": json.dumps(asdict(task))} for task in tasks]
        found = data.from_items(rows, override_num_blocks=calls).map_batches(
            _Searcher,
            fn_constructor_args=(load, replace(experiment, policy=None, verifier=None), in_flight),
            batch_size=None,  # one block for each call
            compute=data.ActorPoolStrategy(size=min(count, calls), max_tasks_in_flight_per_actor=1),
            **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
        )
        try:
            total = len(tasks) * len(experiment.variants)
            with progress_bar(total, enabled=progress, label=f"{experiment.config.method_name} on {count}") as bar:
                for batch in found.iter_batches(batch_size=None, prefetch_batches=0):
                    for line in batch["record"]:
                        bar.advance()
                        yield read_record(str(line))
        except ray.exceptions.RayError as error:
            raise SearchError(f"ray: {error}") from error

    return run


def problems_per_call(problems: int, actors: int, in_flight: int) -> int:
    """Return how many problems a call of an actor searches.

    >>> problems_per_call(10_000, 64, 4), problems_per_call(500, 64, 4), problems_per_call(3, 64, 4)
    (16, 2, 1)
    """
    return max(1, min(_REFILLS * in_flight, math.ceil(problems / (_CALLS * actors))))


class _Searcher:
    """What an actor holds: the models, and an engine for each call."""

    def __init__(self, load: Callable[[], ModelPair], experiment: Experiment, max_in_flight: int) -> None:
        policy, verifier = load()
        self._experiment = replace(experiment, policy=policy, verifier=verifier)
        self._max_in_flight = max_in_flight

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[str]]:
        tasks = [Task(**json.loads(str(line))) for line in batch["task"]]
        records: Iterable[Record] = run_here(self._experiment, tasks, progress=False, max_in_flight=self._max_in_flight)
        return {"record": [record_as_json(record) for record in records]}
