"""A worker's share in preparing a study: fix text and targets, measure moments, write factors.

One builder does it all; several split the text of a pass between them and the targets of a group after it.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Iterator, Mapping

import torch

from actors.calibration import collect
from actors.factors import (
    StoreBuilder,
    needing_gradients,
    needing_spreads,
    refuse_idle_patterns,
    store_fingerprint,
    store_problem,
)
from actors.families import family_of
from actors.linears import weight_of
from actors.models import (
    context_limit,
    count_parameters,
    fingerprint,
    fingerprint_tokenizer,
    list_targets,
    load_model,
    load_tokenizer,
    materialise,
    own_code,
)
from actors.moments import Moments, merge
from actors.node_cache import is_published, is_url, local_store, node_folder, publish, store_folder
from actors.operations import operations
from actors.packing import check_packing
from actors.planning import plan
from actors.resident import local_source
from actors.shared_folder import Mark, leave_mark, sees, take_mark
from actors.splits import SplitData, load_choice, load_split
from actors.text import calibration_windows, fingerprint_windows
from actors.types import (
    CHOICE,
    SPLITS,
    BuildPlan,
    Foreseen,
    PreparationSpec,
    Prepared,
    Progress,
    RankfrontError,
)


class Builder:
    """Holds the model and the calibration text of one preparation.

    Raises:
        RankfrontError: the model, the text or a task cannot be used; says what and why.
    """

    def __init__(self, spec: PreparationSpec, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._spec = spec
        self._seconds: dict[str, float] = {}
        self._clock = time.perf_counter()
        model, cache = local_source(spec), store_folder(spec)
        self.folder = materialise(model, cache)
        self._tokenizer = load_tokenizer(self.folder, spec.model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_model(self.folder, spec.model, self.device)
        self.targets = list_targets(self._model, spec.include, spec.exclude)
        refuse_idle_patterns((pattern for pattern, _ in spec.factors.methods), self.targets)
        self._by_name = {target.name: target for target in self.targets}
        self._lap("load")
        calibration = spec.calibration
        self._windows = calibration_windows(spec, self._tokenizer)
        self.fingerprints = {
            "model": fingerprint(model),
            "tokenizer": fingerprint_tokenizer(self._tokenizer),
            "calibration": fingerprint_windows(self._windows),
        }
        self.fingerprints["factors"] = store_fingerprint(
            self.fingerprints, spec.factors, calibration.labels, self.targets
        )
        name = self.fingerprints["factors"][:16]
        self._store = StoreBuilder(cache / name, spec.factors, self.targets)
        # Where other nodes find it.
        self._place = str(self._store.folder) if spec.shared is None else f"{spec.shared.rstrip('/')}/{name}"
        self._moments: dict[str, Moments] = {}
        self._held = contextlib.ExitStack()
        self._splits: dict[str, SplitData] = {}

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._clock
        self._clock = now

    def inspect(self) -> Iterator[str | Mapping[str, str] | Foreseen | Prepared | BuildPlan]:
        """Yield lines, then the fingerprints, and at last what was prepared before, or what is to be done.

        The fingerprints come before the long work, and so does what will be prepared: who expects others, or
        has no use for it, can stop there. From the plan on this process alone may finish the store.

        Raises:
            RankfrontError: text or tasks cannot be used, or the model cannot score tasks packed.
        """
        yield f"model: {self._spec.model.source}"
        family = family_of(self._model)
        if family.note is not None:
            yield f"model: {family.note}"
        if own_code(self._model):
            yield "model: its code comes with it: what is found can be written as a configuration alone"
        shared = family.shared(self._model)
        if shared:
            yield f"model: {len(shared)} linear layers share their weight and stay dense, such as {shared[0]}"
        limit = context_limit(self._model)
        window = self._spec.calibration.window
        if limit is not None and window > limit:
            raise RankfrontError(f"calibration.window: {window} tokens, the model reads {limit}")
        self._splits = {name: load_split(self._spec, name, self._tokenizer, limit) for name in SPLITS}
        choice = load_choice(self._spec, self._tokenizer)
        if choice is not None:
            self._splits[CHOICE] = choice
        self.fingerprints |= {name: data.fingerprint for name, data in self._splits.items()}
        self._lap("text")
        yield self.fingerprints
        splits = self._splits.values()
        check_packing(self._model, [each for data in splits for each in (*data.tasks, *data.bias)])
        tokens = self._windows.numel()
        yield f"text: {tokens:,} calibration tokens, {self._splits['search'].tokens:,} search tokens a trial"
        problem = self._problem()  # every look at a store that is whole reads all of it
        if is_url(self._place) and problem is not None and is_published(self._place):
            yield f"factor store: copying {self._place}"
            with self._store.locked():  # not held below, where a copy takes the same lock
                if self._problem() is not None:  # another process may have made it whole while this one asked
                    shutil.rmtree(self._store.folder, ignore_errors=True)  # damaged, if it is there
            local_store(self._place, node_folder(self._spec))
            problem = self._problem()
        if problem is not None:
            self._held.enter_context(self._store.locked())
            problem = self._problem()  # another process may have built it while this one waited
        self._lap("verify")
        if problem is None:
            self._held.close()
            yield f"factor store: reused, {self._store.folder}"
            yield self._prepared(reused=True)
            return
        yield Foreseen(self._described(reused=False))
        pending = self._store.pending()
        kept = len(self.targets) - len(pending)
        already = f", {kept} of {len(self.targets)} targets are done already" if kept else ""
        yield f"factor store: {problem}; decomposing {len(pending)} targets{already}"
        made = self._plan()
        passes = f"{len(made.groups)} pass{'es' * (len(made.groups) != 1)}"
        again = ", activations computed twice" if made.checkpointed and self._gradients else ""
        yield (
            f"calibration: {passes} over {tokens:,} tokens, {made.moments / 1e9:.2f} GB of moments and "
            f"{made.activations / 1e9:.2f} GB of activations at a time{again}"
        )
        yield made

    def _problem(self) -> str | None:
        return store_problem(self._store.folder, self.fingerprints["factors"])

    @property
    def _gradients(self) -> tuple[str, ...]:
        return needing_gradients(self._spec.factors, self.targets)

    @property
    def _spreads(self) -> tuple[str, ...]:
        return needing_spreads(self._spec.factors, self.targets)

    def _plan(self) -> BuildPlan:
        pending = self._store.pending()
        if not pending:
            return BuildPlan((), {}, windows=0, rows=1, checkpointed=False, moments=0, activations=0)
        memory = self._spec.calibration.memory_gb * 1e9
        names = {target.name for target in pending}
        gradients = [name for name in self._gradients if name in names]
        return plan(self._model, pending, self._windows, gradients, memory, self._spreads)

    def mark(self) -> Mark:
        """Leave a mark where factors are written, before the long work: `finish` takes it away, or `unmark`.

        Raises:
            RankfrontError: nothing can be written there.
        """
        return leave_mark(self._store.partial)

    def unmark(self, mark: Mark) -> None:
        take_mark(mark)

    def blind(self, mark: Mark) -> str | None:
        """The name of this node where it does not see another builder's mark in its own folder of that name:
        neither would that one see what is written here."""
        return None if sees(self._store.partial / mark.file.name) else platform.node()

    def collect(self, made: BuildPlan, group: int, shard: int, shards: int) -> Iterator[Progress]:
        """Measure the moments of a group over this builder's share of the text."""
        chosen = [self._by_name[name] for name in made.groups[group]]
        parts = torch.arange(len(self._windows)).tensor_split(shards)
        mine = self._windows[parts[shard]]
        first = int(parts[shard][0]) if len(mine) else 0
        labels = self._spec.calibration.labels
        steps = collect(self._model, chosen, mine, made, self._gradients, labels, first, self._spreads)
        step = "calibrating" if len(made.groups) == 1 else f"calibrating, pass {group + 1}/{len(made.groups)}"
        done = 0
        try:
            while True:
                done += next(steps)
                yield Progress(step, done, len(mine))
        except StopIteration as end:
            self._moments = end.value
        except RankfrontError:
            self._store.discard()
            raise
        self._lap("calibrate")

    def part(self, name: str) -> Moments:
        """This builder's moments of a target, on the CPU; they are another's from now on."""
        return self._moments.pop(name).to("cpu")

    def build(self, name: str, *others: Moments) -> None:
        """Decompose a target from the moments of all builders and write its files."""
        parts = [self._moments.pop(name), *(other.to(self.device) for other in others)]
        matrix = weight_of(self._model.get_submodule(name))
        try:
            self._store.write(self._by_name[name], matrix, merge(parts))
        except RankfrontError as error:
            if error.__cause__ is None:  # what the disk caused can be mended, what we found cannot
                self._store.discard()
            raise
        self._lap("decompose")

    def finish(self) -> Prepared:
        """Seal the store."""
        self._store.finish(self.fingerprints["factors"])
        self.close()
        self._lap("seal")
        return self._prepared(reused=False)

    def close(self) -> None:
        """Let other processes build the store: this one has, or has given up."""
        self._held.close()

    def _prepared(self, reused: bool) -> Prepared:
        """What is described, where every node finds it."""
        if is_url(self._place) and not (reused and is_published(self._place)):
            publish(self._store.folder, self._place)
            self._lap("publish")
        return self._described(reused)

    def _described(self, reused: bool) -> Prepared:
        splits = self._splits
        return Prepared(
            model_folder=str(self.folder),
            factor_store=self._place,
            targets=self.targets,
            model_parameters=count_parameters(self._model),
            fingerprints=self.fingerprints,
            tokens={
                "calibration": self._windows.numel(),
                **{name: data.text.length for name, data in splits.items()},
                **{f"{name}.forward": data.tokens for name, data in splits.items()},
                **{
                    f"{name}.nll.{corpus}": text.length
                    for name, data in splits.items()
                    for corpus, text in data.corpora.items()
                },
            },
            examples={
                name: {
                    **{task.name: len(task.examples) for task in data.tasks},
                    **{f"bias.{one.name}": len(one.comparisons) for one in data.bias},
                }
                for name, data in splits.items()
            },
            seconds=dict(self._seconds),
            reused=reused,
            operations=operations(self._model, self.targets),
        )
